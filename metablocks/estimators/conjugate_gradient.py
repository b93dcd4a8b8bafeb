"""Conjugate gradients for A x = b, A symmetric and positive definite, known by its products alone.

Complex vectors are pairs of real ones: all inner products are Re ⟨a, b⟩, in which A is symmetric.
No control flow depends on numbers, so that `torch.func.vmap` can run it: what is finished stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metablocks.rules.base import inner_product, scaled
from metablocks.types import Tensors


class Solution(NamedTuple):
    """Result of `conjugate_gradient`."""

    vector: Tensors
    """x, by the names of b."""
    residual: Tensor
    """‖b − A x‖ / ‖b‖ of this very x, a scalar; 0 where b is."""


def conjugate_gradient(
    product: Callable[[Tensors], Tensors],
    target: Tensors,
    *,
    steps: int,
    tolerance: float,
    least: float = 0.0,
) -> Solution:
    """Solve A x = b from x = 0 by `steps` products; `product` is x ↦ A x, `target` is b.

    Once the recursion's residual is at most `tolerance` the solution stays as it is; so it does where
    a direction p turns out to be one along which A is not positive, or hardly: ⟨p, A p⟩ ≤ `least` ·
    ‖p‖². Where that is the very first, x = b.

    The recursion's residual, r ← r − length · A p, goes on shrinking when rounding keeps x from coming
    any closer; the one returned takes one more product, A x.

    Laws: exact after as many steps as A has distinct eigenvalues, where all are above `least`, up to
    rounding; the residual is that of the solution, whatever the spectrum of A.

    Source: Hestenes, Stiefel 1952.

    >>> twice = lambda x: {"w": 2 * x["w"]}
    >>> conjugate_gradient(twice, {"w": torch.tensor([4.0, 6.0])}, steps=1, tolerance=0.0)
    Solution(vector={'w': tensor([2., 3.])}, residual=tensor(0.))
    """
    solution = {name: torch.zeros_like(b) for name, b in target.items()}
    residual = direction = target
    square = whole = inner_product(target, target)
    running = whole > 0
    for index in range(steps):
        image = product(direction)
        curvature = inner_product(direction, image)
        running = running & (square > tolerance**2 * whole)
        upward = curvature > least * inner_product(direction, direction)
        length = square / torch.where(upward, curvature, 1)
        otherwise = torch.full_like(length, 1.0 if index == 0 else 0.0)
        length = torch.where(running, torch.where(upward, length, otherwise), 0)
        running = running & upward
        solution = _add(solution, length, direction)
        residual = _add(residual, -length, image)
        following = inner_product(residual, residual)
        turn = torch.where(running, following / torch.where(running, square, 1), 0)
        direction = _add(residual, turn, direction)
        square = following
    return Solution(solution, residual_of(product, target, solution))


def residual_of(
    product: Callable[[Tensors], Tensors], target: Tensors, solution: Tensors
) -> Tensor:
    """‖b − A x‖ / ‖b‖, by one product; 0 where b is.

    >>> residual_of(lambda x: x, {"w": torch.tensor([4.0])}, {"w": torch.tensor([3.0])})
    tensor(0.2500)
    """
    whole = inner_product(target, target)
    gap = _add(target, -torch.ones_like(whole), product(solution))
    square = inner_product(gap, gap)
    return (square / torch.where(whole > 0, whole, 1)).sqrt()


def _add(to: Tensors, factor: Tensor, direction: Tensors) -> Tensors:
    return {name: tensor + scaled(factor, direction[name]) for name, tensor in to.items()}
