"""Optimisers, clipping and decay in a task: the steps of `torch.optim`, finite slopes, learned β."""

import pytest
import small_problems as problem
import torch

from metablocks import (
    Adagrad,
    Adam,
    Adamax,
    Chain,
    ClipNorm,
    LearningRate,
    Momentum,
    Proximal,
    RMSprop,
    StepInfo,
    Vmap,
    WeightDecay,
    adapt,
)
from metablocks.errors import RuleError
from metablocks.laws import gradients, rules
from metablocks.laws.compare import assert_close

STEPS, RATE = 6, 0.1


def loss(params, batch):
    hidden = (batch @ params["one"]).tanh()
    return (hidden @ params["two"]).square().mean() + params["two"].exp().mean()


def start():
    draw = torch.Generator().manual_seed(0)
    return {
        "one": torch.randn(3, 4, generator=draw, dtype=torch.float64),
        "two": torch.randn(4, 2, generator=draw, dtype=torch.float64),
    }


BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_rule(rule):
    rule = Chain(*rule, LearningRate(RATE)).setup(start(), STEPS)
    return adapt(loss, start(), BATCH, rule=rule, steps=STEPS).params


def by_torch(make, clip=None):
    """The oracle: an optimiser of `torch.optim`, and `torch.nn.utils.clip_grad_norm_`."""
    params = {name: torch.nn.Parameter(p) for name, p in start().items()}
    optimizer, rows = make(params.values(), lr=RATE), [start()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(params, BATCH).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        rows.append({name: p.detach().clone() for name, p in params.items()})
    return rows


@pytest.mark.parametrize(
    ("rule", "optimizer", "clip", "within"),
    [
        ([Momentum(0.9)], {"momentum": 0.9}, None, 1e-14),
        ([Momentum(0.0)], {}, None, 1e-14),
        ([Momentum(0.5, nesterov=True)], {"momentum": 0.5, "nesterov": True}, None, 1e-14),
        ([WeightDecay(0.3)], {"weight_decay": 0.3}, None, 1e-14),
        ([WeightDecay(0.3), Momentum(0.8)], {"weight_decay": 0.3, "momentum": 0.8}, None, 1e-14),
        ([ClipNorm(0.2)], {}, 0.2, 1e-6),  # torch adds 1e-6 to the norm
        ([ClipNorm(1e3)], {}, 1e3, 1e-14),
    ],
)
def test_sgd_takes_the_steps_of_torch(rule, optimizer, clip, within):
    expected = by_torch(lambda params, lr: torch.optim.SGD(params, lr=lr, **optimizer), clip)
    for got, due in zip(by_rule(rule), expected, strict=True):
        assert_close("torch.optim.SGD", got, due, within)


def test_proximal_minimises_the_loss_and_the_distance_to_the_start():
    def penalised(params, batch):
        gaps = [(params[name] - p).square().sum() for name, p in start().items()]
        return loss(params, batch) + 0.7 / 2 * sum(gaps)

    rate = LearningRate(RATE).setup(start(), STEPS)
    due = adapt(penalised, start(), BATCH, rule=rate, steps=STEPS).params
    for got, expected in zip(by_rule([Proximal(0.7)]), due, strict=True):
        assert_close("proximal", got, expected, 1e-14)


@pytest.mark.parametrize(
    ("rule", "optimizer", "options"),
    [
        ([Adam()], torch.optim.Adam, {}),
        ([Adam(beta1=0.0)], torch.optim.Adam, {"betas": (0.0, 0.999)}),
        ([Adam(beta1=0.5, beta2=0.9)], torch.optim.Adam, {"betas": (0.5, 0.9)}),
        ([Adam(), WeightDecay(0.3)], torch.optim.AdamW, {"weight_decay": 0.3}),
        ([Adamax()], torch.optim.Adamax, {}),
        ([Adamax(beta1=0.5, beta2=0.6)], torch.optim.Adamax, {"betas": (0.5, 0.6)}),
        ([RMSprop()], torch.optim.RMSprop, {}),
        ([RMSprop(beta=0.5), Momentum(0.8)], torch.optim.RMSprop, {"alpha": 0.5, "momentum": 0.8}),
        ([Adagrad()], torch.optim.Adagrad, {}),
        ([Adagrad(initial=0.3)], torch.optim.Adagrad, {"initial_accumulator_value": 0.3}),
    ],
    ids=lambda value: repr(value) if isinstance(value, list) else None,
)
def test_they_take_the_steps_of_torch_where_eps_is_small(rule, optimizer, options):
    expected = by_torch(lambda params, lr: optimizer(params, lr=lr, eps=1e-12, **options))
    rule[0].eps = 1e-12
    for got, due in zip(by_rule(rule), expected, strict=True):
        assert_close(optimizer.__name__, got, due, 1e-8)


def test_adam_differs_from_torch_by_its_eps_alone():
    """The oracle is the equation of Kingma and Ba with m̂ / √(v̂ + eps²), at an eps that counts."""
    eps, (beta1, beta2), theta = 0.1, (0.9, 0.999), start()
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}
    got = by_rule([Adam(eps=eps)])
    for count in range(1, STEPS + 1):
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        loss(leaves, BATCH).backward()
        for name, leaf in leaves.items():
            first[name] = first[name].lerp(leaf.grad, 1 - beta1)
            second[name] = second[name].lerp(leaf.grad**2, 1 - beta2)
            root = (second[name] / (1 - beta2**count) + eps**2) ** 0.5
            theta[name] = theta[name] - RATE * first[name] / (1 - beta1**count) / root
        assert_close("Adam", got[count], theta, 1e-14)


