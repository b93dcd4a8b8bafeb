"""Learning rates and chains: equal rates, hand-written loops, names, shapes and refusals."""

from typing import Any, get_args

import pytest
import small_problems as problem
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks import (
    KFO,
    Adam,
    Chain,
    ClipNorm,
    LearningRate,
    Momentum,
    MTMask,
    Proximal,
    StepInfo,
    lslr,
    meta_sgd,
)
from metablocks.errors import MetablocksError
from metablocks.functional import FunctionalModule, detach
from metablocks.inner_loop import adapt
from metablocks.laws import gradients, rules
from metablocks.laws.compare import assert_close, fixed_draws, noise_like
from metablocks.rules import Granularity

GRANULARITIES = get_args(Granularity)
RULES = {
    "layer": lambda: LearningRate(0.3, granularity="layer", per_step=True, learn=True),
    "nested": lambda: Chain(LearningRate(-0.5), lslr(0.3), Chain(meta_sgd(-1.0))),
    "kfo": lambda: KFO(hidden=1, activation="tanh", psd=True),
    "mt_mask": MTMask,
    "momentum": Momentum,
    "adam": lambda: Adam(beta1=0.0),
    "clip_norm": lambda: ClipNorm(0.5),
    "proximal": lambda: Proximal(0.5),
}


def params(**place: Any) -> dict[str, torch.Tensor]:
    return {
        "body.weight": torch.randn(3, 2, **place),
        "body.bias": torch.randn(3, **place),
        "scale": torch.randn((), **place),
    }


def under(grads, prefix):
    return {name: grad for name, grad in grads.items() if name.startswith(prefix)}


def total(grads):
    return {"rate": torch.stack([g.sum() for g in under(grads, "rule.").values()]).sum()}


def equal_rates(small, granularity, *, per_step: bool, rate: float = 0.1, init=None) -> None:
    """Law 3: the scalar's query losses and θ-gradient; the rates' gradients sum to the scalar rate's."""
    init = rate if init is None else init
    fine = small.learner(
        LearningRate(init, granularity=granularity, per_step=per_step, learn=True)
    ).meta_gradient(small.tasks)
    scalar = small.learner(LearningRate(rate, learn=True)).meta_gradient(small.tasks)
    assert_close("equal rates, loss", {"loss": fine.loss}, {"loss": scalar.loss}, 1e-10)
    assert_close(
        "equal rates, θ", under(fine.grads, "model."), under(scalar.grads, "model."), 1e-10
    )
    assert_close("equal rates, α", total(fine.grads), total(scalar.grads), 1e-10)


