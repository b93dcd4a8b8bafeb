"""A task's work cut into pieces: functions of tensors that run, and may be compiled, one by one.

An estimator drives them: what happens between two pieces does not depend on how they run, nor on
whether a call serves one task or many at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

from torch import Tensor

from metablocks.inner_loop import InnerLoop
from metablocks.types import Task, Tensors, map_tensors


@dataclass(frozen=True)
class At:
    """The place and the weights that tell one call of a piece from another."""

    index: int = -1
    """The inner step, or the carry of a query pass; −1 for what belongs to none."""
    weights: Mapping[int, Tensor] | None = None
    """The weights of query losses that the piece reads, by the carry."""


Part: TypeAlias = Literal["support", "query", "weight"]

PARTS: tuple[Part, ...] = ("support", "query", "weight")
"""The parts of a task; its weight is None if tasks have none."""

Piece: TypeAlias = Callable[..., tuple[Any, ...]]
"""`(inner, meta, totals, at, *state, *data) -> parts`, adding to `totals`, sums over tasks by name."""


@dataclass(frozen=True)
class Pieces:
    """Runs the pieces of one task's work as they are. A compiled executor has its own way.

    What a piece returns is handed to other pieces as it is; `open` gives the values.
    """

    inner: InnerLoop
    meta: Tensors
    buffers: Any
    """The model's buffers that a task begins with, as a state."""
    task: Task

    def __call__(
        self,
        name: tuple[Any, ...],
        piece: Piece,
        state: Sequence[Any] = (),
        *,
        at: At | None = None,
        data: Sequence[Part] = (),
        totals: Tensors | None = None,
    ) -> tuple[Any, ...]:
        """The parts that `piece` returns.

        Calls of one `name` differ in `at` and in numbers alone. `data` is handed over as the batch of
        `at.index`, or whole where that is −1.
        """
        at = at or At()
        batches = [self.batch(part, at.index) for part in data]
        totals = {} if totals is None else totals
        return piece(self.inner, self.meta, totals, at, *state, *batches)

    @property
    def drawn(self) -> Any:
        """The part of the task that was drawn, as a state."""
        return self.task.drawn

    def batch(self, part: Part, index: int) -> Any:
        """The batch of an inner step or carry, or the weight; the whole set for −1. As a state."""
        if part == "weight":
            return self.task.weight
        batch_of = self.inner.support_of if part == "support" else self.inner.query_of
        return batch_of(self.task, index)

    def recorded(
        self,
        name: tuple[Any, ...],
        piece: Piece,
        state: Sequence[Any] = (),
        *,
        cotangent: Callable[[Any], list[Tensor]],
        at: At | None = None,
        data: Sequence[Part] = (),
    ) -> tuple[Any, Callable[[Any, Tensors], Any]]:
        """One part, and the way back: `(cotangent, totals) -> cotangent`, by what the pass left.

        `piece` returns the two; `cotangent(state)` gives tensors of the cotangent's form.
        """
        part, back = self(name, piece, state, at=at, data=data)
        return part, back

    def open(self, part: Any) -> Any:
        """The values of a part; of many tasks at once, `[tasks, ...]`."""
        return part

    def add(self, one: Any, other: Any) -> Any:
        """The sum of two cotangents. In a shorter one the end is zero, as None is."""
        pairs = zip_longest(one, other)
        return [b if a is None else a if b is None else a + b for a, b in pairs]

    def sum(self, tree: Any) -> Any:
        """The weighted sum of opened values over the tasks at hand."""
        return weighed(tree, self.task.weight)


def weighed(tree: Any, weight: Any) -> Any:
    """A tree of tensors of a task by its weight, or of tasks `[tasks, ...]` by theirs; as it is for None.

    >>> import torch
    >>> weighed({"a": torch.ones(2)}, torch.tensor(3.0)), weighed({"a": 1}, None)
    ({'a': tensor([3., 3.])}, {'a': 1})
    """
    if weight is None:
        return tree

    def times(leaf: Tensor) -> Tensor:
        floats = leaf.is_floating_point() or leaf.is_complex()
        by = weight.to(leaf.dtype) if floats else weight
        product: Tensor = leaf * by.reshape(by.shape + (1,) * (leaf.ndim - by.ndim))
        return product

    return map_tensors(times, tree)


@dataclass(frozen=True)
class InPieces:
    """Work that can be driven in pieces."""

    inner: InnerLoop
    meta: Tensors
    drive: Callable[[Pieces], tuple[Any, Any]]
    """The result of an executor's task function, of all tasks that `Pieces` runs at once."""
    short: Callable[[], Any] | None = None
    """Makes the same work for two inner steps, by which what is compiled is checked; else by itself."""

    @property
    def shared(self) -> tuple[Tensors, dict[str, Any]]:
        """The tensors that the task function takes as `shared`."""
        return self.meta, self.inner.tensors
