"""The adjoint: `Unrolled`'s gradient for every block, from the same draws, at flat memory."""

import gc
import warnings

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import exchanging, learner_of, perturbed, tasks_of
from small_learners import small as small_net
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, GradientError
from metablocks.laws import gradients
from metablocks.laws.compare import perturb
from metablocks.recipe import build, load

ADJOINTS = [
    mb.Adjoint(),
    mb.Adjoint(keep_every=2, offload=True),
    mb.Adjoint(graphs=1),
    mb.Adjoint(keep_every=2, graphs=2),
]
EXECUTORS = pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap()], ids=repr)
rates = mb.LearningRate
RULES = {
    "mask": lambda: mb.Chain(mb.MTMask(), mb.lslr(0.1)),
    "kfo-adapt": lambda: mb.Chain(mb.KFO(adapt_transform=True, rate=0.1), rates(0.1)),
}


class MixedOrder:
    """Second order at every other step, from the first on."""

    def __call__(self, step, steps, progress):
        return step % 2 == 0


ORDERS = [mb.SecondOrder(), mb.FirstOrder(), mb.TruncatedOrder(last=1), MixedOrder()]
STEP_LOSSES = [mb.FinalStepLoss(), mb.UniformStepLoss(), mb.AnnealedStepLoss(epochs=5)]


@pytest.fixture(autouse=True)
def _draws_under_vmap():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mb.RandomDrawsWarning)
        yield


# ---- one gradient


def same_gradient(small, rule, **blocks):
    """`ADJOINTS` give what `Unrolled` gives, learned transforms being off the identity."""

    learner = perturb(small.learner(rule(), **blocks), "factors.")
    estimators = exchanging(learner, "estimator")
    gradients.one_estimator(small, ADJOINTS, estimators, progress=mb.Progress(2))


@pytest.mark.parametrize(
    ("make", "executor"), [(problem.regression, mb.Loop()), (problem.classification, mb.Vmap())]
)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_it_is_the_unrolled_gradient_for_rules_that_draw_or_adapt(make, executor, rule, place):
    small = make(tasks=2, steps=3, **place)
    orders = ORDERS[:1] if rule is RULES["kfo-adapt"] else ORDERS
    step_losses, adapts = [*STEP_LOSSES, mb.UniformStepLoss()], ["*", "head.*", "!head.*", "*"]
    for order, step_loss, adapt in zip(orders, step_losses, adapts, strict=False):
        blocks = {"order": order, "step_loss": step_loss, "adapt": adapt}
        same_gradient(small, rule, executor=executor, **blocks)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_it_is_the_unrolled_gradient_for_any_number_of_steps_and_carries(steps, every, place):
    small = problem.regression(tasks=1, steps=steps, **place)

    def learner(estimator):
        rule = mb.Chain(mb.MTMask(), mb.Momentum(), rates(0.1)) if steps else rates(0.1)
        blocks = {"order": MixedOrder(), "step_loss": mb.UniformStepLoss()}
        return small.learner(rule, estimator=estimator, **blocks)

    gradients.one_estimator(small, [mb.Adjoint(keep_every=every)], learner)


@pytest.mark.parametrize(("executor", "adapt"), [(mb.Loop(), "!*.norm.*"), (mb.Vmap(), "*")])
def test_per_step_batch_norm_and_tnet_give_the_same_gradient_and_buffers(executor, adapt, place):
    small = problem.classification(tasks=2, steps=3, **place)

    def model():
        norms = mb.per_step_batch_norm(small.model(), 3, statistics="running")
        return perturbed(mb.insert_tnet(norms), ".norm.")

    both = problem.Problem(model, small.loss, small.tasks, 3)
    for order, step_loss in zip(ORDERS, [*STEP_LOSSES, mb.UniformStepLoss()], strict=True):
        blocks = {"order": order, "step_loss": step_loss, "executor": executor}
        learner = both.learner(mb.lslr(0.1), adapt=[adapt, "!*.transform.*"], **blocks)
        gradients.one_estimator(both, ADJOINTS, exchanging(learner, "estimator"))
    assert learner.backward(small.tasks).buffer_changes


