"""norm_statistics="support": query passes go by the support set's statistics, in training too.

Held to a loop written by hand in plain autograd, in float64, where rounding is below 1e-12.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError
from metablocks.norm_statistics import by_statistics, leaving_statistics

CHANNELS = 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Batch norms of images and of vectors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, CHANNELS, 3)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.features = nn.BatchNorm1d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, x):
        return self.head(self.features(torch.tanh(self.norm(self.conv(x))).mean((2, 3))))


def net():
    model = Net()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model(torch.randn(20, 1, 5, 5) * 3 + 1)  # the stored statistics, which are to count for nothing
    return model


def images(count, examples):
    inputs = torch.randn(count, examples, 1, 5, 5) + torch.randn(count, 1, 1, 1, 1)
    return inputs, torch.randint(2, (count, examples))


def tasks_of(count=3):
    return mb.TaskBatch(images(count, 6), images(count, 4))


def learner_of(model, **blocks):
    settings = {"steps": 2, "rule": mb.LearningRate(0.05), "norm_statistics": "support", **blocks}
    return mb.MetaLearner(model, loss=F.cross_entropy, **settings)


def norm(params, name, x, statistics):
    """By the batch's own statistics, `F.batch_norm`; by others a formula: to it they are constants."""
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    if statistics is None:
        within = [dim for dim in range(x.ndim) if dim != 1]
        found = x.mean(within), x.var(within, correction=1)
        return F.batch_norm(x, None, None, weight, bias, training=True), found
    shape = [1, -1, *[1] * (x.ndim - 2)]
    mean, variance, weight, bias = (t.reshape(shape) for t in (*statistics, weight, bias))
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias, statistics


def forward(params, x, statistics=(None, None)):
    x = F.conv2d(x, params["conv.weight"], params["conv.bias"])
    x, first = norm(params, "norm", x, statistics[0])
    x, second = norm(params, "features", torch.tanh(x).mean((2, 3)), statistics[1])
    return F.linear(x, params["head.weight"], params["head.bias"]), (first, second)


def by_hand(learner, tasks, weights):
    """Mean over tasks of Σ_k v_k L_q(θ_k), and its gradient.

    A step that the order does not look through is taken at detached parameters: its gradient and its
    statistics are constants.
    """
    initial = dict(learner.model.named_parameters())
    losses = []
    for task in tasks:
        fast, terms = initial, []
        _, statistics = forward(fast, task.support[0])
        for k, weight in enumerate(weights):
            if weight:
                prediction, _ = forward(fast, task.query[0], statistics)
                terms.append(weight * F.cross_entropy(prediction, task.query[1]))
            if k < learner.steps:
                through = learner.order(k, learner.steps, mb.Progress())
                at = fast
                if not through:
                    at = {name: p.detach().requires_grad_() for name, p in fast.items()}
                prediction, statistics = forward(at, task.support[0])
                value = F.cross_entropy(prediction, task.support[1])
                grads = torch.autograd.grad(value, list(at.values()), create_graph=True)
                if not through:
                    grads = [grad.detach() for grad in grads]
                    statistics = [[each.detach() for each in pair] for pair in statistics]
                fast = {n: p - 0.05 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(sum(terms))
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(initial.values()))
    return loss.detach(), dict(zip((f"model.{name}" for name in initial), grads, strict=True))


def assert_as_by_hand(learner, tasks, *, weights=(0.0, 0.0, 1.0), within=CLOSE):
    result = learner.meta_gradient(tasks)
    loss, grads = by_hand(learner, [tasks[index] for index in range(len(tasks))], weights)
    torch.testing.assert_close(result.loss, loss, **within)
    torch.testing.assert_close(result.grads, grads, **within)
    return result


ORDERS = [mb.SecondOrder(), mb.FirstOrder(), mb.TruncatedOrder(last=1)]
ESTIMATORS = [mb.Unrolled(), mb.Adjoint(), mb.Adjoint(keep_every=2), mb.Adjoint(graphs=1)]


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap()], ids=repr)
def test_the_meta_gradient_looks_through_the_statistics_as_plain_autograd_does(
    order, estimator, executor
):
    tasks, model = tasks_of(), net()
    blocks = {"order": order, "estimator": estimator, "executor": executor}
    assert_as_by_hand(learner_of(model, **blocks), tasks)
    every = learner_of(model, step_loss=mb.UniformStepLoss(initial=True), **blocks)
    assert_as_by_hand(every, tasks, weights=[1 / 3] * 3)


@pytest.mark.parametrize(
    ("estimator", "executor"), [(mb.Adjoint(), mb.Loop), (mb.Unrolled(), mb.Vmap)], ids=str
)
def test_so_it_does_when_compiled(estimator, executor):
    learner = learner_of(net(), estimator=estimator, executor=executor(compile="trace"))
    assert_as_by_hand(learner, tasks_of())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_query_loss_in_training_is_that_of_the_adapted_model(steps):
    tasks = tasks_of()
    learner = learner_of(net(), steps=steps)
    result = assert_as_by_hand(learner, tasks, weights=[*[0.0] * steps, 1.0])
    for loss, task in zip(
        result.query_losses[:, -1], map(tasks.__getitem__, range(3)), strict=True
    ):
        adapted = learner.adapt(task.support)
        with torch.no_grad():
            torch.testing.assert_close(loss, F.cross_entropy(adapted(task.query[0]), task.query[1]))
    before = {name: b.clone() for name, b in learner.model.named_buffers()}
    learner.backward(tasks)
    assert all(torch.equal(b, before[name]) for name, b in learner.model.named_buffers())


