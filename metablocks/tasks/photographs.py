"""What the data sets of photographs with a published split of classes share: MiniImagenet, CifarFS."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from metablocks.tasks.base import Kind, Split
from metablocks.tasks.class_splits import ClassSplits
from metablocks.tasks.episodes import ClassBank, Ints, check_split, sample_episodes
from metablocks.tasks.named_classes import check_fields, check_images, class_numbers
from metablocks.types import TaskBatch

EXAMPLES = 600
"""Images of each class of the whole data set, of either."""


class Files(Protocol):
    """A module that finds and reads a data set."""

    def find(self, data: str | Path | None = None) -> Path | None: ...

    def load(self, data: str | Path | None = None) -> ClassBank: ...


@dataclass(frozen=True, kw_only=True)
class Photographs(ABC):
    """Tasks of square RGB images, of a published split; a data set says which, and where they lie."""

    splits: ClassVar[ClassSplits]
    size: ClassVar[int]
    """Height and width."""
    files: ClassVar[Files]

    ways: int
    shots: int
    queries: int
    seed: int = 0
    device: str | torch.device = "cpu"
    data: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(
            type(self).__name__,
            self.splits,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            seed=self.seed,
            examples=EXAMPLES,
        )
        if self.data is not None:
            self.files.find(self.data)

    @property
    def kind(self) -> Kind:
        return "classification"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def bank(self) -> ClassBank:
        """All images by class, uint8 `[100, images, 3, size, size]`, RGB, on the device."""
        return self._loaded[0]

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of the bank: names, shape, numbers of images, images."""
        return self._loaded[1]

    @cached_property
    def classes(self) -> dict[Split, Ints]:
        """The classes of each split: numbers of classes of `bank`, ascending."""
        return class_numbers(self.splits)

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
            seed=self.seed,
        )

    @cached_property
    def _loaded(self) -> tuple[ClassBank, str]:
        """The bank on the device, and its checksum, taken while the bank was on the host."""
        bank, name = self.files.load(self.data), type(self).__name__
        check_images(name, self.splits, bank, shots=self.shots, queries=self.queries)
        return bank.to(self.device), bank.checksum
