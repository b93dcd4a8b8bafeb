"""Rules and conjugate gradients on complex parameters, and on parameters of several precisions.

A complex number is a pair of real ones, in `torch.optim` and here. The oracles are `torch.optim`, loops
in plain autograd whose parameters are the real and imaginary parts, and dense real systems.
"""

import pytest
import torch
from torch import Tensor, nn

import metablocks as mb
from metablocks import (
    KFO,
    Adagrad,
    Adam,
    Adamax,
    Chain,
    ClipNorm,
    LearningRate,
    MetaCurvature,
    Momentum,
    MTMask,
    Proximal,
    RMSprop,
    StepInfo,
    WeightDecay,
    adapt,
)
from metablocks.errors import RuleError
from metablocks.estimators.conjugate_gradient import conjugate_gradient
from metablocks.laws.compare import assert_close

STEPS, RATE, EPS = 3, 0.1, 1e-3
WITHIN = 1e-12  # some hundred operations in float64, and the derivative of three steps


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start():
    """A complex matrix and vector among real ones, the complex one first."""
    return {
        "body.mix": draw(3, 4, seed=0, dtype=torch.complex128),
        "body.shift": draw(4, seed=1, dtype=torch.complex128),
        "head.weight": draw(2, 4, seed=2),
        "head.bias": draw(2, seed=3),
    }


def loss(params, batch):
    hidden = batch.to(torch.complex128) @ params["body.mix"] + params["body.shift"]
    hidden = hidden.real.tanh() + (0.5 * hidden.imag).sin()
    return (hidden @ params["head.weight"].T + params["head.bias"]).square().mean()


BATCH, QUERY = draw(5, 3, seed=4), draw(5, 3, seed=5)