def test_no_query_example_knows_of_another_in_training_either():
    tasks = tasks_of()
    alone = mb.TaskBatch(tasks.support, tuple(leaf[:, :1] for leaf in tasks.query))
    result = assert_as_by_hand(learner_of(net()), alone)
    whole = learner_of(net(), norm_statistics="batch").meta_gradient(tasks)
    assert not torch.allclose(result.loss, whole.loss)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_where_the_inner_loop_converges_the_implicit_gradient_is_the_unrolled_one(solver):
    tasks, model = tasks_of(2), net()
    pull = 20.0  # above the curvature of the loss, so that a rate of 1/pull converges fast

    def gradient(estimator):
        rule = mb.Chain(mb.Proximal(pull), mb.LearningRate(1 / pull))
        return learner_of(model, steps=40, rule=rule, estimator=estimator).meta_gradient(tasks)

    implicit = gradient(mb.Implicit(proximal=pull, cg_steps=40, solver=solver))
    unrolled = gradient(mb.Unrolled())
    torch.testing.assert_close(implicit.grads, unrolled.grads, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(implicit.loss, unrolled.loss, **CLOSE)


def test_reptile_goes_where_it_goes_and_reports_the_loss_by_the_supports_statistics():
    tasks, model = tasks_of(), net()
    estimator = mb.Reptile(examples="support")
    got = learner_of(model, estimator=estimator).meta_gradient(tasks)
    other = learner_of(model, estimator=estimator, norm_statistics="batch").meta_gradient(tasks)
    torch.testing.assert_close(got.grads, other.grads, rtol=0, atol=0)
    due = learner_of(model).meta_gradient(tasks)
    torch.testing.assert_close(got.query_losses, due.query_losses, **CLOSE, equal_nan=True)


def test_a_net_without_such_norms_makes_no_pass_for_statistics():
    passes = []

    class Linear(nn.Linear):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x.flatten(1))

    model, counts = nn.Sequential(Linear(25, 2), nn.LayerNorm(2)), []
    for statistics in ("batch", "support"):
        learner = learner_of(model, norm_statistics=statistics)
        learner.meta_gradient(tasks_of())
        passes.clear()
        learner.meta_gradient(tasks_of())
        counts.append(len(passes))
    assert counts == [9, 9]  # of each of three tasks two steps and a query pass


def test_an_estimator_that_begins_without_the_support_set_is_told():
    class Own(mb.Estimator):
        def __call__(self, inner, meta, buffers, task):
            inner.start(meta, buffers)

    learner = learner_of(net(), estimator=Own())
    with pytest.raises(BlockError, match='"support" reads the support set; an estimator gives it'):
        learner.meta_gradient(tasks_of())


class Activated(nn.BatchNorm2d):
    """With an activation in the norm itself, as timm's."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


NORMS = [
    (nn.BatchNorm1d(CHANNELS), (6, CHANNELS)),
    (nn.BatchNorm1d(CHANNELS, affine=False, momentum=None), (6, CHANNELS, 4)),
    (Activated(CHANNELS, eps=0.1), (6, CHANNELS, 4, 4)),
    (nn.InstanceNorm1d(CHANNELS, affine=True, track_running_stats=True), (6, CHANNELS, 4)),
    (nn.InstanceNorm2d(CHANNELS, track_running_stats=True), (CHANNELS, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMS, ids=lambda value: str(value))
def test_statistics_are_those_a_norm_would_leave_and_what_it_predicts_by(layer, shape):
    layer.reset_running_stats()
    inputs, query = torch.randn(shape) + 1, torch.randn(shape)
    made, stock = (type(layer)(CHANNELS, **settings(layer)) for _ in range(2))
    stock.load_state_dict(layer.state_dict())
    made.load_state_dict(layer.state_dict())
    stock.momentum = 1.0
    torch.testing.assert_close(leaving_statistics(made)(inputs), stock(inputs), **CLOSE)
    torch.testing.assert_close(made.running_mean, stock.running_mean, **CLOSE)
    torch.testing.assert_close(made.running_var, stock.running_var, **CLOSE)
    expected = stock.eval()(query)
    made.eval()
    assert torch.equal(by_statistics(made)(query), made(query))
    mean, variance = made.running_mean.clone(), made.running_var.clone()

    def predict(mean, variance):
        made.running_mean, made.running_var = mean, variance
        return by_statistics(made)(query)

    ends = mean.requires_grad_(), variance.requires_grad_()
    torch.testing.assert_close(predict(*ends), expected, **CLOSE)
    assert torch.autograd.gradcheck(predict, ends)
    assert torch.autograd.gradgradcheck(predict, ends)


def settings(layer):
    names = ("eps", "momentum", "affine", "track_running_stats")
    return {name: getattr(layer, name) for name in names}
