"""The base of sources of examples by class, of one's own or published: N-way K-shot tasks.

A source gives a `Pool` of examples for each split; which classes and examples a task takes is drawn
by `episode_sampling.draw_episodes`, from (seed, split, index) and the numbers of examples alone.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from metablocks.checks import Blocks, Count, CountFrom0, Device, Such, shown
from metablocks.errors import TaskError, first_line
from metablocks.generators import seeded
from metablocks.tasks.base import SPLITS, Kind, Split, check_split, generator, task_numbers
from metablocks.tasks.episode_sampling import (
    ORDERED,
    Ints,
    WaysOrRange,
    draw_episodes,
    ends,
    episode_tasks,
    turn,
)
from metablocks.tasks.storage import name_bytes
from metablocks.types import Task, TaskBatch, TaskList

Shares = Annotated[
    tuple[float, float, float],
    Such(
        lambda shares: min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
        "three shares (train, validation, test) that add up to 1",
    ),
]
Transforms = Annotated[
    Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]],
    Blocks("transform", at_least=0),
]
_Key = TypeVar("_Key")
_SIZES = 3  # last counter of the generator of a task's ways and shots


@dataclass(frozen=True)
class Pool:
    """The examples of a split by class, class after class: numbers `rows` of what `read` gives.

    `counts`: the number of examples of each class. `read(rows)` gives examples `[rows, ...]`.
    """

    names: tuple[str, ...]
    counts: Ints
    rows: Ints
    read: Callable[[Ints], Tensor]

    @classmethod
    def of(cls, classes: Mapping[str, Ints], read: Callable[[Ints], Tensor]) -> "Pool":
        """The pool of classes, each with the numbers of its examples."""
        rows = list(classes.values())
        counts = np.array([len(of_class) for of_class in rows], dtype=np.int64)
        return cls(tuple(classes), counts, np.concatenate(rows), read)

    def take(self, rows: Ints) -> Tensor:
        """The examples of the numbers `rows`, which count through all classes: `[rows, ...]`."""
        return self.read(self.rows[rows])


def numbered(counts: Mapping[_Key, int]) -> dict[_Key, Ints]:
    """The numbers of each class's examples, which come class after class.

    >>> numbered({"ant": 2, "bee": 3})
    {'ant': array([0, 1]), 'bee': array([2, 3, 4])}
    """
    ends = np.cumsum([0, *counts.values()])
    return {key: np.arange(ends[number], ends[number + 1]) for number, key in enumerate(counts)}


def rows_of(examples: Tensor) -> Callable[[Ints], Tensor]:
    """A pool's `read` of examples in one tensor."""
    return lambda rows: examples.index_select(0, torch.from_numpy(rows).to(examples.device))


