"""Factors of the Kronecker-factored rules: their shapes, the identity."""

import math

import torch
from torch import Tensor

from metablocks.errors import RuleError
from metablocks.types import Tensors

_MOST_AXES = 5  # [C_out, C_in, depth, height, width]


def sizes(rule: str, name: str, shape: torch.Size) -> tuple[int, ...]:
    """The axes of a parameter, the positions of a convolution's kernel being one axis.

    `[n]` for biases, norms and single numbers, `[out, in]` for linear weights, `[C_out, C_in, k]`
    for convolutions in one, two or three dimensions. Raises `RuleError` for more axes than that.

    >>> sizes("KFO", "scale", torch.Size([])), sizes("KFO", "conv.weight", torch.Size([8, 3, 5, 5]))
    ((1,), (8, 3, 25))
    """
    if len(shape) > _MOST_AXES:
        raise RuleError(
            f"{rule} has no factors for {name}, a tensor of shape {list(shape)}; it takes vectors, "
            "matrices and convolutions of at most three dimensions: leave it out of `adapt`"
        )
    if len(shape) < 2:
        return (math.prod(shape),)
    return tuple(shape) if len(shape) == 2 else (shape[0], shape[1], math.prod(shape[2:]))


def identity(size: int, like: Tensor) -> Tensor:
    """The identity matrix `[size, size]` with the dtype and device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def find(rule: str, factors: Tensors, key: str, name: str) -> Tensor:
    """One factor; raises `RuleError` where the rule was set up without the parameter it serves."""
    if key not in factors:
        raise RuleError(f"{rule} was set up without a transform for {name}")
    return factors[key]