def pairs(params):
    """Real leaves: the real and imaginary parts, by name."""
    return {
        name: (torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_()
        for name, p in params.items()
    }


def joined(parts):
    return {
        name: torch.view_as_complex(p) if name.startswith("body") else p
        for name, p in parts.items()
    }


def by_hand(direction, parts, rate):
    """θ ← θ − α u(g), in real numbers, by plain autograd; `direction` is u, with a memory of its own."""
    theta, memory = dict(parts), {}
    rows = [theta]
    for count in range(1, STEPS + 1):
        value = loss(joined(theta), BATCH)
        slopes = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        gradients = dict(zip(theta, slopes, strict=True))
        moves = direction(gradients, theta, memory, parts, count)
        theta = {name: p - rate * moves[name] for name, p in theta.items()}
        rows.append(theta)
    return rows


def momentum(g, theta, memory, begin, count):
    for n in g:
        memory[n] = 0.8 * memory.get(n, 0) + g[n]
    return dict(memory)


def adam(g, theta, memory, begin, count):
    moves = {}
    for n in g:
        m, v = memory.get(n, (0, 0))
        memory[n] = m, v = 0.9 * m + 0.1 * g[n], 0.999 * v + 0.001 * g[n] ** 2
        moves[n] = m / (1 - 0.9**count) / (v / (1 - 0.999**count) + EPS**2) ** 0.5
    return moves


def clip(g, theta, memory, begin, count):
    norm = torch.cat([x.flatten() for x in g.values()]).norm()
    return {n: x * 0.1 / norm for n, x in g.items()}


ELEMENTWISE = {
    "none": ([], lambda g, *_: g),
    "momentum": ([Momentum(0.8)], momentum),
    "adam": ([Adam(eps=EPS)], adam),
    "clip_norm": ([ClipNorm(0.1)], clip),
    "weight_decay": ([WeightDecay(0.3)], lambda g, at, *_: {n: g[n] + 0.3 * at[n] for n in g}),
    "proximal": (
        [Proximal(0.7)],
        lambda g, at, memory, begin, _: {n: g[n] + 0.7 * (at[n] - begin[n]) for n in g},
    ),
}


@pytest.mark.parametrize("granularity", ["scalar", "layer", "tensor", "parameter"])
@pytest.mark.parametrize("case", ELEMENTWISE)
def test_trajectory_and_meta_gradient_are_those_of_the_pairs_of_real_numbers(case, granularity):
    rules, direction = ELEMENTWISE[case]
    params = {name: p.requires_grad_() for name, p in start().items()}
    rate = LearningRate(RATE, granularity=granularity, learn=True)
    rule = Chain(*rules, rate).setup(params, STEPS)
    got = adapt(loss, params, BATCH, rule=rule, steps=STEPS).params
    parts, alpha = pairs(params), torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    due = by_hand(direction, parts, alpha)
    for one, other in zip(got, due, strict=True):
        assert_close("trajectory", pairs(one), other, WITHIN)

    learned = dict(rule.named_parameters())
    leaves = list(params.values()), list(learned.values())
    grads = torch.autograd.grad(loss(got[-1], QUERY), [*leaves[0], *leaves[1]])
    expected = torch.autograd.grad(loss(joined(due[-1]), QUERY), [*parts.values(), alpha])
    own = dict(zip(params, grads, strict=False))
    assert_close("θ", pairs(own), dict(zip(parts, expected, strict=False)), WITHIN)
    rates = grads[len(params) :]
    assert {g.dtype for g in rates} == {torch.float64}
    whole = {"α": torch.stack([g.sum() for g in rates]).sum()}  # the sum is the scalar's gradient
    assert_close("α", whole, {"α": expected[-1]}, WITHIN)


@pytest.mark.parametrize(
    ("rule", "optimizer", "options", "within"),
    [
        ([], torch.optim.SGD, {}, 1e-14),
        ([Momentum(0.9)], torch.optim.SGD, {"momentum": 0.9}, 1e-14),
        (
            [WeightDecay(0.3), Momentum(0.8, nesterov=True)],
            torch.optim.SGD,
            {"weight_decay": 0.3, "momentum": 0.8, "nesterov": True},
            1e-14,
        ),
        # √v̂ is some 1e8 times eps, whose place, inside the root or outside, is the difference.
        ([Adam(eps=1e-10)], torch.optim.Adam, {"eps": 1e-10}, 1e-8),
        (
            [Adam(beta1=0.5, beta2=0.9, eps=1e-10)],
            torch.optim.Adam,
            {"eps": 1e-10, "betas": (0.5, 0.9)},
            1e-8,
        ),
        (
            [Adam(eps=1e-10), WeightDecay(0.3)],
            torch.optim.AdamW,
            {"eps": 1e-10, "weight_decay": 0.3},
            1e-8,
        ),
        ([ClipNorm(0.2)], torch.optim.SGD, {}, 1e-5),  # torch adds 1e-6 to the norm
    ],
)
def test_the_steps_are_those_of_torch_optim(rule, optimizer, options, within):
    theta = {name: nn.Parameter(p) for name, p in start().items()}
    theirs = optimizer(theta.values(), lr=RATE, **options)
    chain = Chain(*rule, LearningRate(RATE)).setup(start(), 6)
    for got in adapt(loss, start(), BATCH, rule=chain, steps=6).params[1:]:
        theirs.zero_grad()
        loss(theta, BATCH).backward()
        if isinstance(chain.rules[0], ClipNorm):
            torch.nn.utils.clip_grad_norm_(theta.values(), 0.2)
        theirs.step()
        assert_close("torch.optim", pairs(got), pairs(theta), within)


# ---- learned transforms and masks


def moved(rule, params):
    """The rule, set up and off the identity, and its factors by name."""
    rule.setup(params, STEPS)
    factors = {name.removeprefix("factors."): p for name, p in rule.named_parameters()}
    for seed, p in enumerate(factors.values()):
        p.data.add_(0.2 * draw(*p.shape, seed=seed, dtype=p.dtype))
    return rule, factors


def kfo(factors, g):
    products = {}
    for n, x in g.items():
        left, right = factors[f"left.{n}"], factors.get(f"right.{n}")
        products[n] = left @ x + factors[f"bias.{n}"]
        if right is not None:
            products[n] = left @ x @ right + factors[f"bias.{n}"]
    return products


def kfo_psd(factors, g):
    square = {n: f if n.startswith("bias.") else f.mH @ f for n, f in factors.items()}
    return kfo(square, g)


def curvature(factors, g):
    return {
        n: factors[f"scale.{n}"] * x
        if x.ndim == 1
        else factors[f"out.{n}"] @ x @ factors[f"in.{n}"]
        for n, x in g.items()
    }


TRANSFORMS = {
    "kfo": (KFO, kfo),
    "kfo-psd": (lambda: KFO(psd=True), kfo_psd),
    "meta_curvature": (MetaCurvature, curvature),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_are_matrix_products_of_complex_numbers(case):
    """Trajectory and meta-gradient, of θ and of the factors, against a loop in plain autograd."""
    make, product = TRANSFORMS[case]
    params = {name: p.requires_grad_() for name, p in start().items()}
    transform, factors = moved(make(), params)
    assert {f.dtype for n, f in factors.items() if "body" in n} == {torch.complex128}
    rule = Chain(transform, LearningRate(RATE))
    rule.rules[1].setup(params, STEPS)
    got = adapt(loss, params, BATCH, rule=rule, steps=STEPS).params[-1]
    theta = dict(params)
    for _ in range(STEPS):
        value = loss(theta, BATCH)
        slopes = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        moves = product(factors, dict(zip(theta, slopes, strict=True)))
        theta = {n: p - RATE * moves[n] for n, p in theta.items()}
    assert_close("trajectory", pairs(got), pairs(theta), WITHIN)
    leaves = {**params, **factors}
    one, other = (
        dict(zip(leaves, torch.autograd.grad(loss(end, QUERY), list(leaves.values())), strict=True))
        for end in (got, theta)
    )
    assert_close("meta-gradient", pairs(one), pairs(other), WITHIN)


def test_a_psd_transform_never_turns_a_complex_gradient_around():
    g = {name: p.detach() for name, p in start().items()}
    transform, _ = moved(KFO(psd=True, bias=False), g)
    for n, u in transform(g, (), StepInfo(0, 1, g))[0].items():
        assert float((g[n].conj() * u.detach()).real.sum()) > 0


def test_complex_factors_adapt_down_the_slope():
    """φ ← φ − α ∂L_s(θ)/∂φ, by plain autograd through θ = θ_0 − α (L g R)."""
    params = {"body.mix": start()["body.mix"].requires_grad_()}
    rest = {n: p for n, p in start().items() if n != "body.mix"}

    def own(params, batch):
        return loss({**rest, **params}, batch)

    transform, factors = moved(KFO(bias=False, adapt_transform=True, rate=RATE), params)
    rule = Chain(transform, LearningRate(RATE))
    rule.rules[1].setup(params, STEPS)
    got = adapt(own, params, BATCH, rule=rule, steps=STEPS).params[-1]["body.mix"]
    left, right = factors["left.body.mix"], factors["right.body.mix"]
    theta = params["body.mix"]
    for step in range(STEPS):
        value = own({"body.mix": theta}, BATCH)
        if step:
            slopes = torch.autograd.grad(value, [left, right], create_graph=True)
            left, right = left - RATE * slopes[0], right - RATE * slopes[1]
        (g,) = torch.autograd.grad(value, [theta], create_graph=True)
        theta = theta - RATE * (left @ g @ right)
    assert_close("adapts", pairs({"w": got}), pairs({"w": theta}), WITHIN)


def test_a_kfo_with_hidden_layers_refuses_complex_parameters_by_name():
    with pytest.raises(RuleError, match=r"hidden is 2, but body.mix is torch.complex128.*hidden=0"):
        KFO(hidden=2).setup(start(), 1)


def test_a_mask_is_real_and_lets_units_of_complex_layers_through():
    params = {"fc.weight": start()["body.mix"], "fc.bias": draw(3, seed=0).float()}
    rule = MTMask().setup(params, 1)
    (logit,) = rule.parameters()
    assert logit.dtype == torch.float64
    state = rule.init(params)
    updates, _ = rule(params, state, StepInfo(0, 1, params))
    (mask,) = state.values()
    assert torch.equal(updates["fc.weight"], mask[:, None] * params["fc.weight"])
    (g,) = torch.autograd.grad(updates["fc.weight"].abs().square().sum(), [logit])
    assert g.dtype == torch.float64
    assert g.any()


# ---- precisions


MIXED = {
    "a.low": torch.bfloat16,
    "a.middle": torch.float32,
    "a.high": torch.float64,
    "b.pair": torch.complex64,
    "b.pairs": torch.complex128,
}
RULES = {
    "rate": lambda: LearningRate(0.1, learn=True),
    "layer": lambda: LearningRate(0.1, granularity="layer", per_step=True),
    "tensor": lambda: LearningRate(0.1, granularity="tensor"),
    "parameter": lambda: LearningRate(0.1, granularity="parameter"),
    "momentum": lambda: Momentum(nesterov=True),
    "adam": lambda: Adam(),
    "adamax": lambda: Adamax(learn=True),
    "rmsprop": lambda: RMSprop(learn=True),
    "adagrad": lambda: Adagrad(),
    "clip_norm": lambda: ClipNorm(0.1),
    "weight_decay": lambda: WeightDecay(0.1, learn=True),
    "proximal": lambda: Proximal(0.1),
    "kfo": lambda: KFO(psd=True),
    "kfo-adapt": lambda: KFO(adapt_transform=True, rate=0.1),
    "meta_curvature": MetaCurvature,
    "mask": lambda: MTMask(init=1.0),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_updates_have_the_dtypes_of_their_parameters_whichever_comes_first(make, shape, backwards):
    names = list(MIXED)[::-1] if backwards else list(MIXED)
    params = {name: draw(*shape, seed=0).to(MIXED[name]) for name in names}
    rule = make().setup(params, 2)
    state = rule.init(params)
    for index in range(2):
        updates, state = rule(params, state, StepInfo(index, 2, params))
        assert {name: u.dtype for name, u in updates.items()} == MIXED
        assert {u.shape for u in updates.values()} == {torch.Size(shape)}


def test_a_shared_rate_is_as_precise_as_the_most_precise_it_serves():
    params = {"a.one": torch.ones(1), "b.two": torch.ones(1, dtype=torch.complex128)}
    (rate,) = LearningRate(0.1, learn=True).setup(params, 1).parameters()
    assert rate.dtype == torch.float64
    layers = LearningRate(0.1, learn=True, granularity="layer").setup(params, 1)
    assert [p.dtype for p in layers.parameters()] == [torch.float32, torch.float64]
    narrow = {"w": torch.ones(1, dtype=torch.float64), "v": torch.ones(1, dtype=torch.float16)}
    with pytest.raises(RuleError, match="100000 is out of range"):
        LearningRate(1e5).setup(narrow, 1)


@pytest.mark.parametrize("make", [lambda: Adam(), lambda: ClipNorm(0.1)])
def test_at_a_gradient_of_exactly_zero_the_slopes_are_finite(make):
    zero = {"w": torch.zeros(2, dtype=torch.complex128, requires_grad=True)}
    rule = make()
    updates, _ = rule(zero, rule.init(zero), StepInfo(0, 1, zero))
    (first,) = torch.autograd.grad((updates["w"] + 1).abs().square().sum(), zero["w"])
    assert first.isfinite().all()


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_tasks_under_vmap_are_the_tasks_one_by_one(make):
    params = start()
    rules = [make()] if "Learning" in repr(make()) else [make(), LearningRate(RATE)]
    rule = Chain(*rules).setup(params, STEPS)
    batches = torch.stack([BATCH, QUERY])

    def meta_gradient(batch):
        def end(theta):
            torch.manual_seed(0)
            return loss(adapt(loss, theta, batch, rule=rule, steps=STEPS).params[-1], QUERY)

        return torch.func.grad(end)(params)

    together = torch.func.vmap(meta_gradient, randomness="same")(batches)
    for row in range(2):
        alone = meta_gradient(batches[row])
        got = {name: g[row] for name, g in together.items()}
        assert_close("vmap", pairs(got), pairs(alone), WITHIN)


# ---- conjugate gradients, and the implicit gradient


def hermitian(size, seed):
    factor = draw(size, size, seed=seed, dtype=torch.complex128)
    return factor @ factor.mH + torch.eye(size, dtype=torch.complex128)


def test_conjugate_gradients_solve_hermitian_systems():
    matrices = torch.stack([hermitian(4, seed) for seed in range(3)])
    target = draw(4, seed=9, dtype=torch.complex128)

    def solve(matrix):
        product = lambda x: {"x": matrix @ x["x"], "y": 2 * x["y"]}  # noqa: E731
        b = {"x": target, "y": torch.ones(2, dtype=torch.float64)}
        return conjugate_gradient(product, b, steps=12, tolerance=0.0)

    together = torch.func.vmap(solve)(matrices)
    expected = torch.linalg.solve(matrices, target.expand(3, 4))
    assert_close("x", pairs({"body": together.vector["x"]}), pairs({"body": expected}), 1e-10)
    assert together.residual.dtype == torch.float64
    assert float(together.residual.max()) < 1e-10


def test_conjugate_gradients_solve_what_is_linear_in_real_numbers_alone():
    """A Hessian in real and imaginary parts is symmetric, and no complex matrix."""
    factor = draw(6, 6, seed=0)
    matrix, target = factor @ factor.T + torch.eye(6, dtype=torch.float64), draw(3, 2, seed=1)

    def product(x):
        real = torch.view_as_real(x["x"]).flatten()
        return {"x": torch.view_as_complex((matrix @ real).reshape(3, 2))}

    b = {"x": torch.view_as_complex(target)}
    got = conjugate_gradient(product, b, steps=8, tolerance=0.0).vector["x"]
    expected = torch.linalg.solve(matrix, target.flatten()).reshape(3, 2)
    assert_close("x", {"x": torch.view_as_real(got)}, {"x": expected}, 1e-10)


class _Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(draw(3, seed=0, dtype=torch.complex128))

    def forward(self, matrix: Tensor) -> Tensor:
        return torch.stack([matrix @ self.theta, self.theta])


def quadratic_loss(prediction, target):
    """½ ⟨θ, A θ⟩ − Re ⟨b, θ⟩, whose gradient is A θ − b."""
    product, theta = prediction
    return (theta.conj() * product).real.sum() / 2 - (target.conj() * theta).real.sum()


def test_the_implicit_gradient_of_a_complex_quadratic_is_its_closed_form():
    """λ (A + λI)⁻¹ (C φ* − d), φ* = (A + λI)⁻¹ (b + λθ)."""
    strength, model = 2.0, _Quadratic()
    (a, c), (b, d) = (
        [hermitian(3, 1) / 8, hermitian(3, 2) / 8],
        [draw(3, seed=s, dtype=torch.complex128) for s in (3, 4)],
    )
    tasks = mb.TaskBatch((a[None], b[None]), (c[None], d[None]))
    learner = mb.MetaLearner(
        model,
        loss=quadratic_loss,
        steps=300,
        rule=LearningRate(0.2),
        estimator=mb.Implicit(proximal=strength, cg_steps=6),
        executor=mb.Loop(),
    )
    result = learner.meta_gradient(tasks)
    whole = a + strength * torch.eye(3, dtype=torch.complex128)
    end = torch.linalg.solve(whole, b + strength * model.theta.detach())
    due = strength * torch.linalg.solve(whole, c @ end - d)
    got = {"body": result.grads["model.theta"]}
    assert_close("implicit", pairs(got), pairs({"body": due}), 1e-10)
    assert float(result.metrics["inner_gradient"]) < 1e-10
    assert float(result.metrics["cg_residual"]) < 1e-10


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap()], ids=repr)
def test_a_learner_of_complex_weights_takes_the_plain_rate(executor):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, p in start().items():
                self.register_parameter(name.replace(".", "_"), nn.Parameter(p))

        def forward(self, x: Tensor) -> Tensor:
            named = {n.replace("_", ".", 1): p for n, p in self.named_parameters()}
            return loss(named, x)

    net = Net()
    support, query = torch.stack([BATCH, QUERY]), torch.stack([QUERY, BATCH])
    tasks = mb.TaskBatch((support, support), (query, query))
    rule = LearningRate(RATE, learn=True)
    options = {"loss": lambda value, _: value, "steps": STEPS, "estimator": mb.Unrolled()}
    learner = mb.MetaLearner(net, rule=rule, executor=executor, **options)
    got = learner.meta_gradient(tasks).grads
    parts, alpha = pairs(start()), torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(support, query, strict=True):
        theta = parts
        for _ in range(STEPS):
            slopes = torch.autograd.grad(
                loss(joined(theta), own), list(theta.values()), create_graph=True
            )
            theta = {n: p - alpha * g for (n, p), g in zip(theta.items(), slopes, strict=True)}
        total = total + loss(joined(theta), other) / 2
    grads = torch.autograd.grad(total, [*parts.values(), alpha])
    due = {f"model.{n.replace('.', '_')}": g for n, g in zip(parts, grads, strict=False)}
    assert_close("learner", pairs(got), {**due, "rule.rate.*": grads[-1]}, WITHIN)
