"""Laws of the Kronecker-factored transforms: what they compute, as dense matrices, and how KFO adapts.

An identity hides a transposed factor, so the factors are moved away from it first.
"""

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from metablocks.laws.cases import MakeRule, Problem
from metablocks.laws.compare import assert_close, noise_like, perturb
from metablocks.laws.plain_loop import PlainLoop, gradient
from metablocks.laws.rules import seeded_rule
from metablocks.rules import KFO, Chain, LearningRate, StepInfo, UpdateRule
from metablocks.types import Tensors


def kfo_is_a_kronecker_product(make: MakeRule, problem: Problem) -> None:
    """vec(L G R + B) = (Rᵀ ⊗ L) vec G + vec B, for each filter of a convolution by itself.

    On every parameter of the problem: L is `factors.left.…`, R `factors.right.…`, B `factors.bias.…`;
    with `psd`, LᵀL and RᵀR stand in their places. vec goes down the columns. A hidden layer is
    K₋(h) + σ(K₊(h)) − σ(K₋(h)), its K₊ and K₋ being such products.
    """
    rule, updates, gradients, factors = _apply(make, problem)
    assert isinstance(rule, KFO)
    expected: Tensors = {}
    for name, whole in gradients.items():

        def product(layer: str, flow: Tensor, name: str = name) -> Tensor:
            left = factors[f"{layer}left.{name}"]
            right = factors.get(f"{layer}right.{name}", left.new_ones(1, 1))
            if rule.psd:
                left, right = left.mT @ left, right.mT @ right
            moved = torch.kron(right.mT.contiguous(), left) @ flow
            bias = factors.get(f"{layer}bias.{name}", torch.zeros_like(moved))
            return moved + _column_major(bias.reshape(len(left), len(right)))

        size = len(factors[f"left.{name}"]), -1
        each = []
        for g in [whole] if whole.ndim < 3 else whole.flatten(2):
            flow = _column_major(g.reshape(size))
            for layer in range(rule.hidden):
                on, off = (product(f"hidden{layer}.{side}.", flow) for side in ("on", "off"))
                flow = off + rule.activation(on) - rule.activation(off)
            each.append(product("", flow).reshape(-1, size[0]).mT)
        expected[name] = torch.stack(each).reshape(whole.shape)
    assert_close("KFO is a Kronecker product", updates, expected, 1e-12)


def kfo_adapts_down_the_slope(make: MakeRule, problem: Problem) -> None:
    """φ_k = φ_{k−1} − α ∂L_s(θ_k)/∂φ_{k−1}, by autograd through θ_k = θ_{k−1} − α U(g_{k−1}; φ_{k−1}).

    For a `KFO` with `adapt_transform`: φ are its factors, U is what it is without. On the
    support set of the problem's first task.
    """
    rule = seeded_rule(make)
    assert isinstance(rule, KFO)
    assert rule.rate is not None
    rate, batch = rule.rate, problem.tasks[0].support
    learner = perturb(problem.learner(Chain(rule, LearningRate(rate))), "rule.")
    plain, fixed = PlainLoop(learner, problem.tasks), copy.deepcopy(rule)
    fixed.rate = None
    factors = {name: p.detach().requires_grad_() for name, p in rule.named_parameters()}
    start, buffers = plain.start(problem.tasks[0])
    theta = {name: p.detach().requires_grad_() for name, p in start.items()}
    state = plain.rule.init(theta)
    for step in range(problem.steps):
        loss, buffers = plain.forward("support_loss", theta, buffers, batch, step)
        gradients = gradient(loss, theta, keep=True)
        if step > 0:
            slope = gradient(loss, factors)
            factors = {
                name: (p - rate * slope[name]).detach().requires_grad_()
                for name, p in factors.items()
            }
        theta = {name: p.detach() for name, p in theta.items()}
        info = StepInfo(step, problem.steps, theta)
        with torch.no_grad():
            got, state = plain.rule(gradients, state, info)
        moved, _ = functional_call(fixed, factors, (gradients, (), info))
        expected = {name: -rate * update for name, update in moved.items()}
        assert_close(f"KFO adapts down the slope, step {step}", got, expected, 1e-12)
        theta = {name: p + expected[name] for name, p in theta.items()}


def curvature_is_a_kronecker_product(make: MakeRule, problem: Problem) -> None:
    """M_out ⊗ M_inᵀ for a matrix, M_out ⊗ M_in ⊗ M_f for a convolution, a diagonal for a vector.

    For `MetaCurvature`, on every parameter of the problem, its entries row by row.
    """
    _, updates, gradients, factors = _apply(make, problem)
    expected: Tensors = {}
    for name, g in gradients.items():
        if g.ndim < 2:
            dense = torch.diag(factors[f"scale.{name}"].reshape(-1))
        elif g.ndim == 2:
            dense = torch.kron(factors[f"out.{name}"], factors[f"in.{name}"].mT.contiguous())
        else:
            inner = torch.kron(factors[f"in.{name}"], factors[f"filter.{name}"])
            dense = torch.kron(factors[f"out.{name}"], inner)
        expected[name] = (dense @ g.reshape(-1)).reshape(g.shape)
    assert_close("Meta-Curvature is a Kronecker product", updates, expected, 1e-12)


def _apply(make: MakeRule, problem: Problem) -> tuple[UpdateRule, Tensors, Tensors, Tensors]:
    """A rule off the identity, its updates, the gradients they are of, and its factors."""
    params = problem.adapted_parameters()
    rule = seeded_rule(make).setup(params, 1)
    perturb(rule)
    factors = {n.removeprefix("factors."): p.detach() for n, p in rule.named_parameters()}
    gradients = noise_like(params)
    with torch.no_grad():
        updates, _ = rule(gradients, rule.init(params), StepInfo(0, 1, params))
    return rule, updates, gradients, factors


def _column_major(matrix: Tensor) -> Tensor:
    return matrix.mT.reshape(-1)
