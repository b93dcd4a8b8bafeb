"""The base of image sets: N-way K-shot tasks drawn from a class bank and a split of its classes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.checks import Count, CountFrom0, Device
from metablocks.errors import TaskError
from metablocks.tasks.base import SPLITS, Kind, Split, check_split
from metablocks.tasks.episode_sampling import ClassBank, Ints, Ways, check_examples, sample_episodes
from metablocks.tasks.storage import Storage
from metablocks.types import TaskBatch

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ImageTasks(ABC):
    """Tasks of images by class. A data set says how its bank is loaded and its classes are split.

    `sample` returns inputs float32 in [0, 1], `[tasks, ways * examples, *input_shape]`, and targets
    int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. If classes hold
    unequal numbers of images, each draws among its own.

    The images are loaded at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked without data.

    Raises, when built, `TaskError` for fields out of range and `DataError` for a `data` without the
    data set; at first use `TaskError` for a class with fewer than shots + queries images.
    """

    kind: ClassVar[Kind] = "classification"
    examples: ClassVar[int | None] = None
    """Images of each class of the whole data set, if that is known before it is loaded."""
    storage: ClassVar[Storage]

    ways: Ways
    shots: Count
    queries: Count
    data: str | Path | None = None
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if self.examples is not None:
            check_examples(type(self).__name__, self.shots, self.queries, self.examples)
        if self.data is not None:
            self.storage.find(self.data)

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)` of an image."""

    @property
    def outputs(self) -> int:
        return self.ways

    @abstractmethod
    def load(self) -> ClassBank:
        """All images by class, on the CPU."""

    @property
    @abstractmethod
    def classes(self) -> Mapping[Split, Ints]:
        """The classes of each split: numbers of classes of `bank`, ascending."""

    def rotates(self, split: Split) -> bool:
        """True if the classes of a task of this split turn by multiples of 90°."""
        return False

    @cached_property
    def bank(self) -> ClassBank:
        """All images by class, uint8 `[classes, images, *input_shape]`, on the device."""
        bank = self.load()
        counts = bank.counts or (bank.examples,)
        fewest, needed = min(counts), self.shots + self.queries
        if needed > fewest:
            name = bank.names[counts.index(fewest)] if bank.names else counts.index(fewest)
            raise TaskError(
                f"{type(self).__name__}: shots={self.shots} and queries={self.queries} need {needed} "
                f"images of every class, and {name} has {fewest}; shots + queries is at most "
                f"{fewest}, or add images",
                block=type(self).__name__,
                field="shots",
            )
        return bank.to(self.device)

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of the bank: names, shape, numbers of images, images."""
        return self.bank.checksum

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split."""
        check_split(split)
        return sample_episodes(
            self.bank,
            self.classes[split],
            split,
            indices,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            rotate=self.rotates(split),
            seed=self.seed,
        )

    def check_ways(self, sizes: Mapping[Split, int]) -> None:
        """Raise `TaskError` if a split has fewer than `ways` classes; `sizes` numbers them."""
        most = min(sizes.values())
        if self.ways > most:
            available = ", ".join(f"{split} {sizes[split]}" for split in SPLITS)
            raise TaskError(
                f"{type(self).__name__}: ways={self.ways}, and the classes of its splits are "
                f"{available}; ways is at most {most}",
                block=type(self).__name__,
                field="ways",
            )


def stack_classes(
    names: Sequence[str], counts: Sequence[int], classes: Iterable[Bytes]
) -> ClassBank:
    """The bank of classes `[count, channels, height, width]` that come one after another.

    The bank's memory is taken once, and one class at a time beside it. Smaller classes are padded.
    """
    images: Bytes | None = None
    for number, (count, class_images) in enumerate(zip(counts, classes, strict=True)):
        if images is None:
            shape = (len(counts), max(counts), *class_images.shape[1:])
            images = np.zeros(shape, dtype=np.uint8)
        images[number, :count] = class_images
    assert images is not None
    unequal = tuple(counts) if len(set(counts)) > 1 else None
    return ClassBank(torch.from_numpy(images), tuple(names), unequal)
