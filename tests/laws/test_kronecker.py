"""KFO and Meta-Curvature as transforms: the identity at first, dense Kronecker products, names."""

import copy
import dataclasses
import itertools

import kronecker_laws
import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_transforms import ADAPTS, RATE, all_transforms, problems
from torch import nn

import metablocks as mb
from metablocks import KFO, Chain, LearningRate, MetaCurvature, StepInfo
from metablocks.errors import BlockError, RuleError
from metablocks.laws import rules
from metablocks.laws.compare import assert_close, perturb
from metablocks.types import relative_error

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "gelu", "softplus"]


def tensors(place):
    return {name: torch.randn(s, **place) for name, s in problem.SHAPES.items()}


def apply(rule, gradients):
    updates, _ = rule(gradients, rule.init(gradients), StepInfo(0, 1, gradients))
    return {name: update.detach() for name, update in updates.items()}


# ---- the identity


@problems
def test_a_transform_that_adapts_is_the_rule_behind_it_for_one_step(small, place):
    rules.same_as_without(lambda: KFO(hidden=1, **ADAPTS), small(steps=1, **place), rate=RATE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_first_the_transform_is_the_identity_to_the_last_bit(activation, place):
    for make in (lambda: KFO(hidden=2, activation=activation, psd=True), MetaCurvature):
        assert rules.is_the_identity(make, problem.shapes(**place))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_where_the_gradient_is_zero_its_derivative_is_still_the_identity(activation, place):
    """A head of zeros sends exact zeros to the body: the kink of a ReLU must not cut them off."""
    small = problem.regression(**place)

    def model():
        net = small.model()
        nn.init.zeros_(net.head.weight)
        return net

    rules.same_as_without(
        lambda: KFO(hidden=2, activation=activation), dataclasses.replace(small, model=model)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("psd", [False, True])
def test_every_factor_has_a_gradient_from_the_first_meta_step_on(activation, psd, place):
    small = problem.regression(**place)
    rule = Chain(KFO(hidden=2, activation=activation, psd=psd), LearningRate(RATE))
    grads = small.learner(rule).meta_gradient(small.tasks).grads
    flat = [name for name, g in grads.items() if float(g.abs().max()) < 1e-8]
    assert not flat


# ---- against dense matrices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"psd": True},
        {"bias": False},
        {"vector_right_factor": True},
        {"vector_right_factor": True, "hidden": 1, "psd": True},
        {"hidden": 2},
        {"hidden": 1, "activation": "tanh", "psd": True},
    ],
    ids=str,
)
def test_kfo_is_a_dense_kronecker_product(options, place):
    kronecker_laws.kfo_is_a_kronecker_product(lambda: KFO(**options), problem.shapes(**place))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": 1, "activation": "tanh", "psd": True},
        {"vector_right_factor": True, "psd": True},
    ],
    ids=str,
)
@problems
def test_an_adapting_kfo_moves_its_factors_down_the_slope(options, small, place):
    kronecker_laws.kfo_adapts_down_the_slope(lambda: KFO(**options, **ADAPTS), small(**place))


def test_meta_curvature_is_a_dense_kronecker_product(place):
    kronecker_laws.curvature_is_a_kronecker_product(MetaCurvature, problem.shapes(**place))


def test_with_its_off_half_at_zero_a_hidden_layer_is_the_papers(place):
    gradient = {"w": torch.randn(3, 4, **place)}
    rule = perturb(KFO(hidden=1).setup(gradient, 1), "factors.")
    own = {key.removeprefix("factors."): p for key, p in rule.named_parameters()}
    with torch.no_grad():
        for key in ("hidden0.off.left.w", "hidden0.off.right.w", "hidden0.off.bias.w"):
            own[key].zero_()
        on = (own[f"hidden0.on.{side}.w"] for side in ("left", "right", "bias"))
        left, right, bias = on
        hidden = F.relu(left @ gradient["w"] @ right + bias)
        expected = own["left.w"] @ hidden @ own["right.w"] + own["bias.w"]
    torch.testing.assert_close(apply(rule, gradient)["w"], expected)


def released(start, loss, *, rate, right, psd, steps=3):
    """The release on one vector `[n]`, its own factors adapting, by plain autograd.

    L `[n, n]`, R `[1, 1]`; φ first, then θ, with the transform that is new, at one rate.
    """
    size, identity = len(start), {"dtype": start.dtype, "requires_grad": True}
    factors = [torch.eye(size, **identity), torch.eye(1, **identity)][: 2 if right else 1]
    theta = start
    for step in range(steps):
        value = loss(theta)
        if step:
            slopes = torch.autograd.grad(value, factors, create_graph=True)
            factors = [f - rate * slope for f, slope in zip(factors, slopes, strict=True)]
        (g,) = torch.autograd.grad(value, [theta], create_graph=True)
        sides = [f.mT @ f if psd else f for f in factors]
        moved = sides[0] @ g[:, None] @ (sides[1] if right else torch.eye(1, dtype=start.dtype))
        theta = theta - rate * moved[:, 0]
    return theta