class Tracing(nn.Module):
    """A net whose buffer depends on its parameters, step after step, and is read by the next pass."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("trace", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        hidden = torch.tanh(self.one(x) + self.trace)
        self.trace = 0.5 * self.trace + hidden.mean(0)
        self.count += 1
        return self.two(hidden)


class Counting(mb.UpdateRule):
    """A state of everything: a number, nothing, whole numbers, and a tensor that is learned."""

    def setup(self, params, steps):
        self.slope = nn.Parameter(torch.ones((), dtype=torch.float64))
        return self

    def init(self, params):
        first = next(iter(params.values()))
        return {"times": 0, "none": None, "whole": first.new_ones((), dtype=torch.long),
                "scale": self.slope.square() + first.mean()}  # fmt: skip

    def forward(self, updates, state, step):
        scale = state["scale"] * state["whole"] / (1 + state["times"])
        mean = torch.stack([u.square().mean() for u in updates.values()]).sum()
        new = {**state, "times": state["times"] + 1, "whole": state["whole"] + 1}
        new["scale"] = state["scale"] * 0.9 + 0.1 * mean
        return {name: -0.1 * scale * u for name, u in updates.items()}, new


@EXECUTORS
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_buffers_that_carry_gradients_and_states_of_any_kind(executor, order, float64):
    tasks = tasks_of(3, tasks=2)

    blocks = {"order": order, "executor": executor, "steps": 4, "rule": Counting()}
    learner = learner_of(Tracing(), step_loss=mb.UniformStepLoss(), **blocks)
    own = problem.Problem(Tracing, F.mse_loss, tasks, 4)
    gradients.one_estimator(own, ADJOINTS, exchanging(learner, "estimator"))
    if isinstance(order, mb.SecondOrder):
        learner.estimator = mb.Adjoint()
        gradients.finite_differences(learner, tasks)


class Noise(mb.UpdateRule):
    """Draws in the update, after the draws of the support pass."""

    def forward(self, updates, state, step):
        return {name: u * (1 + 0.3 * torch.randn_like(u)) for name, u in updates.items()}, state


@EXECUTORS
@pytest.mark.parametrize(
    ("order", "step_loss"),
    [
        (mb.SecondOrder(), mb.FinalStepLoss()),
        (mb.SecondOrder(), mb.UniformStepLoss()),
        (mb.FirstOrder(), mb.UniformStepLoss()),
        (MixedOrder(), mb.UniformStepLoss()),
    ],
)
def test_recomputation_sees_the_same_draws(executor, order, step_loss, placed):
    """Dropout in support and query passes, a mask at the start, noise in the rule."""
    tasks = tasks_of(3, tasks=2)

    rule = mb.Chain(mb.MTMask(), Noise(), rates(0.1, learn=True))
    blocks = {"order": order, "step_loss": step_loss, "executor": executor, "steps": 5}
    learner = learner_of(small_net(dropout=0.4), rule=rule, **blocks)
    own = problem.Problem(small_net, F.mse_loss, tasks, 5)
    estimators = [*ADJOINTS, mb.Adjoint(keep_every=3)]
    gradients.one_estimator(own, estimators, exchanging(learner, "estimator"))


# ---- cost


def passes(estimator, order, step_loss=None, steps=6):
    """Forward passes of the model in one meta-gradient."""
    count = [0]

    def loss(prediction, target):
        count[0] += 1
        return F.mse_loss(prediction, target)

    blocks = {"estimator": estimator, "order": order, "step_loss": step_loss, "steps": steps}
    learner, tasks = learner_of(small_net(), loss=loss, **blocks), tasks_of(3, tasks=1)
    learner.meta_gradient(tasks)  # the check of the first call passes through too
    count[0] = 0
    learner.meta_gradient(tasks)
    return count[0]


def test_a_first_order_step_is_taken_once_and_a_second_order_one_twice():
    assert passes(mb.Adjoint(), mb.FirstOrder()) == 6 + 1
    assert passes(mb.Adjoint(), mb.SecondOrder()) == 6 + 6 + 1
    assert passes(mb.Adjoint(), mb.TruncatedOrder(last=2)) == 6 + 2 + 1
    assert passes(mb.Adjoint(), mb.SecondOrder(), mb.UniformStepLoss()) == 6 + 6 + 6
    assert passes(mb.Adjoint(keep_every=3), mb.SecondOrder()) == 6 + 4 + 6 + 1


def peak(estimator, steps, *, between=(8, 8), examples=4000, **blocks):
    """Bytes allocated at the same time by the first meta-gradient, and those left behind."""
    torch.manual_seed(0)
    middle = [nn.Tanh(), nn.Linear(*between), nn.Tanh()] if between else [nn.Tanh()] * 4
    model = nn.Sequential(nn.Linear(3, 8), *middle, nn.Linear(8, 2))
    learner = learner_of(model, steps=steps, estimator=estimator, **blocks)
    x = torch.randn(1, *([steps + 1] if blocks else []), examples, 3)
    tasks = mb.TaskBatch((x, x[..., :2]), (x, x[..., 1:]))
    gc.collect()
    gc.disable()  # what only the collector frees counts as used
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            result = learner.meta_gradient(tasks)
    finally:
        gc.enable()
    assert result.loss.isfinite()
    used = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    return most, used


def test_memory_does_not_grow_with_the_graph_of_a_step():
    """Of 32 steps, 31 more copies of the fast weights: some 30 kB.

    The check that every meta-parameter is connected is part of what is measured.
    """
    one, _ = peak(mb.Adjoint(), steps=1)
    for estimator in (mb.Adjoint(), mb.Adjoint(keep_every=8)):
        many, left = peak(estimator, steps=32)
        assert many < 1.4 * one
        assert left < 0.01 * one
    assert peak(mb.Unrolled(), steps=8)[0] > 4 * one


def test_memory_does_not_grow_with_a_stream():
    """Beyond the stream itself, of which each step sees one row and each carry is judged."""
    stream = {"batches": mb.Stream(), "step_loss": mb.UniformStepLoss(initial=True)}
    stream |= {"between": (), "examples": 1500}
    short, _ = peak(mb.Adjoint(keep_every=8), 8, **stream)
    long, left = peak(mb.Adjoint(keep_every=8), 96, **stream)
    assert long < 1.5 * short
    assert left < 0.01 * short


# ---- connection, purity, misuse


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (Unused, {}),
        (Unused, {"adapt": "used.*"}),
        (lambda: nn.Linear(3, 2), {"steps": 0, "rule": mb.meta_sgd}),
        (lambda: nn.Linear(3, 2), {"order": mb.FirstOrder(), "rule": mb.lslr}),
        (small_net, {"rule": lambda rate: mb.Chain(mb.MTMask(), mb.lslr(rate))}),
        (small_net, {"rule": lambda rate: mb.Chain(mb.Momentum(), mb.Adam(), mb.lslr(rate))}),
    ],
)
def test_disconnected_parameters_are_those_of_unrolled(model, blocks):
    torch.manual_seed(0)
    model, tasks = model(), tasks_of(3)
    messages = []
    for estimator in (mb.Unrolled(), *ADJOINTS):
        rule = blocks.get("rule", mb.LearningRate)(0.1)
        learner = learner_of(model, **{**blocks, "rule": rule, "estimator": estimator})
        try:
            messages.append(str(learner.meta_gradient(tasks).loss.isfinite()))
        except GradientError as error:
            messages.append(str(error))
    assert messages == messages[:1] * len(messages)
    assert ("does not depend on" in messages[0]) == (isinstance(model, Unused) or "steps" in blocks)


def test_a_recipe_takes_it():
    experiment = build(load("maml_sinusoid", ["outer.estimator.block=adjoint"]))
    assert experiment.learner.estimator == mb.Adjoint()


@pytest.mark.parametrize("every", [0, -1, True, 1.5])
def test_misuse_is_refused(every):
    with pytest.raises(BlockError, match=r"keep_every is .*it takes a whole number, 1 or more"):
        mb.Adjoint(keep_every=every)