@given(
    granularity=st.sampled_from(GRANULARITIES),
    per_step=st.booleans(),
    rate=st.floats(0, 0.3),
    steps=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_equal_rates_are_the_scalar_rate(granularity, per_step, rate, steps, seed, place):
    small = problem.regression(seed=seed, steps=steps, **place)
    equal_rates(small, granularity, per_step=per_step, rate=rate)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("init", [[0.2] * 3, {"head.*": 0.2, "*": 0.2}, {"*": 0.2}], ids=str)
def test_equal_rates_in_a_list_or_in_groups_are_the_scalar_rate(granularity, init, place):
    small = problem.regression(tasks=2, steps=3, **place)
    equal_rates(small, granularity, per_step=granularity == "tensor", rate=0.2, init=init)


@pytest.mark.parametrize("granularity", ["scalar", "tensor", "parameter"])
@pytest.mark.parametrize(
    "init", [[0.3, 0.0, 0.1], {"*.bias": 0.3, "head.*": 0.0, "*": 0.1}], ids=str
)
def test_rates_by_step_and_by_group_are_those_of_torch(granularity, init, place):
    """`torch.optim.SGD` with a rate set before each step, and with parameter groups."""
    small = problem.regression(tasks=1, steps=3, **place)
    model, task = small.model(), small.tasks[0]
    group_of = {"bias": 0.3, "head.weight": 0.0}
    groups = [
        {"params": [p], "lr": next((lr for end, lr in group_of.items() if n.endswith(end)), 0.1)}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for index in range(3):
        if isinstance(init, list):
            for group in optimizer.param_groups:
                group["lr"] = init[index]
        optimizer.zero_grad()
        small.loss(model(task.support[0]), task.support[1]).backward()
        optimizer.step()
    learner = small.learner(LearningRate(init, granularity=granularity))
    adapted = learner.adapt(task.support)
    got, due = dict(adapted.named_parameters()), dict(model.named_parameters())
    assert_close("torch.optim.SGD", detach(got), detach(due), 1e-12)


@pytest.mark.parametrize("init", [[0.3, 0.1], {"*.bias": 0.3, "*": 0.1}], ids=str)
def test_learned_rates_by_step_and_by_group_have_their_slopes(init, device64):
    small = problem.regression(tasks=2, steps=2, device=device64)
    learner = small.learner(LearningRate(init, learn=True))
    named = {n: tuple(p.shape) for n, p in learner.rule.named_parameters()}
    assert named == ({"rate.*": (2,)} if isinstance(init, list) else {"rate.0": (), "rate.1": ()})
    gradients.finite_differences(learner, small.tasks)
    rules.one_gradient(lambda: LearningRate(init, learn=True), small)


def test_the_last_rate_of_a_list_goes_on_where_it_is_to(place):
    small = problem.regression(tasks=1, steps=2, **place)
    learner = small.learner(LearningRate([0.3, 0.1], beyond="last"))
    stated = small.with_steps(4).learner(LearningRate([0.3, 0.1, 0.1, 0.1]))
    got, due = (one.evaluate(small.tasks, steps=4).query_losses for one in (learner, stated))
    assert torch.equal(got, due)


@given(names=st.lists(st.sampled_from(sorted(RULES)), min_size=1, max_size=3))
def test_a_chain_is_its_loop(names, place):
    """`Chain(a, b)(g)` is `b(a(g))`, states and all."""
    params, steps = problem.shapes(**place).adapted_parameters(), 2
    made, alone = ([rules.seeded_rule(RULES[name]) for name in names] for _ in range(2))

    def by_hand(members):
        """The updates of each step."""
        rows = []
        with fixed_draws():
            members = [rule.setup(params, steps) for rule in members]
            states = [rule.init(params) for rule in members]
            for index in range(steps):
                updates = noise_like(params)
                for number, rule in enumerate(members):
                    info = StepInfo(index, steps, params)
                    updates, states[number] = rule(updates, states[number], info)
                rows.append(updates)
        return rows

    for got, expected in zip(by_hand([Chain(*made)]), by_hand(alone), strict=True):
        assert_close("a chain is its loop", got, expected, within=0)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_adapt_is_its_hand_written_loop(make, place):
    """It gives the parameters of the hand-written loop θ ← θ + rule(∇ loss(θ)).

    From the same draws.
    """
    small = problem.shapes(steps=3, **place)
    steps, start, batch = small.steps, small.adapted_parameters(), small.tasks[0].support
    model = FunctionalModule(small.model(), norm_statistics="batch")

    def loss(params, batch):
        state = model.state()._replace(params=params)
        return small.loss(model(state, batch[0])[0], batch[1])

    with fixed_draws():
        rule = rules.seeded_rule(make).setup(start, steps)
        trajectory = adapt(loss, start, batch, rule=rule, steps=steps)
    with fixed_draws():
        rule = rules.seeded_rule(make).setup(start, steps)
        theta, state = dict(start), rule.init(start)
        for index in range(steps):
            leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
            grads = torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
            updates, state = rule(
                dict(zip(theta, grads, strict=True)), state, StepInfo(index, steps, theta)
            )
            theta = {name: p + updates[name] for name, p in theta.items()}
            got = trajectory.params[index + 1]
            assert_close(f"adapt is its loop, step {index}", detach(got), detach(theta), 1e-12)


@pytest.mark.parametrize(
    ("granularity", "per_step", "shapes"),
    [
        ("scalar", False, {"rate.*": ()}),
        ("scalar", True, {"rate.*": (5,)}),
        ("layer", False, {"rate.body.*": (), "rate.*": ()}),
        ("layer", True, {"rate.body.*": (5,), "rate.*": (5,)}),
        (
            "tensor",
            True,
            {"rate.body.weight": (5,), "rate.body.bias": (5,), "rate.scale": (5,)},
        ),
        (
            "parameter",
            True,
            {"rate.body.weight": (5, 3, 2), "rate.body.bias": (5, 3), "rate.scale": (5,)},
        ),
    ],
)
def test_rates_have_the_stated_names_and_shapes(granularity, per_step, shapes, place):
    rule = LearningRate(0.1, granularity=granularity, per_step=per_step, learn=True)
    rule.setup(params(**place), steps=5)
    assert {name: tuple(p.shape) for name, p in rule.named_parameters()} == shapes


def test_fixed_rates_are_buffers_and_move_with_the_module():
    rule = LearningRate(0.1).setup(params(), steps=1)
    assert not list(rule.parameters())
    assert rule.float().state_dict()["rate.*"].dtype == torch.float32


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LearningRate(float("nan")), "init is nan"),
        (
            lambda: LearningRate(0.1, granularity="tensr"),
            "granularity is 'tensr'; did you mean",
        ),
        (
            lambda: LearningRate(0.1)({"w": torch.ones(1)}, (), StepInfo(0, 1, {})),
            "LearningRate is not set up; call .setup",
        ),
        (lambda: LearningRate(0.1).setup({}, 1).setup({}, 1), "is set up already"),
        (
            lambda: (
                lslr(0.1)
                .setup({"w": torch.ones(1)}, 2)
                .forward({"w": torch.ones(1)}, (), StepInfo(2, 3, {}))
            ),
            "made for 2 inner steps, and step index 2 was asked for",
        ),
        (
            lambda: (
                lslr(0.1)
                .setup({"w": torch.ones(1)}, 2)
                .forward({"v": torch.ones(1)}, (), StepInfo(0, 2, {}))
            ),
            "set up without a rate for v",
        ),
        (
            lambda: LearningRate([0.1, "x"]),
            "init is [0.1, 'x']; it takes a finite number, a list, each a finite number or a dict",
        ),
        (
            lambda: LearningRate((0.1, 0.2)).setup(params(), 3),
            "LearningRate init has 2 rates, and the inner loop 3 steps; give one for each",
        ),
        (
            lambda: LearningRate({"body.*": 0.1}).setup(params(), 3),
            'LearningRate init has no pattern that fits scale; add one for it, or for the rest, "*"',
        ),
        (
            lambda: LearningRate({"bodi.*": 0.1, "*": 0.2}).setup(params(), 3),
            'LearningRate init does not fit: pattern "bodi.*" matches no parameter; the names are',
        ),
        (
            lambda: LearningRate({"*.bias": 0.1, "*": 0.2}, granularity="layer").setup(params(), 3),
            "gives body.weight, body.bias 2 rates, but they share one (body.*); take granularity=",
        ),
        (
            lambda: problem.regression().learner(LearningRate([0.1, -0.2, 0.1])),
            "LearningRate init is -0.2: a negative rate goes up the slope",
        ),
        (lambda: Chain(), "Chain() has no rule"),
        (lambda: Chain(LearningRate), "Chain rules[0] is the class LearningRate"),
    ],
)
def test_misuse_says_what_was_given_and_what_would_work(act, message):
    with pytest.raises(MetablocksError) as caught:
        act()
    assert message in str(caught.value)
