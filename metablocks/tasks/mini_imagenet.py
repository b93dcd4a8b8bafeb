"""Mini-ImageNet: N-way K-shot tasks of 100 ImageNet classes, 600 photographs each, 84×84 RGB.

The classes of train, validation and test are the published 64 / 16 / 20; see
`metablocks.tasks.class_splits` for the list, `metablocks.tasks.mini_imagenet_files` for the layouts
on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from metablocks.tasks import mini_imagenet_files
from metablocks.tasks.base import Kind, Split
from metablocks.tasks.class_splits import MINI_IMAGENET
from metablocks.tasks.episodes import ClassBank, Ints, check_split, sample_episodes
from metablocks.tasks.mini_imagenet_files import SIZE
from metablocks.tasks.named_classes import check_fields, check_images, class_numbers
from metablocks.types import TaskBatch

EXAMPLES = 600
"""Images of each class of the whole data set."""


@dataclass(frozen=True, kw_only=True)
class MiniImagenet:
    """Tasks of mini-ImageNet photographs, of the published 64 / 16 / 20 classes.

    `sample` returns inputs float32 in [0, 1], RGB, `[tasks, ways * examples, 3, 84, 84]`, and
    targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. Classes
    may hold unequal numbers of images; each draws among its own.

    The images are read at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked where there is no data. `data` is the folder that holds `mini_imagenet`,
    or that folder; without it `$METABLOCKS_DATA` and the cache folder are searched. There is no
    download. The decoded images, 1.3 GB of the whole data set, are kept in the cache folder, if it
    can be written, so that the next start takes seconds.

    Raises, when built, `TaskError` for fields out of range (`ways` is at most 16, the classes of
    the validation split; shots + queries at most 600) and `DataError` for a `data` without
    mini-ImageNet. Raises, at first use, `DataError` where the data is absent, incomplete or
    unreadable, and `TaskError` where a class has fewer than shots + queries images.

    Source: Vinyals et al. 2016 (the images); Ravi, Larochelle 2017 (the split).

    >>> source = MiniImagenet(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, [len(source.classes[s]) for s in source.classes]
    ((3, 84, 84), 5, [64, 16, 20])
    >>> MiniImagenet(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: MiniImagenet: ways=20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    ways: int
    shots: int
    queries: int
    seed: int = 0
    device: str | torch.device = "cpu"
    data: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(
            "MiniImagenet",
            MINI_IMAGENET,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            seed=self.seed,
            examples=EXAMPLES,
        )
        if self.data is not None:
            mini_imagenet_files.find(self.data)

    @property
    def kind(self) -> Kind:
        return "classification"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, SIZE, SIZE)

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def bank(self) -> ClassBank:
        """All images by class, uint8 `[100, images, 3, 84, 84]`, RGB, on the device."""
        return self._loaded[0]

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of the bank: names, shape, numbers of images, images."""
        return self._loaded[1]

    @cached_property
    def classes(self) -> dict[Split, Ints]:
        """The classes of each split: numbers of classes of `bank`, ascending."""
        return class_numbers(MINI_IMAGENET)

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
        bank = mini_imagenet_files.load(self.data)
        check_images("MiniImagenet", MINI_IMAGENET, bank, shots=self.shots, queries=self.queries)
        return bank.to(self.device), bank.checksum
