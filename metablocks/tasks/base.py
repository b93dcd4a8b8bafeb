"""What a task source is: a pure function from (seed, split, index) to a task."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np

from metablocks.errors import TaskError
from metablocks.types import TaskBatch

Split: TypeAlias = Literal["train", "validation", "test"]
Kind: TypeAlias = Literal["classification", "regression"]
SPLITS: tuple[Split, ...] = get_args(Split)


@runtime_checkable
class TaskSource(Protocol):
    """A family of tasks.

    Law: task `index` of a split depends on nothing but (the source's fields, its seed, the split,
    the index). `sample(split, [3, 7])` is row 3 and row 7 of `sample(split, range(8))`, in any
    process, in any chunking, after any resume.
    """

    @property
    def kind(self) -> Kind:
        """Classification (targets are int64 class numbers) or regression (targets are floats)."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input."""

    @property
    def outputs(self) -> int:
        """Width of a model's output: ways, or target dimensions."""

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split: leaves `[len(indices), examples, ...]`."""


def generator(seed: int, split: Split, *counters: int) -> np.random.Generator:
    """The random generator of one task (or class): a function of its arguments alone.

    >>> a, b = generator(0, "train", 7), generator(0, "train", 7)
    >>> bool(a.random() == b.random())
    True

    Raises `TaskError` for an unknown split or a negative counter.
    """
    if split not in SPLITS:
        raise TaskError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if seed < 0 or any(counter < 0 for counter in counters):
        raise TaskError(f"seed and task index count from 0; given seed {seed}, {list(counters)}")
    return np.random.default_rng([seed, SPLITS.index(split), *counters])