STATEFUL = {
    "momentum": lambda: Momentum(),
    "nesterov": lambda: Momentum(nesterov=True),
    "adam": lambda: Adam(),
    "adam-beta1=0": lambda: Adam(beta1=0.0),
    "adamax": lambda: Adamax(),
    "rmsprop": lambda: RMSprop(),
    "adagrad": lambda: Adagrad(),
    "clip_norm": lambda: ClipNorm(0.1),
    "weight_decay": lambda: WeightDecay(0.1),
    "proximal": lambda: Proximal(0.5),
}
all_rules = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())


@all_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_are_finite_at_gradients_of_exactly_zero(make, dtype):
    """Second order through a step at which a gradient vanishes and its Hessian does not."""
    rule = Chain(make(), LearningRate(RATE)).setup({"w": torch.zeros(3, dtype=dtype)}, 2)

    def outcome(w):
        trajectory = adapt(
            lambda params, batch: params["w"].square().sum(), {"w": w}, (), rule=rule, steps=2
        )
        return (trajectory.params[-1]["w"] - 1).square().sum()

    for w in (torch.zeros(3, dtype=dtype), torch.tensor([0.0, 1.0, -2.0], dtype=dtype)):
        slope = torch.func.grad(outcome)(w)
        assert slope.isfinite().all()
        assert (slope != 0).all()


@all_rules
def test_a_net_with_a_dead_parameter_has_a_finite_meta_gradient(make, place):
    """Behind a zero head, the body's gradient is exactly zero at first."""
    small = problem.regression(**place)
    learner = small.learner(Chain(make(), LearningRate(0.01)), executor=Vmap())
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            if name.startswith("head"):
                p.zero_()
    result = learner.meta_gradient(small.tasks)
    assert result.nonfinite is None
    assert any(bool(grad.any()) for grad in result.grads.values())


# ---- learned hyper-parameters

LEARNED = {
    "momentum": (lambda **o: Momentum(0.8, **o), ["momentum"]),
    "nesterov": (lambda **o: Momentum(0.8, nesterov=True, **o), ["momentum"]),
    "adam": (lambda **o: Adam(beta2=0.9, eps=0.1, **o), ["beta1", "beta2"]),
    "adamax": (lambda **o: Adamax(beta2=0.6, eps=0.1, **o), ["beta1", "beta2"]),
    "rmsprop": (lambda **o: RMSprop(beta=0.9, eps=0.1, **o), ["beta"]),
    "weight_decay": (lambda **o: WeightDecay(0.3, **o), ["decay"]),
}


