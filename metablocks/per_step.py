"""Modules that know the inner step, and the rows of blocks that have one for each step.

A per-step block is made for a number of steps. Past the last of them it either refuses (`"error"`)
or goes on with its last row (`"last"`); a learner asks for its limit when it is built and before it
evaluates with more steps than it was trained with.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from metablocks.errors import BlockError, MetablocksError

Beyond: TypeAlias = Literal["error", "last"]
"""Behaviour of a per-step block at steps past the last one it was made for."""


@dataclass(frozen=True)
class Position:
    """The index of an inner step where a trace is made that is to serve all steps.

    Whoever asks for the number ties the trace to it (`told`); the blocks that ship take the tensor.
    """

    index: int
    tensor: Tensor
    """The index, a scalar of floats."""

    def number(self) -> int:
        """The index as a number."""
        tell("index")
        return self.index


class StepAware(nn.Module):
    """A module that takes part in the inner loop. Subclass it in place of `nn.Module`.

    >>> import torch
    >>> import metablocks as mb
    >>> class StepBias(mb.StepAware):
    ...     max_steps = 3
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bias = torch.nn.Parameter(torch.zeros(3))
    ...
    ...     def forward(self, x):
    ...         return x + self.bias[self.inner_step]
    >>> StepBias()(torch.ones(1))
    tensor([1.], grad_fn=<AddBackward0>)
    """

    max_steps: int | None = None
    """The most inner steps that it can serve; None for any number."""
    collects_buffers: bool = False
    """True if a learner's `backward` is to bring its buffers up to date (see `MetaLearner`)."""
    keeps_statistics: bool = False
    """True if predictions rest on statistics that it has stored."""

    @property
    def inner_step(self) -> int:
        """The index of the inner step that a pass belongs to; a learner sets it, and so may a user."""
        step: int | Position = self.__dict__.get("_step", 0)
        return step.number() if isinstance(step, Position) else step

    @inner_step.setter
    def inner_step(self, index: int) -> None:
        self.__dict__["_step"] = index

    @property
    def _at(self) -> int | Tensor:
        """The index for reckoning; a scalar of floats where a trace is made (as `StepInfo.at`)."""
        step: int | Position = self.__dict__.get("_step", 0)
        return step.tensor if isinstance(step, Position) else step

    def at_step(self, index: int) -> nn.Module | None:
        """The plain module that it is at inner step `index`; None to stay as it is."""
        return None


def step_aware_modules(module: nn.Module) -> dict[str, StepAware]:
    """The modules that take part in the inner loop, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, StepAware)}


def collected_buffers(module: nn.Module) -> frozenset[str]:
    """The names of the buffers of step-aware modules with `collects_buffers = True`."""
    return frozenset(
        f"{name}.{leaf}" if name else leaf
        for name, member in module.named_modules()
        if isinstance(member, StepAware) and member.collects_buffers
        for leaf, _ in member.named_buffers()
    )


class _Told(threading.local):
    what: set[str] | None = None


_told = _Told()


@contextmanager
def told() -> Iterator[set[str]]:
    """Note what this thread is told of a step while a trace is made: its "index", the number of "steps".

    >>> with told() as what:
    ...     _ = Position(3, torch.tensor(3.0)).number()
    >>> what
    {'index'}
    """
    before, _told.what = _told.what, set()
    try:
        yield _told.what
    finally:
        _told.what = before


def tell(what: str) -> None:
    """Note that a trace depends on a number of the step."""
    if _told.what is not None:
        _told.what.add(what)


def row(
    block: str,
    index: int | Tensor,
    steps: int,
    beyond: Beyond,
    error: type[MetablocksError] = BlockError,
) -> int | Tensor:
    """The row of step `index` in a block of `steps` rows; a tensor where the index is one (`Position`).

    >>> row("LearningRate", 4, 5, "error"), row("LearningRate", 7, 5, "last")
    (4, 4)
    >>> row("LearningRate", 5, 5, "error")
    Traceback (most recent call last):
    metablocks.errors.BlockError: LearningRate was made for 5 inner steps, and step index 5 was asked
    for. Take at most 5 steps, or say beyond="last" to go on with the last row

    Raises `error` for a step past the last row where `beyond` is "error".
    """
    if isinstance(index, Tensor):  # a learner has asked for the limit before
        return index.clamp(max=steps - 1) if beyond == "last" else index
    if index < steps:
        return index
    if beyond == "last" and steps > 0:
        return steps - 1
    raise error(
        f"{block} was made for {steps} inner steps, and step index {index} was asked for. Take at "
        f'most {steps} steps, or say beyond="last" to go on with the last row'
    )


def take_row(table: Tensor, index: int | Tensor) -> Tensor:
    """A row of a table `[steps, ...]`: by a mask where the index is a tensor, exactly the same.

    >>> table = torch.tensor([[1.0, 2.0], [3.0, torch.inf]])
    >>> take_row(table, 1), take_row(table, torch.tensor(0.0))
    (tensor([3., inf]), tensor([1., 2.]))
    """
    if isinstance(index, int):
        return table[index]
    return torch.where(_mask(table, index), table, 0).sum(0, dtype=table.dtype)


def put_row(table: Tensor, index: int | Tensor, values: Tensor) -> None:
    """Write a row of a table in place.

    >>> table = torch.zeros(2, 2)
    >>> put_row(table, torch.tensor(1.0), torch.ones(2))
    >>> table
    tensor([[0., 0.],
            [1., 1.]])
    """
    if isinstance(index, int):
        table[index] = values
    else:
        table.copy_(torch.where(_mask(table, index), values.to(table.dtype), table))


def _mask(table: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(table), device=table.device)
    return (rows == index).reshape(-1, *(1,) * (table.ndim - 1))