@pytest.mark.parametrize("psd", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_a_vectors_right_factor_gives_the_trajectory_of_the_release(right, psd):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    matrix, linear = matrix @ matrix.T / 4, torch.randn(4, generator=draw, dtype=torch.float64)
    start = torch.randn(4, generator=draw, dtype=torch.float64, requires_grad=True)

    def loss(theta):
        return theta @ matrix @ theta / 2 - linear @ theta

    def end(right_factor):
        own = KFO(bias=False, psd=psd, vector_right_factor=right_factor, **ADAPTS)
        rule = Chain(own, LearningRate(RATE)).setup({"w": start}, 3)
        path = mb.adapt(lambda p, _: loss(p["w"]), {"w": start}, (), rule=rule, steps=3)
        theta = path.params[-1]["w"]
        return {"θ": theta, "meta-gradient": torch.autograd.grad(theta.exp().sum(), start)[0]}

    theta = released(start, loss, rate=RATE, right=right, psd=psd)
    due = {"θ": theta, "meta-gradient": torch.autograd.grad(theta.exp().sum(), start)[0]}
    assert_close("the release", end(right), due, 1e-14)
    assert relative_error(end(not right), due) > 1e-2


def test_an_off_half_of_zeros_adapts_away_unless_each_factor_is_the_others_slope():
    """Deviation 1: with `adapt_transform`, the layer is the paper's for one step, or for all."""
    gradients = {
        "w": torch.randn(3, 4, dtype=torch.float64),
        "v": torch.randn(3, dtype=torch.float64),
    }

    def off(**options):
        rule = KFO(hidden=1, **options, **ADAPTS).setup(gradients, 2)
        for name, factor in rule.named_parameters():
            if ".off." in name:
                factor.data.zero_()
        state = rule.init(gradients)
        for index in range(2):
            _, state = rule(gradients, state, StepInfo(index, 2, gradients))
        return {n for n, f in state.factors.items() if ".off." in n and f.any()}

    start = "hidden0.off."
    assert off(bias=False, vector_right_factor=True) == set()
    assert off(bias=False) == {f"{start}left.v"}
    assert off(vector_right_factor=True) >= {f"{start}bias.w", f"{start}bias.v"}


# ---- names, shapes, counts


def count_kfo(shape, *, bias):
    if len(shape) < 2:
        n = shape[0] if shape else 1
        return n**2 + bias * n
    if len(shape) == 2:
        return shape[0] ** 2 + shape[1] ** 2 + bias * shape[0] * shape[1]
    k = torch.Size(shape[2:]).numel()
    return shape[1] ** 2 + k**2 + bias * shape[1] * k


def count_curvature(shape):
    if len(shape) < 2:
        return shape[0] if shape else 1
    if len(shape) == 2:
        return shape[0] ** 2 + shape[1] ** 2
    return shape[0] ** 2 + shape[1] ** 2 + torch.Size(shape[2:]).numel() ** 2


@pytest.mark.parametrize("name", problem.SHAPES)
def test_there_are_as_many_numbers_as_the_docstrings_say(name, place):
    shape, own = problem.SHAPES[name], {name: tensors(place)[name]}

    def count(rule):
        return sum(p.numel() for p in rule.setup(own, 1).parameters())

    assert count(MetaCurvature()) == count_curvature(shape)
    for hidden, bias in itertools.product([0, 2], [False, True]):
        expected = (2 * hidden + 1) * count_kfo(shape, bias=bias)
        assert count(KFO(hidden=hidden, bias=bias)) == expected


def test_factors_are_named_after_what_they_serve_and_only_adapted_parameters_have_some(device):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    blocks = {"loss": F.mse_loss, "steps": 1}
    shapes = {
        "rule.rules.0.factors.left.0.weight": (2, 2),
        "rule.rules.0.factors.right.0.weight": (9, 9),
        "rule.rules.0.factors.bias.0.weight": (2, 9),
        "rule.rules.0.factors.left.1.weight": (3, 3),
        "rule.rules.0.factors.bias.1.weight": (3,),
    }
    blocks["rule"] = mb.Chain(KFO(), mb.LearningRate(0.1))
    learner = mb.MetaLearner(model.to(device), adapt=["0.weight", "1.weight"], **blocks)
    own = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert {name: s for name, s in own.items() if name.startswith("rule.")} == shapes
    blocks["rule"] = mb.Chain(MetaCurvature(), mb.LearningRate(0.1))
    learner = mb.MetaLearner(model.to(device), adapt="3.*", **blocks)
    own = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert {name: s for name, s in own.items() if name.startswith("rule.")} == {
        "rule.rules.0.factors.out.3.weight": (2, 2),
        "rule.rules.0.factors.in.3.weight": (12, 12),
        "rule.rules.0.factors.scale.3.bias": (2,),
    }


@all_transforms
def test_names_and_values_survive_a_state_dict(make, place):
    small = problem.classification(**place)
    trained = perturb(small.learner(Chain(make(), LearningRate(RATE))), "factors.")
    fresh = small.learner(Chain(make(), LearningRate(RATE)))
    fresh.load_state_dict(trained.state_dict())
    got, expected = fresh.meta_gradient(small.tasks), trained.meta_gradient(small.tasks)
    assert_close("state dict", got.grads, expected.grads, within=0)


def test_frozen_parameters_get_no_factors():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    for rule in (KFO(), MetaCurvature()):
        assert not list(rule.setup({"w": frozen}, 1).parameters())


def test_under_autocast_updates_keep_their_precision():
    own = {"w": torch.randn(3, 3), "c": torch.randn(2, 3, 2, 2)}
    for rule in (KFO(hidden=1), MetaCurvature()):
        rule.setup(own, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            updates = apply(rule, own)
        assert all(torch.equal(updates[name], g) for name, g in own.items())


# ---- errors


def adapting(rule=None, **blocks):
    own = KFO(**ADAPTS)
    rule = rule(own) if rule else Chain(own, LearningRate(RATE))
    return problem.regression().learner(rule, **blocks)


def test_a_transform_that_adapts_takes_its_rate_in_nested_chains_too():
    adapting(lambda own: Chain(Chain(own), Chain(LearningRate(RATE, granularity="tensor"))))


@pytest.mark.parametrize(
    ("error", "act", "message"),
    [
        (RuleError, lambda: KFO(hidden=-1), "KFO hidden is -1; it takes a whole number, 0 or more"),
        (RuleError, lambda: KFO(hidden=True), "KFO hidden is True"),
        (RuleError, lambda: KFO(activation="rleu"), 'did you mean "relu"'),
        (RuleError, lambda: KFO(rate=0.1), "which only adapt_transform=True reads"),
        (RuleError, lambda: KFO(adapt_transform=True), "rate is None; with adapt_transform it"),
        (RuleError, lambda: KFO(adapt_transform=True, rate=float("inf")), "rate is inf"),
        (RuleError, lambda: KFO().setup({}, 1).setup({}, 1), "this KFO is set up already"),
        (
            RuleError,
            lambda: MetaCurvature().setup({}, 1).setup({}, 1),
            "this MetaCurvature is set up already",
        ),
        (
            RuleError,
            lambda: KFO().setup({"a.w": torch.ones((1,) * 6)}, 1),
            "KFO has no factors for a.w, a tensor of shape [1, 1, 1, 1, 1, 1]",
        ),
        (
            RuleError,
            lambda: MetaCurvature().setup({"a.w": torch.ones((1,) * 6)}, 1),
            "MetaCurvature has no factors for a.w",
        ),
        (RuleError, lambda: apply(KFO(), {"w": torch.ones(1)}), "KFO is not set up; call .setup"),
        (RuleError, lambda: KFO(**ADAPTS).init({}), "KFO is not set up"),
        (RuleError, lambda: apply(MetaCurvature(), {}), "MetaCurvature is not set up"),
        (
            RuleError,
            lambda: apply(KFO().setup({"w": torch.ones(1)}, 1), {"v": torch.ones(1)}),
            "KFO was set up without a transform for v",
        ),
        (
            RuleError,
            lambda: apply(MetaCurvature().setup({}, 1), {"v": torch.ones(1)}),
            "MetaCurvature was set up without a transform for v",
        ),
        (BlockError, lambda: adapting(lambda own: own), "given KFO, or another rate"),
        (
            BlockError,
            lambda: adapting(lambda own: Chain(own, LearningRate(0.3))),
            "must be Chain(KFO(adapt_transform=True, rate=0.2), LearningRate(0.2)) and nothing else",
        ),
        (
            BlockError,
            lambda: adapting(lambda own: Chain(own, LearningRate(RATE, learn=True))),
            "nothing else; given KFO, LearningRate",
        ),
        (
            BlockError,
            lambda: adapting(lambda own: Chain(MetaCurvature(), own, LearningRate(RATE))),
            "given MetaCurvature, KFO, LearningRate",
        ),
        (
            BlockError,
            lambda: adapting(order=mb.FirstOrder()),
            "the order FirstOrder() is first-order at step 0 of epoch 0",
        ),
        (
            BlockError,
            lambda: adapting(order=mb.TruncatedOrder(last=2)),
            "TruncatedOrder(last=2) is first-order at step 0",
        ),
        (
            BlockError,
            lambda: adapting(order=mb.AnnealedOrder(first_order_epochs=3)),
            "AnnealedOrder(first_order_epochs=3) is first-order at step 0 of epoch 0",
        ),
        (
            BlockError,
            lambda: adapting(order=lambda step, steps, progress: progress.epoch < 7),
            "is first-order at step 0 of epoch 7",
        ),
    ],
)
def test_misuse_says_what_was_given_and_what_would_work(error, act, message):
    with pytest.raises(error) as caught:
        act()
    assert message in str(caught.value)


def test_a_transform_that_adapts_keeps_its_parameters_as_they_are():
    learner = perturb(adapting(), "factors.")
    before = copy.deepcopy(dict(learner.named_parameters()))
    learner.evaluate(problem.regression().tasks)
    learner.meta_gradient(problem.regression().tasks)
    assert_close("untouched", dict(learner.named_parameters()), before, within=0)