@pytest.mark.parametrize(("make", "names"), LEARNED.values(), ids=LEARNED.keys())
def test_a_learned_hyper_parameter_begins_as_the_number_and_has_its_slope(make, names, device64):
    """The trajectory is that of the number; the gradient is the finite differences'."""
    for got, due in zip(by_rule([make(learn=True)]), by_rule([make()]), strict=True):
        assert_close("learned at first", got, due, 1e-12)
    small = problem.regression(tasks=2, steps=3, device=device64)
    learner = small.learner(Chain(make(learn=True), LearningRate(0.1)))
    learned = [f"rule.rules.0.{name}" for name in names]
    assert [name for name, _ in learner.named_parameters() if name.startswith("rule")] == learned
    assert all(bool(learner.meta_gradient(small.tasks).grads[name]) for name in learned)
    gradients.finite_differences(learner, small.tasks)
    rules.one_gradient(lambda: make(learn=True), small)


def test_hyper_parameters_learned_in_half_precision_are_kept_in_float32():
    """0.999 is 1 in bfloat16, from which its logit does not come back."""
    rule = Adam(learn=True).setup({"w": torch.zeros(2, dtype=torch.bfloat16)}, 1)
    assert rule.beta2.dtype == torch.float32
    assert float(rule.beta2.detach().sigmoid()) == pytest.approx(0.999, abs=1e-6)
    assert repr(rule) == "Adam(beta1=learned, beta2=learned, eps=1e-08, learn=True)"


def test_an_outer_step_moves_what_is_learned(place):
    small = problem.regression(**place)
    learner = small.learner(Chain(WeightDecay(0.1, learn=True), LearningRate(0.1)))
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    before = learner.meta_gradient(small.tasks).loss
    learner.backward(small.tasks)
    optimizer.step()
    decay = float(learner.rule.rules[0].decay.detach().exp())
    assert decay > 0
    assert decay != pytest.approx(0.1)
    assert learner.meta_gradient(small.tasks).loss < before


def test_the_norm_is_of_all_parameters_together():
    gradients = {"a": torch.full((3,), 2.0), "b": torch.full((), 2.0)}
    updates, _ = ClipNorm(1.0)(gradients, (), StepInfo(0, 1, {}))
    for update in updates.values():
        assert torch.allclose(update, torch.full_like(update, 0.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Momentum(0.0),
        lambda: ClipNorm(1e9),
        lambda: WeightDecay(0.0),
        lambda: Proximal(0.0),
    ],
)
def test_at_their_identity_they_are_the_learner_without(make, place):
    rules.same_as_without(make, problem.classification(**place))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: Momentum(1.0),
            "Momentum momentum is 1.0; it takes a finite number at least 0 and",
        ),
        (lambda: Momentum("fast"), "Momentum momentum is 'fast'"),
        (lambda: Momentum(0.0, nesterov=True), "nesterov is True, but momentum is 0"),
        (
            lambda: Adam(beta1=-0.1),
            "Adam beta1 is -0.1; it takes a finite number at least 0 and be",
        ),
        (lambda: Adam(beta2=1), "Adam beta2 is 1;"),
        (lambda: Adam(eps=0.0), "Adam eps is 0.0; it takes a finite number at least 1e-12"),
        (
            lambda: Momentum(0.0, learn=True),
            "Momentum learn is True, but momentum is 0, whose logarithm is not finite",
        ),
        (lambda: Adam(beta1=0.0, learn=True), "Adam learn is True, but beta1 is 0"),
        (lambda: WeightDecay(0.0, learn=True), "WeightDecay learn is True, but decay is 0"),
        (
            lambda: RMSprop(learn=True).setup(start(), 1).setup(start(), 1),
            "this RMSprop is set up already",
        ),
        (lambda: RMSprop(beta=1.0), "RMSprop beta is 1.0;"),
        (lambda: Adagrad(initial=-1.0), "Adagrad initial is -1.0;"),
        (lambda: Adamax(eps=0.0), "Adamax eps is 0.0; it takes a finite number at least 1e-12"),
        (lambda: ClipNorm(0), "ClipNorm max_norm is 0; it takes a finite number above 0"),
        (lambda: ClipNorm(True), "ClipNorm max_norm is True"),
        (
            lambda: WeightDecay(-1.0),
            "WeightDecay decay is -1.0; it takes a finite number at least 0",
        ),
        (lambda: WeightDecay(float("inf")), "WeightDecay decay is inf"),
        (lambda: Proximal(-2.0), "Proximal strength is -2.0; it takes a finite number at least 0"),
    ],
)
def test_misuse_says_what_was_given_and_what_would_work(act, message):
    with pytest.raises(RuleError) as caught:
        act()
    assert message in str(caught.value)
