"""Meta-gradients through KFO and Meta-Curvature: plain autograd, and transforms that adapt."""

import pytest
import torch
import torch.nn.functional as F
from small_transforms import ADAPTING, ADAPTS, RATE, perturb, problems
from torch import nn

import metablocks as mb
from metablocks import KFO, Chain, LearningRate, Loop, MetaCurvature, Vmap
from metablocks.laws import gradients, problem


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
@pytest.mark.parametrize(
    "small",
    [
        lambda **size: problem.regression(hidden=(3,), **size),
        lambda **size: problem.classification(layers=1, filters=2, **size),
    ],
    ids=["regression", "classification"],
)
def test_finite_differences_of_every_factor_that_adapts(make, small, device):
    small = small(tasks=1, steps=2, device=device)
    learner = perturb(small.learner(Chain(make(), LearningRate(RATE))))
    gradients.finite_differences(learner, small.tasks)


ORDERS = [mb.SecondOrder(), mb.FirstOrder(), mb.TruncatedOrder(last=1)]


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
@problems
def test_a_transform_that_adapts_is_the_same_on_every_executor(make, small, place):
    small = small(**place)

    def learner(executor):
        return perturb(small.learner(Chain(make(), LearningRate(RATE)), executor=executor))

    gradients.one_gradient(small, [Vmap(), Vmap(chunk=2)], learner)


# ---- the whole meta-gradient, written once more in plain autograd


class LinearNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).tanh())


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(F.softplus(self.conv(x)).flatten(1))


def linear_net(p, x):
    h = x @ p["one.weight"].T + p["one.bias"]
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (h * p["norm.weight"] + p["norm.bias"]).tanh() @ p["two.weight"].T + p["two.bias"]


def conv_net(p, x):
    patches = F.unfold(x, 3).transpose(1, 2)
    h = patches @ p["conv.weight"].flatten(1).T + p["conv.bias"]
    return (1 + h.transpose(1, 2).exp()).log().flatten(1) @ p["head.weight"].T + p["head.bias"]


def plain_kfo(*, hidden=0, activation=None, psd=False):
    def linear(f, prefix, name, g):
        left, right = f[f"{prefix}left.{name}"], f.get(f"{prefix}right.{name}")
        if psd:
            left, right = left.T @ left, None if right is None else right.T @ right
        h = left @ g if right is None else left @ g @ right
        return h + f[f"{prefix}bias.{name}"]

    def transform(f, name, g):
        h = g.flatten(2) if g.ndim > 2 else g
        for n in range(hidden):
            on = linear(f, f"hidden{n}.on.", name, h)
            off = linear(f, f"hidden{n}.off.", name, h)
            h = activation(on) + off - activation(off)
        return linear(f, "", name, h).view_as(g)

    return transform


def plain_curvature(f, name, g):
    if g.ndim == 1:
        return f[f"scale.{name}"] * g
    out, inp = f[f"out.{name}"], f[f"in.{name}"]
    if g.ndim == 2:
        return out @ g @ inp
    h = inp @ g.flatten(2) @ f[f"filter.{name}"].T  # each filter [C_in, k] by itself
    return (out @ h.flatten(1)).view_as(g)


def plain_meta_gradient(net, theta, factors, transform, tasks, *, steps, adapts, order):
    leaves = [*theta.values(), *factors.values()]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for task in (tasks[index] for index in range(len(tasks))):
        fast, own = dict(theta), dict(factors)
        for k in range(steps):
            loss = F.mse_loss(net(fast, task.support[0]), task.support[1])
            g = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            if adapts and k > 0:
                slope = torch.autograd.grad(loss, list(own.values()), create_graph=True)
                own = {key: f - RATE * s for (key, f), s in zip(own.items(), slope, strict=True)}
            if not order(k, steps, mb.Progress()):
                g = [direction.detach() for direction in g]
            fast = {
                name: p - RATE * transform(own, name, direction)
                for (name, p), direction in zip(fast.items(), g, strict=True)
            }
        query = F.mse_loss(net(fast, task.query[0]), task.query[1])
        for so_far, grad in zip(total, torch.autograd.grad(query, leaves), strict=True):
            so_far += grad / len(tasks)
    return total


def check_against_plain_autograd(make, transform, net, place, within, **blocks):
    module, forward, shape = net

    def draw(*size):
        return torch.randn(3, *size, **place)

    tasks = mb.TaskBatch(support=(draw(5, *shape), draw(5, 2)), query=(draw(4, *shape), draw(4, 2)))
    model, rule = module().to(**place), make()
    learner = perturb(
        mb.MetaLearner(
            model, loss=F.mse_loss, steps=3, rule=Chain(rule, LearningRate(RATE)), **blocks
        )
    )
    theta = dict(model.named_parameters())
    factors = {name.removeprefix("factors."): p for name, p in rule.named_parameters()}
    total = plain_meta_gradient(
        forward,
        theta,
        factors,
        transform,
        tasks,
        steps=3,
        adapts=getattr(rule, "rate", None) is not None,
        order=learner.order,
    )
    names = [f"model.{n}" for n in theta] + [f"rule.rules.0.factors.{n}" for n in factors]
    expected = dict(zip(names, total, strict=True))
    got = learner.meta_gradient(tasks).grads
    problem.hold("plain autograd, θ", *under("model.", got, expected), within(1e-10))
    problem.hold("plain autograd, φ", *under("rule.", got, expected), within(1e-10))


def under(prefix, *trees):
    return [{name: t for name, t in tree.items() if name.startswith(prefix)} for tree in trees]


NETS = {"linear": (LinearNet, linear_net, (3,)), "conv": (ConvNet, conv_net, (2, 4, 4))}
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())


@pytest.mark.parametrize("executor", [Loop(), Vmap()], ids=repr)
@nets
@pytest.mark.parametrize(
    ("make", "transform"),
    [
        (KFO, plain_kfo()),
        (lambda: KFO(psd=True), plain_kfo(psd=True)),
        (lambda: KFO(hidden=2), plain_kfo(hidden=2, activation=torch.relu)),
        (
            lambda: KFO(hidden=1, activation="tanh", psd=True),
            plain_kfo(hidden=1, activation=torch.tanh, psd=True),
        ),
        (lambda: KFO(**ADAPTS), plain_kfo()),
        (
            lambda: KFO(hidden=1, activation="tanh", psd=True, **ADAPTS),
            plain_kfo(hidden=1, activation=torch.tanh, psd=True),
        ),
        (MetaCurvature, plain_curvature),
    ],
    ids=["kfo", "psd", "hidden", "hidden-psd", "adapt", "adapt-hidden-psd", "curvature"],
)
def test_meta_gradients_are_those_of_plain_autograd(make, transform, net, executor, place, within):
    check_against_plain_autograd(make, transform, net, place, within, executor=executor)


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@nets
@pytest.mark.parametrize(
    ("make", "transform"),
    [
        (lambda: KFO(hidden=1), plain_kfo(hidden=1, activation=torch.relu)),
        (MetaCurvature, plain_curvature),
    ],
    ids=["kfo", "curvature"],
)
def test_so_they_are_for_every_order(make, transform, net, order, place, within):
    check_against_plain_autograd(make, transform, net, place, within, order=order)
