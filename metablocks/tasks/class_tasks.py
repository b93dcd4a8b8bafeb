"""The base of sources over data of one's own: N-way K-shot tasks of examples by class.

A source gives a `Pool` of examples for each split; which classes and examples a task takes is drawn
by `episode_sampling.draw_episodes`, from (seed, split, index) and the numbers of examples alone.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from metablocks.checks import Count, CountFrom0, Device, Such
from metablocks.errors import TaskError
from metablocks.tasks.base import SPLITS, Kind, Split, check_split
from metablocks.tasks.episode_sampling import Ints, Ways, draw_episodes, episode_tasks, turn
from metablocks.types import TaskBatch

Shares = Annotated[
    tuple[float, float, float],
    Such(
        lambda shares: min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6,
        "three shares (train, validation, test) that add up to 1",
    ),
]


class Pool(Protocol):
    """The examples of a split by class, class after class."""

    names: Sequence[str]
    """The names of the classes."""
    counts: Ints
    """The number of examples of each class."""

    def take(self, rows: Ints) -> Tensor:
        """The examples of the numbers `rows`, which count through all classes: `[rows, ...]`."""


@dataclass(frozen=True, kw_only=True)
class ClassTasks(ABC):
    """N-way K-shot tasks of examples by class, each split with classes of its own."""

    kind: ClassVar[Kind] = "classification"

    ways: Ways
    shots: Count
    queries: Count
    rotate: bool = False
    seed: CountFrom0 = 0
    device: Device = "cpu"

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an example."""

    @property
    def outputs(self) -> int:
        return self.ways

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

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split."""
        pool = self._pool(split)
        drawn = draw_episodes(
            split,
            indices,
            classes=len(pool.counts),
            examples=pool.counts,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            rotate=self.rotate and split == "train",
            seed=self.seed,
        )
        first = np.cumsum(pool.counts) - pool.counts
        rows = first[drawn.classes][..., None] + drawn.examples
        examples = pool.take(rows.reshape(-1)).to(self.device)
        examples = examples.view(*rows.shape, *examples.shape[1:])
        if drawn.turns.any():
            examples = turn(examples, torch.from_numpy(drawn.turns).to(examples.device))
        return episode_tasks(examples, self.shots)

    def _pool(self, split: Split) -> Pool:
        """The examples of a split; raises `TaskError` if they are too few for a task."""
        check_split(split)
        name, pools = type(self).__name__, self.pools
        if split not in pools:
            raise TaskError(
                f"{name}: there are no classes of {split}; there are those of {', '.join(pools)}",
                block=name,
                field="split",
            )
        pool = pools[split]
        if self.ways > len(pool.counts):
            there_are = ", ".join(f"{split} {len(pools[split].counts)}" for split in pools)
            most = min(len(pool.counts) for pool in pools.values())
            raise TaskError(
                f"{name}: ways={self.ways}, and the classes of its splits are {there_are}; ways is "
                f"at most {most}",
                block=name,
                field="ways",
            )
        needed, fewest = self.shots + self.queries, int(pool.counts.min())
        if needed > fewest:
            fewest_of = pool.names[int(pool.counts.argmin())]
            raise TaskError(
                f"{name}: shots={self.shots} and queries={self.queries} need {needed} examples of "
                f"every class, and {fewest_of} of {split} has {fewest}; shots + queries is at most "
                f"{fewest}, or add examples",
                block=name,
                field="shots",
            )
        return pool


def check_apart(block: str, classes: Mapping[Split, Iterable[str]]) -> None:
    """Raise `TaskError` for a class that stands in two splits; names that differ in case are one.

    >>> check_apart("Classes", {"train": ["ant", "bee"], "test": ["Bee"]})
    Traceback (most recent call last):
    metablocks.errors.TaskError: Classes: the class "bee" of train is "Bee" of test, too; each split
    has classes of its own, with names that differ by more than upper and lower case
    """
    seen: dict[str, tuple[Split, str]] = {}
    for split, names in classes.items():
        for name in names:
            other_split, other = seen.setdefault(name.casefold(), (split, name))
            if (other_split, other) != (split, name):
                raise TaskError(
                    f'{block}: the class "{other}" of {other_split} is "{name}" of {split}, too; each '
                    "split has classes of its own, with names that differ by more than upper and "
                    "lower case",
                    block=block,
                )


def deal(names: Iterable[str], shares: tuple[float, float, float]) -> dict[Split, list[str]]:
    """Deal classes, by name, to the splits: sorted names of each.

    The order in which they are dealt is that of a hash of the name, so that no seed of a run matters.
    Validation and test take their shares, rounded, and train takes the rest.

    >>> deal(["ant", "bee", "cat", "dog", "eel"], (0.6, 0.2, 0.2))
    {'train': ['cat', 'dog', 'eel'], 'validation': ['bee'], 'test': ['ant']}
    """
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    _, validation, test = (round(share * len(order)) for share in shares)
    parts = order[validation + test :], order[:validation], order[validation : validation + test]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def digest_of(description: Any, parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256, in hex, of a plain description and of bytes."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
