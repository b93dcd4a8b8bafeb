"""Inner loops that people write by hand, as learners, each held to the hand-written loop.

`pytest recipes/python`. The contents: a learned loss, weights of examples, a learned augmentation, a
pull towards θ, entropy on unlabelled inputs, two views that must agree, a teacher, a distilled support
set, an adversarial inner step, a weight decay learned for each layer, a learned optimiser, other examples
at each step, a policy gradient, domain generalisation.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metablocks as mb

STEPS, RATE = 2, 0.1


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def net(inputs=2, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))


def regressions(tasks=3, examples=5):
    """`[tasks, examples, ...]` of support and query."""
    x, y = torch.randn(2, tasks, examples, 2), torch.randn(2, tasks, examples, 1)
    return mb.TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def classifications(tasks=3, examples=5, classes=3):
    x, y = torch.randn(2, tasks, examples, 2), torch.randint(classes, (2, tasks, examples))
    return mb.TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def by_hand(model, tasks, inner, outer, step=lambda weight, gradient: weight - RATE * gradient):
    """The mean of `outer(predict, fast, query)` after steps on `inner(predict, fast, support, k)`."""
    total = 0
    for task in tasks:
        fast = dict(model.named_parameters())
        for k in range(STEPS):
            value = inner(lambda x, w=fast: functional_call(model, w, (x,)), fast, task.support, k)
            gradients = torch.autograd.grad(value, [*fast.values()], create_graph=True)
            fast = {n: step(w, g) for (n, w), g in zip(fast.items(), gradients, strict=True)}
        total = total + outer(lambda x, w=fast: functional_call(model, w, (x,)), fast, task.query)
    return total / len(tasks)


def agree(expected, model, tasks, **blocks):
    """A learner's meta-gradient is autograd's through the hand-written loop."""
    blocks = {"rule": mb.LearningRate(RATE), "steps": STEPS, **blocks}
    learner = mb.MetaLearner(model, **blocks)
    for estimator in (mb.Unrolled(), mb.Adjoint()):
        learner.estimator = estimator
        result = learner.meta_gradient(tasks)
        named = {n: p for n, p in learner.named_parameters() if n in result.grads}
        due = torch.autograd.grad(expected, [*named.values()], retain_graph=True)
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-12)
        for name, gradient in zip(named, due, strict=True):
            assert gradient.norm() > 0, name
            torch.testing.assert_close(result.grads[name], gradient, rtol=1e-9, atol=1e-12)


def squares(predict, fast, batch, k=0):
    return F.mse_loss(predict(batch[0]), batch[1])


def test_a_learned_loss():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(inputs=2)

        def forward(self, prediction, target):
            return F.softplus(self.net(torch.cat([prediction, target], -1))).mean()

    model, tasks, learned = net(), regressions(), Learned()
    expected = by_hand(
        model, tasks, lambda f, fast, batch, k: learned(f(batch[0]), batch[1]), squares
    )
    agree(expected, model, tasks, loss=F.mse_loss, support_loss=learned)


def test_weights_of_examples():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = net(inputs=1)

        def forward(self, prediction, target):
            each = F.cross_entropy(prediction, target, reduction="none")
            weights = torch.sigmoid(self.weight(each.detach()[:, None]))[:, 0]
            return (weights * each).sum() / weights.sum()

    model, tasks, weighted = net(outputs=3), classifications(), Weighted()
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: weighted(f(batch[0]), batch[1]),
        lambda f, fast, batch: F.cross_entropy(f(batch[0]), batch[1]),
    )
    agree(expected, model, tasks, loss=F.cross_entropy, support_loss=weighted)


def test_a_learned_augmentation():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(2))

        def forward(self, *, inputs, target, model):
            return F.mse_loss(model(inputs + self.shift), target)

    model, tasks, shifted = net(), regressions(), Shifted()
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: F.mse_loss(f(batch[0] + shifted.shift), batch[1]),
        squares,
    )
    agree(expected, model, tasks, loss=F.mse_loss, support_loss=shifted)


def test_a_pull_towards_the_initialisation():
    model, tasks = net(), regressions()
    start = dict(model.named_parameters())

    def pulled(f, fast, batch, k):
        far = sum((weight - start[name]).square().sum() for name, weight in fast.items())
        return squares(f, fast, batch) + 0.5 * 3.0 * far

    expected = by_hand(model, tasks, pulled, squares)
    rule = mb.Chain(mb.Proximal(3.0), mb.LearningRate(RATE))
    agree(expected, model, tasks, loss=F.mse_loss, rule=rule)


def entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def test_entropy_on_the_unlabelled_query_inputs():
    def certain(prediction, target, *, model):
        labels, unlabelled = target
        return F.cross_entropy(prediction, labels) + entropy(model(unlabelled))

    model, tasks = net(outputs=3), classifications()
    (x, y), (queries, _) = tasks.support, tasks.query
    tasks = mb.TaskBatch(support=(x, (y, queries)), query=tasks.query)
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: (
            F.cross_entropy(f(batch[0]), batch[1][0]) + entropy(f(batch[1][1]))
        ),
        lambda f, fast, batch: F.cross_entropy(f(batch[0]), batch[1]),
    )
    agree(expected, model, tasks, loss=F.cross_entropy, support_loss=certain)


def test_two_views_that_must_agree():
    def consistent(prediction, target, *, inputs, model):
        return F.mse_loss(prediction, target) + F.mse_loss(model(inputs.flip(-1)), prediction)

    def plain(f, fast, batch, k):
        return squares(f, fast, batch) + F.mse_loss(f(batch[0].flip(-1)), f(batch[0]))

    model, tasks = net(), regressions()
    expected = by_hand(model, tasks, plain, squares)
    agree(expected, model, tasks, loss=F.mse_loss, support_loss=consistent)


def test_a_teacher():
    teacher = net(outputs=3).requires_grad_(False)

    def taught(prediction, target, *, inputs):
        return F.cross_entropy(prediction, teacher(inputs).softmax(-1))

    model, tasks = net(outputs=3), classifications()
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: F.cross_entropy(f(batch[0]), teacher(batch[0]).softmax(-1)),
        lambda f, fast, batch: F.cross_entropy(f(batch[0]), batch[1]),
    )
    agree(expected, model, tasks, loss=F.cross_entropy, support_loss=taught)


def test_a_distilled_support_set():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.images = nn.Parameter(torch.randn(3, 2))
            self.register_buffer("labels", torch.arange(3))

        def forward(self, *, model):
            return F.cross_entropy(model(self.images), self.labels)

    model, tasks, distilled = net(outputs=3), classifications(), Distilled()
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: F.cross_entropy(f(distilled.images), distilled.labels),
        lambda f, fast, batch: F.cross_entropy(f(batch[0]), batch[1]),
    )
    agree(expected, model, tasks, loss=F.cross_entropy, support_loss=distilled)


def test_an_adversarial_inner_step():
    class Perturbed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.shift = net(), nn.Parameter(torch.zeros(5, 2))

        def forward(self, x):
            return self.net(x + self.shift)

    def ascent(prediction, target):
        return -F.mse_loss(prediction, target)

    model, tasks = Perturbed(), regressions()
    total = 0
    for task in tasks:
        shift = torch.zeros(5, 2, requires_grad=True)
        for _ in range(STEPS):
            worse = F.mse_loss(model.net(task.support[0] + shift), task.support[1])
            shift = shift + RATE * torch.autograd.grad(worse, shift, create_graph=True)[0]
        total = total + F.mse_loss(model.net(task.query[0] + shift), task.query[1]) / len(tasks)
    blocks = {"adapt": "shift", "start": mb.Zeros("shift")}
    agree(total, model, tasks, loss=F.mse_loss, support_loss=ascent, **blocks)


def test_a_weight_decay_learned_for_each_layer():
    class Decayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.strength = nn.ParameterDict({"0": torch.tensor(-2.0), "2": torch.tensor(-1.0)})

        def forward(self, prediction, target, *, params):
            decay = sum(
                strength.exp() * params[f"{layer}.weight"].square().sum()
                for layer, strength in self.strength.items()
            )
            return F.mse_loss(prediction, target) + decay

    model, tasks, decayed = net(), regressions(), Decayed()
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: decayed(f(batch[0]), batch[1], params=fast),
        squares,
    )
    agree(expected, model, tasks, loss=F.mse_loss, support_loss=decayed)


def test_a_learned_optimiser():
    class LearnedOptimiser(mb.UpdateRule):
        def __init__(self):
            super().__init__()
            self.net = net(inputs=1)

        def forward(self, updates, state, step):
            return {
                name: -RATE * self.net(g[..., None])[..., 0] for name, g in updates.items()
            }, state

    model, tasks, rule = net(), regressions(), LearnedOptimiser()
    expected = by_hand(
        model, tasks, squares, squares, lambda w, g: w - RATE * rule.net(g[..., None])[..., 0]
    )
    agree(expected, model, tasks, loss=F.mse_loss, rule=rule)


def test_other_examples_at_each_step():
    model, tasks = net(), regressions()
    x, y = torch.randn(3, STEPS, 5, 2), torch.randn(3, STEPS, 5, 1)  # [tasks, steps, examples, ...]
    tasks = mb.TaskBatch(support=(x, y), query=tasks.query)
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: F.mse_loss(f(batch[0][k]), batch[1][k]),
        squares,
    )
    agree(expected, model, tasks, loss=F.mse_loss, batches=mb.Stream(query=False))


def test_a_policy_gradient_with_an_environment_of_ones_own():
    def rewards(states, actions, goal):  # the environment: no derivative goes through it
        return -(states[:, 0] + actions.double() - goal).square()

    def reinforce(policy, states, noise, goal):
        logits = policy(states)
        actions = (noise[:, None] > logits.softmax(-1).cumsum(-1)).sum(-1).clamp(max=2)
        chosen = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
        return -(chosen * rewards(states, actions, goal)).mean()

    def loss(*, inputs, target, model):
        return reinforce(model, *inputs, target)

    model = net(outputs=3)
    states, noise, goals = torch.randn(2, 4, 5, 2), torch.rand(2, 4, 5), torch.randn(4)[:, None]
    support, query = (((states[i], noise[i]), goals) for i in range(2))
    tasks = mb.TaskBatch(support=support, query=query)
    expected = by_hand(
        model,
        tasks,
        lambda f, fast, batch, k: reinforce(f, *batch[0], batch[1]),
        lambda f, fast, batch: reinforce(f, *batch[0], batch[1]),
    )
    agree(expected, model, tasks, loss=loss)


def test_domain_generalisation():
    """Of three domains two are trained on inside, and the one held out judges; each is held out once."""
    model = net()
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
    parts = [[k for k in range(3) if k != held] for held in range(3)]
    support = [torch.stack([t[kept].flatten(0, 1) for kept in parts]) for t in (x, y)]
    tasks = mb.TaskBatch(support=tuple(support), query=(x, y))
    agree(by_hand(model, tasks, squares, squares), model, tasks, loss=F.mse_loss)
