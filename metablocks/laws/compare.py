"""Compare named tensors within a tolerance, and draw the fixed noise that parameters are moved by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metablocks.devices import in_float64
from metablocks.errors import LawError
from metablocks.generators import kept_draws
from metablocks.types import Tensors, relative_error

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def assert_close(
    law: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float
) -> None:
    """Raise `LawError` if two sets of named tensors differ by more than `within`, relatively.

    `within` is what float64 leaves. Rounding errors add up over some hundred operations and are then
    divided by what is left of the sums that cancel: of tensors in float32, whose precision is 1.2e-7,
    a thousand times that is allowed, 1e-4. A `within` of 0 is exact in every precision.

    >>> assert_close("one is one", {"x": torch.ones(1)}, {"x": torch.ones(1)}, within=0)
    """
    inexact = [t for t in expected.values() if t.is_floating_point() or t.is_complex()]
    if within and max((torch.finfo(t.dtype).eps for t in inexact), default=0.0) > 1e-10:
        within = max(within, 1e-4)
    error = relative_error(got, expected)
    if error <= within:
        return
    if set(got) != set(expected):
        raise LawError(f"{law}: the names differ: {sorted(set(got) ^ set(expected))}")
    worst = max(
        expected, key=lambda k: float((in_float64(got[k]) - in_float64(expected[k])).abs().max())
    )
    raise LawError(
        f"{law}: relative error {error:.2e}, at most {within:.0e} allowed; furthest apart is "
        f"{worst}: {_shorten(got[worst])}, expected {_shorten(expected[worst])}"
    )


def identical(one: Any, other: Any) -> bool:
    """True for two values of one type that are equal; for tensors of one dtype and shape, NaN included.

    >>> identical(torch.tensor([torch.nan]), torch.tensor([torch.nan])), identical(1, 1.0)
    (True, False)
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and bool(one == other)


def noise_like(tensors: Mapping[str, Tensor], seed: int = 0) -> Tensors:
    """Standard normal noise with the names, shapes, dtypes and devices of some tensors.

    The numbers are the same on every device, and in every precision up to rounding.

    >>> noise_like({"w": torch.zeros(2, 3)})["w"].shape
    torch.Size([2, 3])
    """
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=draw, dtype=torch.float64, device="cpu").to(t)
        for name, t in tensors.items()
    }


@torch.no_grad()
def perturb(module: _Module, part: str = "", scale: float = 0.2) -> _Module:
    """Move the trainable parameters with `part` in their names by fixed noise, in place.

    A learned transform that starts as the identity hides what is wrong with it; a law that is to
    see it moves it away first. Returns the module.
    """
    moved = {n: p for n, p in module.named_parameters() if part in n and p.requires_grad}
    for name, noise in noise_like(moved, seed=1).items():
        moved[name].add_(scale * noise)
    return module


@contextmanager
def fixed_draws() -> Iterator[None]:
    """Run the block with the random state of seed 0; the caller's state is as before afterwards."""
    with kept_draws():
        torch.manual_seed(0)
        yield


def named(block: object) -> str:
    """The name of a block in messages: that of a function or class, or else its `repr`.

    >>> named(perturb), named(torch.Size([2]))
    ('perturb', 'torch.Size([2])')
    """
    return getattr(block, "__name__", None) or repr(block)


def _shorten(tensor: Tensor) -> str:
    return str([float(f"{value:.6g}") for value in tensor.flatten()[:4].cpu().tolist()])
