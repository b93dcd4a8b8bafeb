"""The Neumann series for A x = b, A = I + M symmetric, known by its products alone: x = Σ (−M)ᵏ b.

It converges where ‖M‖ < 1. Complex vectors are pairs of real ones: all inner products are Re ⟨a, b⟩. No
control flow depends on numbers, so that `torch.func.vmap` can run it: what is finished stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metablocks.estimators.conjugate_gradient import residual_of
from metablocks.rules.base import inner_product
from metablocks.types import Tensors


class Series(NamedTuple):
    """Result of `neumann_series`."""

    vector: Tensors
    """x, by the names of b."""
    residual: Tensor
    """‖b − A x‖ / ‖b‖ of this very x, a scalar; 0 where b is."""
    growth: Tensor
    """The largest ‖Mᵏ⁺¹ b‖ / ‖Mᵏ b‖, a scalar: at most ‖M‖, so that above 1 the series diverges."""


def neumann_series(
    product: Callable[[Tensors], Tensors], target: Tensors, *, steps: int, tolerance: float
) -> Series:
    """Solve A x = b by the first `steps` + 1 terms; `product` is x ↦ A x, `target` is b.

    A term is the residual of the sum before it: once it is at most `tolerance`, relative to b, the sum
    stays as it is. So it does where a term is larger than the one before: of a symmetric M the terms
    grow from there on, and the series diverges.

    Laws: x is the solution where ‖M‖ < 1 and `steps` are enough, with a residual of at most ‖M‖ to the
    power of `steps` + 1; the residual is that of the sum, whatever M is.

    Source: Lorraine, Vicol, Duvenaud 2020.

    >>> half = lambda x: {"w": 1.5 * x["w"]}
    >>> neumann_series(half, {"w": torch.tensor([3.0])}, steps=1, tolerance=0.0)
    Series(vector={'w': tensor([1.5000])}, residual=tensor(0.2500), growth=tensor(0.5000))
    """
    total = term = target
    square = whole = inner_product(target, target)
    running = whole > 0
    growth = torch.zeros_like(whole)
    for _ in range(steps):
        image = product(term)
        running = running & (square > tolerance**2 * whole)
        following = {name: t - image[name] for name, t in term.items()}
        size = inner_product(following, following)
        ratio = (size / torch.where(running, square, 1)).sqrt()
        growth = torch.where(running, torch.maximum(growth, ratio), growth)
        running = running & (ratio <= 1)
        total = {name: torch.where(running, t + following[name], t) for name, t in total.items()}
        term, square = following, size
    return Series(total, residual_of(product, target, total), growth)
