"""Clipping of the meta-gradient, between the backward pass and the optimiser's step.

clip: {block: value, maximum: 10.0, only: "model.*"}
"""

from collections.abc import Sequence
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import nn

from metablocks.recipe.optimizers import NamedParameters
from metablocks.recipe.schema import Interval
from metablocks.selection import select

_Positive = Annotated[float, Interval(above=0)]


@runtime_checkable
class Clip(Protocol):
    """Changes the `.grad` of the parameters it was made for, in place."""

    def __call__(self) -> None:
        """Clip what stands in `.grad` now."""


class _Bound:
    """A bound, and the parameters whose meta-gradient it is for."""

    def __init__(
        self,
        parameters: NamedParameters,
        *,
        maximum: _Positive,
        only: str | Sequence[str] = "*",
    ) -> None:
        self.maximum = maximum
        named = {name: p for name, p in parameters if p.requires_grad}
        self.chosen: list[nn.Parameter] = [named[name] for name in select(only, named)]


class ClipValue(_Bound):
    """Clamp every entry of the meta-gradient: g ← min(max(g, −maximum), maximum).

    `only` are patterns over the learner's parameter names (`model.*`, `rule.*`).

    Source: the reference code of Antoniou, Edwards, Storkey 2018 (±10, the net only)
    (torch.nn.utils.clip_grad_value_).

    >>> layer = nn.Linear(1, 1)
    >>> layer.weight.grad = torch.tensor([[25.0]])
    >>> ClipValue(layer.named_parameters(), maximum=10.0, only="weight")()
    >>> layer.weight.grad
    tensor([[10.]])

    Raises `SelectionError` for a pattern that matches nothing.
    """

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_value_(self.chosen, self.maximum)


class ClipNorm(_Bound):
    """Scale the meta-gradient down to a norm: g ← g · min(1, maximum / ‖g‖), ‖g‖ over all of it.

    `only` are patterns over the learner's parameter names (`model.*`, `rule.*`).

    Source: Pascanu, Mikolov, Bengio 2013 (torch.nn.utils.clip_grad_norm_).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> ClipNorm(layer.named_parameters(), maximum=1.0)()
    >>> layer.weight.grad
    tensor([[0.6000, 0.8000]])

    Raises `SelectionError` for a pattern that matches nothing.
    """

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.chosen, self.maximum)
