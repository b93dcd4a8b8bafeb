"""Laws of the Kronecker-factored transforms: what they compute, as one dense matrix.

An identity hides a transposed factor, so the factors are moved away from it first.
"""

import torch
from torch import Tensor

from metablocks.laws.problem import (
    MakeRule,
    Problem,
    adapted_parameters,
    gradients_like,
    hold,
    tolerance,
)
from metablocks.laws.rules import seeded_rule
from metablocks.rules import StepInfo
from metablocks.types import Tensors


def kfo_is_a_kronecker_product(make: MakeRule, problem: Problem) -> None:
    """vec(L G R + B) = (Rᵀ ⊗ L) vec G + vec B, for each filter of a convolution by itself.

    For a `KFO` without hidden layers, on every parameter of the problem: L is `factors.left.…`,
    R `factors.right.…`, B `factors.bias.…`; with `psd`, LᵀL and RᵀR stand in their places. vec goes
    down the columns.
    """
    updates, gradients, factors, psd = _apply(make, problem)
    expected: Tensors = {}
    for name, gradient in gradients.items():
        left = factors[f"left.{name}"]
        right = factors.get(f"right.{name}", left.new_ones(1, 1))
        if psd:
            left, right = left.mT @ left, right.mT @ right
        dense = torch.kron(right.mT.contiguous(), left)
        size = len(left), len(right)
        bias = factors[f"bias.{name}"] if f"bias.{name}" in factors else left.new_zeros(size)
        rows = [gradient] if gradient.ndim < 3 else list(gradient.flatten(2))
        each = [
            (dense @ _column_major(g.reshape(size)) + _column_major(bias.reshape(size)))
            .reshape(size[::-1])
            .mT
            for g in rows
        ]
        expected[name] = torch.stack(each).reshape(gradient.shape)
    hold("KFO is a Kronecker product", updates, expected, tolerance(problem, float64=1e-12))


def curvature_is_a_kronecker_product(make: MakeRule, problem: Problem) -> None:
    """M_out ⊗ M_inᵀ for a matrix, M_out ⊗ M_in ⊗ M_f for a convolution, a diagonal for a vector.

    For `MetaCurvature`, on every parameter of the problem, its entries row by row.
    """
    updates, gradients, factors, _ = _apply(make, problem)
    expected: Tensors = {}
    for name, gradient in gradients.items():
        if gradient.ndim < 2:
            dense = torch.diag(factors[f"scale.{name}"].reshape(-1))
        elif gradient.ndim == 2:
            dense = torch.kron(factors[f"out.{name}"], factors[f"in.{name}"].mT.contiguous())
        else:
            inner = torch.kron(factors[f"in.{name}"], factors[f"filter.{name}"])
            dense = torch.kron(factors[f"out.{name}"], inner)
        expected[name] = (dense @ gradient.reshape(-1)).reshape(gradient.shape)
    within = tolerance(problem, float64=1e-12)
    hold("Meta-Curvature is a Kronecker product", updates, expected, within)


def _apply(make: MakeRule, problem: Problem) -> tuple[Tensors, Tensors, Tensors, bool]:
    """Updates of a rule off the identity, the gradients they are of, its factors, and its `psd`."""
    params = adapted_parameters(problem)
    rule = seeded_rule(make).setup(params, 1)
    generator = torch.Generator().manual_seed(1)
    factors: Tensors = {}
    for name, parameter in rule.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        parameter.data.add_(0.2 * noise.to(parameter))
        factors[name.removeprefix("factors.")] = parameter.detach()
    gradients = gradients_like(params)
    with torch.no_grad():
        updates, _ = rule(gradients, rule.init(params), StepInfo(0, 1, params))
    return updates, gradients, factors, bool(getattr(rule, "psd", False))


def _column_major(matrix: Tensor) -> Tensor:
    return matrix.mT.reshape(-1)