@dataclass(frozen=True, kw_only=True)
class ClassTasks(ABC):
    """N-way K-shot tasks of examples by class, each split with classes of its own.

    Where `ways` or `shots` are ranges, or shots are not `balanced`, tasks come as a `TaskList`, and
    `outputs` is the highest number of ways. Transforms are called on each input alone, as the model
    would get it, and give one of the same shape for all, `input_shape`. What they draw is seeded by
    the task.

    - `ways`: classes of a task; a range [low, high], from which each task draws its own, for
      `Loop`.
    - `shots`: support examples of each class; a range, from which each task draws its own, for
      `Loop`.
    - `queries`: query examples of each class.
    - `balanced`: True if the classes of a task have equally many shots; else each draws its own.
    - `rotate`: True if every class of a training task turns by a multiple of 90°, drawn anew in
      every task, the same for its support and query examples.
    - `unlabelled`: True to make a class of each example, whatever its label: support and query are
      copies of it, told apart by the transforms.
    - `support_transform`: changes of each support input, a transform or several that follow one
      another.
    - `query_transform`: the same of each query input.
    """

    kind: ClassVar[Kind] = "classification"

    ways: WaysOrRange
    shots: Count | Annotated[tuple[Count, Count], ORDERED]
    queries: Count
    balanced: bool = True
    rotate: bool = False
    unlabelled: bool = False
    support_transform: Transforms = ()
    query_transform: Transforms = ()
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def __post_init__(self) -> None:
        for name in ("support_transform", "query_transform"):
            functions = getattr(self, name)
            chain = (functions,) if callable(functions) else tuple(functions)
            object.__setattr__(self, name, chain)
        if self.unlabelled and not (self.support_transform or self.query_transform):
            raise self._error(
                "unlabelled",
                "makes support and query of copies of one example; give a support_transform or a "
                "query_transform, which tells them apart",
            )

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an example."""

    @property
    def outputs(self) -> int:
        return ends(self.ways)[1]

    @property
    @abstractmethod
    def pools(self) -> Mapping[Split, Pool]:
        """The examples of each split that there is."""

    @property
    @abstractmethod
    def checksum(self) -> str:
        """SHA-256, in hex, of all that tasks are drawn from: splits, classes, examples."""

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what has been read is read anew elsewhere."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch | TaskList:
        """Tasks number `indices` of a split."""
        pool = self._pool(split)
        numbers = task_numbers(indices)
        if isinstance(self.ways, int) and isinstance(self.shots, int):
            shots = np.full((len(numbers), self.ways), self.shots)
            batch: TaskBatch | TaskList = self._drawn(pool, split, numbers, shots)
        else:
            sizes = [self._sizes(split, index, len(pool.counts))[None] for index in numbers]
            alone = zip(numbers, sizes, strict=True)
            batch = TaskList([self._drawn(pool, split, [n], shots)[0] for n, shots in alone])
        if not (self.support_transform or self.query_transform):
            return batch
        return TaskList.gather(
            [self._transformed(split, index, batch[row]) for row, index in enumerate(numbers)]
        )

    def _sizes(self, split: Split, index: int, classes: int) -> Ints:
        """The shots of each class of a task, `[ways]`."""
        rng = generator(self.seed, split, index, _SIZES)
        low, high = ends(self.ways)
        ways = int(rng.integers(low, min(high, classes) + 1))
        fewest, most = ends(self.shots)
        drawn = rng.integers(fewest, most + 1, size=ways)
        shots: Ints = np.full(ways, drawn[0]) if self.balanced else drawn
        return shots

    def _drawn(self, pool: Pool, split: Split, indices: Sequence[int], shots: Ints) -> TaskBatch:
        """Tasks of one size; `shots` `[tasks, ways]`, the same in each task unless it is alone."""
        total, most = int(pool.counts.sum()), int(shots.max())
        drawn = draw_episodes(
            split,
            indices,
            classes=total if self.unlabelled else len(pool.counts),
            examples=most + self.queries if self.unlabelled else pool.counts,
            ways=shots.shape[1],
            shots=most,
            queries=self.queries,
            rotate=self.rotate and split == "train",
            seed=self.seed,
        )
        first = np.cumsum(pool.counts) - pool.counts
        rows = (
            np.broadcast_to(drawn.classes[..., None], drawn.examples.shape)
            if self.unlabelled
            else first[drawn.classes][..., None] + drawn.examples
        )
        examples = pool.take(rows.reshape(-1)).to(self.device)
        examples = examples.view(*rows.shape, *examples.shape[1:])
        if drawn.turns.any():
            examples = turn(examples, torch.from_numpy(drawn.turns).to(examples.device))
        batch = episode_tasks(examples, most)
        if (shots == most).all():
            return batch
        kept = torch.from_numpy((np.arange(most) < shots[0][:, None]).reshape(-1))
        inputs, targets = (part[:, kept.to(part.device)] for part in batch.support)
        return TaskBatch((inputs, targets), batch.query)

    def _transformed(self, split: Split, index: int, task: Task) -> Task:
        with seeded(self.seed, SPLITS.index(split), index):
            support = self._changed("support_transform", task.support[0])
            query = self._changed("query_transform", task.query[0])
        return Task((support, task.support[1]), (query, task.query[1]))

    def _changed(self, field: str, inputs: Tensor) -> Tensor:
        """The inputs of a side, each as its transforms leave it."""
        functions: Any = getattr(self, field)
        if not functions:
            return inputs
        shape, changed = list(self.input_shape), []
        for given in inputs:
            try:
                made = reduce(lambda x, function: function(x), functions, given)
            except Exception as error:  # a transform may raise what it likes
                words = f"{type(error).__name__}: {first_line(error)}"
                raise self._error(field, f"fails on an input {shape}: {words}") from error
            if not isinstance(made, Tensor) or list(made.shape) != shape:
                kind = list(made.shape) if isinstance(made, Tensor) else shown(made)
                words = "it leaves the shape of an input, a tensor, as it is"
                raise self._error(field, f"makes {kind} of {shape}; {words}")
            changed.append(made)
        return torch.stack(changed)

    def _pool(self, split: Split) -> Pool:
        """The examples of a split; raises `TaskError` if they are too few for a task."""
        check_split(split)
        pools, shape = self.pools, self.input_shape
        if split not in pools:
            name, known = type(self).__name__, ", ".join(pools) or "no split"
            message = f"{name}: there are no classes of {split}; there are those of {known}"
            raise TaskError(message, block=name, field="split")
        if self.rotate and (len(shape) < 2 or shape[-1] != shape[-2]):
            raise self._error(
                "rotate",
                f"turns square images by quarter turns, and inputs are {list(shape)}; take rotate=False",
            )
        pool = pools[split]
        if self.unlabelled:
            self._check_ways({s: int(pool.counts.sum()) for s, pool in pools.items()}, split)
        else:
            self._check_ways({s: len(pool.counts) for s, pool in pools.items()}, split)
            least = int(pool.counts.argmin())
            self._check_examples(int(pool.counts[least]), f"{pool.names[least]} of {split}")
        return pool

    def _check_ways(self, classes: Mapping[Split, int], split: Split) -> None:
        """Raise `TaskError` for more ways than a split has of `classes`, whose numbers these are."""
        if ends(self.ways)[0] > classes[split]:
            there_are = ", ".join(f"{split} {count}" for split, count in classes.items())
            raise self._error(
                "ways",
                f"is {self.ways}, and the classes of its splits are {there_are}; ways is at most "
                f"{min(classes.values())}",
            )

    def _check_examples(self, examples: int, of: str) -> None:
        """Raise `TaskError` for more shots and queries than a class, `of`, has examples."""
        needed = ends(self.shots)[1] + self.queries
        if needed > examples:
            raise self._error(
                "shots",
                f"{self.shots} and queries {self.queries} need {needed} examples of every class, and "
                f"{of} has {examples}; shots + queries is at most {examples}, or add examples",
            )

    def _error(self, field: str, words: str) -> TaskError:
        return TaskError.about(type(self).__name__, field, words)


def check_apart(
    block: str, classes: Mapping[Split, Iterable[str]], *, by_case: bool = False
) -> None:
    """Raise `TaskError` for a class that stands in two splits.

    Names that differ in upper and lower case alone are one, unless `by_case` tells them apart.

    >>> check_apart("Classes", {"train": ["ant", "bee"], "test": ["Bee"]})
    Traceback (most recent call last):
    metablocks.errors.TaskError: Classes: the class "bee" of train is "Bee" of test, too; each split
    has classes of its own, with names that differ by more than upper and lower case
    """
    seen: dict[str, tuple[Split, str]] = {}
    for split, names in classes.items():
        for name in names:
            key = name if by_case else name.casefold()
            other_split, other = seen.setdefault(key, (split, name))
            if (other_split, other) != (split, name):
                differ = (
                    "" if by_case else ", with names that differ by more than upper and lower case"
                )
                raise TaskError(
                    f'{block}: the class "{other}" of {other_split} is "{name}" of {split}, too; each '
                    f"split has classes of its own{differ}",
                    block=block,
                )


def deal(names: Iterable[str], shares: tuple[float, float, float]) -> dict[Split, list[str]]:
    """Deal classes, by name, to the splits: sorted names of each.

    The order in which they are dealt is that of a hash of the name, so that no seed of a run matters.
    Validation and test take their shares, rounded, and train takes the rest.

    >>> deal(["ant", "bee", "cat", "dog", "eel"], (0.6, 0.2, 0.2))
    {'train': ['cat', 'dog', 'eel'], 'validation': ['bee'], 'test': ['ant']}
    """
    order = sorted(names, key=lambda name: hashlib.sha256(name_bytes(name)).digest())
    _, validation, test = (round(share * len(order)) for share in shares)
    parts = order[validation + test :], order[:validation], order[validation : validation + test]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def digest_of(description: Any, parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256, in hex, of a plain description and of bytes."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
