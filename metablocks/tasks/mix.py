"""Sources made of sources: several domains in one, and another one for each split."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from metablocks.checks import Blocks, CountFrom0, NonNegative, Such, checked
from metablocks.errors import TaskError
from metablocks.tasks.base import (
    SPLITS,
    Kind,
    Split,
    TaskSource,
    check_split,
    generator,
    task_numbers,
)
from metablocks.types import Task, TaskBatch, TaskList

_CHOICE = 2  # counter of the generator that chooses a source: no task of a source's has it

Sources = Annotated[
    Sequence[TaskSource],
    Such(lambda sources: len(sources) > 0, "a list of task sources, at least one"),
    Blocks("tasks", at_least=1),
]
Source = Annotated[TaskSource, Such(lambda _: True, "a task source"), Blocks("tasks")]


def check_alike(block: str, sources: Mapping[Any, TaskSource], *names: str) -> None:
    """Raise `TaskError` for sources, by the fields that hold them, that differ in an attribute."""
    (first, model), *others = sources.items()
    for name in names:
        for field, source in others:
            here, there = getattr(model, name), getattr(source, name)
            if here != there:
                words = f"{name} of {first} is {here} and of {field} {there}"
                message = f"{block}: {words}; one model takes the tasks of all"
                raise TaskError(message, block=block, field=field.partition("[")[0])


class _Made:
    """Base of sources made of others: kind, shape, outputs and checksum are theirs."""

    sources: Sequence[TaskSource]

    @property
    def kind(self) -> Kind:
        return self.sources[0].kind

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.sources[0].input_shape

    @property
    def outputs(self) -> int:
        return self.sources[0].outputs

    @property
    def checksum(self) -> str | None:
        """SHA-256, in hex, of the sources' checksums; None if none has any."""
        sums: list[Any] = [getattr(source, "checksum", None) for source in self.sources]
        return hashlib.sha256(repr(sums).encode()).hexdigest() if any(sums) else None


def _height(source: TaskSource) -> int:
    """The number of mixes, one inside another, that a source is made of."""
    inside = max(map(_height, source.sources)) if isinstance(source, _Made) else 0
    return inside + isinstance(source, Mix)


@checked(TaskError)
@dataclass(frozen=True)
class Mix(_Made):
    """Tasks of several sources: each task is one of a source drawn with the probabilities `weights`.

    The weights need not add up to 1; without them the sources are equally likely. Task `index` of the
    mix is task `index` of the source that is drawn for it, and obeys the law of `TaskSource` if the
    sources do. Tasks of unequal size come as a list (`Loop` takes it).

    - `sources`: the sources that are mixed.
    - `weights`: the probability of each, up to a factor; None for equal ones.

    Raises `TaskError` for sources that differ in kind, `input_shape` or `outputs`, and for weights
    that do not fit.

    >>> import metablocks as mb
    >>> thin, bold = (mb.tasks.Strokes(ways=5, shots=1, queries=2, pen=(w, w)) for w in (0.4, 0.8))
    >>> mb.tasks.Mix([thin, bold], weights=[1, 3]).sample("train", range(4)).query[0].shape
    torch.Size([4, 10, 1, 28, 28])
    """

    sources: Sources
    weights: tuple[NonNegative, ...] | None = None
    seed: CountFrom0 = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        named = {f"sources[{number}]": source for number, source in enumerate(self.sources)}
        check_alike("Mix", named, "kind", "input_shape", "outputs")
        weights = self.weights
        if weights is not None and (len(weights) != len(self.sources) or not sum(weights)):
            takes = f"it takes a number for each of the {len(self.sources)} sources, not all 0"
            raise TaskError.about("Mix", "weights", f"is {weights}; {takes}")

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch | TaskList:
        """Tasks number `indices` of a split: tensors `[tasks, examples, ...]`, or a list."""
        check_split(split)
        numbers = task_numbers(indices)
        weights = np.array(self.weights or [1.0] * len(self.sources), dtype=np.float64)
        bounds = np.cumsum(weights / weights.max())
        # A mix of mixes chooses by draws of its own: those inside have the same seed and index.
        height = _height(self)
        key = (_CHOICE, height) if height > 1 else (_CHOICE,)
        draws = [generator(self.seed, split, index, *key).random() for index in numbers]
        chosen = np.searchsorted(bounds, np.array(draws) * bounds[-1], side="right")
        tasks: dict[int, Task] = {}
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(chosen == number).tolist()
            if rows:
                batch = source.sample(split, [numbers[row] for row in rows])
                tasks |= {row: batch[place] for place, row in enumerate(rows)}
        return TaskList.gather([tasks[row] for row in range(len(numbers))])


@checked(TaskError)
@dataclass(frozen=True)
class BySplit(_Made):
    """A source for each split: other ways, shots or queries at test than in training, or other data.

    `outputs` are those of the source with most, for which the model is made; a task of fewer ways
    leaves the rest unused. Obeys the law of `TaskSource` if the sources do and their splits are apart
    (sources that differ in ways, shots and queries alone, and any two without a class in common).

    - `train`: the source of training tasks.
    - `validation`: the source of validation tasks.
    - `test`: the source of test tasks.

    Raises `TaskError` for sources that differ in kind or `input_shape`.

    >>> import metablocks as mb
    >>> five, ten = (mb.tasks.Strokes(ways=5, shots=shots, queries=2) for shots in (5, 10))
    >>> source = mb.tasks.BySplit(train=five, validation=five, test=ten)
    >>> [source.sample(split, [0]).support[0].shape[1] for split in ("train", "test")]
    [25, 50]
    """

    train: Source
    validation: Source
    test: Source

    def __post_init__(self) -> None:
        named = dict(zip(SPLITS, self.sources, strict=True))
        check_alike("BySplit", named, "kind", "input_shape")

    @property
    def sources(self) -> tuple[TaskSource, ...]:  # type: ignore[override]
        """The sources of train, validation and test."""
        return (self.train, self.validation, self.test)

    @property
    def outputs(self) -> int:
        return max(source.outputs for source in self.sources)

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch | TaskList:
        """Tasks number `indices` of a split: tensors `[tasks, examples, ...]`, or a list."""
        check_split(split)
        source: TaskSource = getattr(self, split)
        return source.sample(split, indices)
