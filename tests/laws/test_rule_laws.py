"""Update rules, held to the laws of their protocol."""

import itertools
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks import (
    KFO,
    Adam,
    Chain,
    ClipNorm,
    LearningRate,
    MetaCurvature,
    Momentum,
    MTMask,
    Proximal,
    StepInfo,
    WeightDecay,
    lslr,
    meta_sgd,
)
from metablocks.errors import RuleError
from metablocks.laws import problem, rule_gradients, rules
from metablocks.rules import Granularity

GRANULARITIES = get_args(Granularity)
RATES = list(itertools.product(GRANULARITIES, [False, True], [False, True]))
RULES = {
    **{
        f"{granularity}{'-per_step' * per_step}{'-learned' * learn}": (
            lambda g=granularity, p=per_step, l=learn: LearningRate(
                0.3, granularity=g, per_step=p, learn=l
            )
        )
        for granularity, per_step, learn in RATES
    },
    "meta_sgd": lambda: meta_sgd(0.3),
    "lslr": lambda: lslr(0.3),
    "chain": lambda: Chain(LearningRate(-0.5), lslr(0.3), Chain(meta_sgd(-1.0))),
    "kfo": KFO,
    "kfo-hidden": lambda: KFO(hidden=1, activation="tanh", psd=True),
    "meta_curvature": MetaCurvature,
    "mt_mask": lambda: MTMask(init=50.0),  # all on: these laws start from no fixed random state
    "momentum": Momentum,
    "nesterov": lambda: Momentum(0.5, nesterov=True),
    "adam": Adam,
    "adam-beta1=0": lambda: Adam(beta1=0.0),
    "clip_norm": lambda: ClipNorm(0.5),
    "weight_decay": lambda: WeightDecay(0.1),
    "proximal": lambda: Proximal(0.5),
    "adamw": lambda: Chain(ClipNorm(1.0), Adam(), WeightDecay(0.1), LearningRate(0.3)),
}
rule_blocks = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def params(**place: Any) -> dict[str, torch.Tensor]:
    return {
        "body.weight": torch.randn(3, 2, **place),
        "body.bias": torch.randn(3, **place),
        "scale": torch.randn((), **place),
    }


@rule_blocks
def test_updates_fit_the_gradients(rule, place):
    rules.fits_the_gradients(rule, problem.shapes(**place))


@rule_blocks
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 4))
def test_first_order_is_second_order_where_the_hessian_is_zero(rule, seed, steps, place):
    rules.zero_hessian(rule, problem.shapes(seed=seed, steps=steps, **place))


@given(
    granularity=st.sampled_from(GRANULARITIES),
    per_step=st.booleans(),
    rate=st.floats(-0.3, 0.3),
    steps=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_equal_rates_are_the_scalar_rate(granularity, per_step, rate, steps, seed, place):
    small = problem.regression(seed=seed, steps=steps, **place)
    rule_gradients.equal_rates(small, granularity, per_step=per_step, rate=rate)


@given(names=st.lists(st.sampled_from(sorted(RULES)), min_size=1, max_size=3))
def test_a_chain_is_its_loop(names, place):
    rules.chain_is_its_loop([RULES[name] for name in names], problem.shapes(**place))


@rule_blocks
def test_adapt_is_its_hand_written_loop(rule, place):
    rules.adapt_is_its_loop(rule, problem.shapes(steps=3, **place))


def test_a_rate_of_minus_one_is_the_identity(place):
    rule_gradients.same_as_without(lambda: LearningRate(-1.0), problem.regression(**place))


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
        (lambda: LearningRate("fast"), "init is 'fast'; it takes a finite number"),
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
        (lambda: Chain(), "Chain() has no rule"),
        (lambda: Chain(LearningRate), "rule 0 of Chain is a type"),
    ],
)
def test_misuse_says_what_was_given_and_what_would_work(act, message):
    with pytest.raises(RuleError) as caught:
        act()
    assert message in str(caught.value)
