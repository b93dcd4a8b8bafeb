"""The bases of published image sets: found or downloaded, their classes of a split published, too.

The images of a `DecodedSet` lie in memory, class after class; those of a set of files are read when
they are drawn (`metablocks.tasks.file_sets`).
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metablocks.errors import DataError, suggest
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_tasks import (
    ClassTasks,
    Pool,
    digest_of,
    numbered,
    rows_of,
)
from metablocks.tasks.storage import Storage, cache_folder, check_file, replacing

ClassNames: TypeAlias = Mapping[Split, Iterable[str]]
"""The names of the classes of each split."""

FORMAT = 2  # of decoded sets in the cache folder: raise it when the images or their order change
_LISTED = 5  # classes that an error lists before it counts the rest


@dataclass(frozen=True, kw_only=True)
class ImageSet(ClassTasks):
    """Tasks of a published set of images by class.

    `sample` returns inputs float32 in [0, 1], `[tasks, ways * examples, *input_shape]`, and targets
    int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. Classes of a smaller
    copy may hold unequal numbers of images; each draws among its own.

    Files are read at the first use of `sample` or `checksum`, so that a source can be described and
    checked without data. `data` is the folder of the set, or its parent; without it
    `$METABLOCKS_DATA` and the cache folder are searched, and what has a download is downloaded.

    Raises, when built, `TaskError` for fields out of range (`ways` above the `sizes`, shots + queries
    above `examples`) and `DataError` for a `data` without the set. Raises, at first use, `DataError`
    if the data is absent, incomplete or unreadable, and `TaskError` if a smaller copy has fewer
    classes or images than a task takes.
    """

    storage: ClassVar[Storage]
    examples: ClassVar[int | None] = None
    """Images of each class of the whole set, if all have as many."""

    data: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples is not None and not self.unlabelled:
            self._check_examples(self.examples, "a class")
        for split in () if self.unlabelled else SPLITS:
            self._check_ways(self.sizes, split)
        if self.data is not None:
            self.storage.find(self.data)

    @property
    @abstractmethod
    def sizes(self) -> Mapping[Split, int]:
        """Classes of each split of the whole set."""


@dataclass(frozen=True)
class Bank:
    """Images by class, class after class, `[images, channels, height, width]` uint8.

    `counts`: the number of images of each class.
    """

    counts: Mapping[str, int]
    images: Tensor

    @cached_property
    def checksum(self) -> str:
        """SHA-256, in hex, of names, numbers and images."""
        shape = self.images.shape[2 if self.images.shape[1] == 1 else 1 :]
        counts = list(self.counts.values())
        unequal = [counts] if len(set(counts)) > 1 else []
        described = [list(self.counts), [len(counts), max(counts), *shape], *unequal]
        return digest_of(described, [self.images.cpu().contiguous().numpy().data])


@dataclass(frozen=True, kw_only=True)
class DecodedSet(ImageSet):
    """A set whose images are decoded at the first use and stay in memory, uint8, on the device."""

    @abstractmethod
    def load(self) -> Bank:
        """All images by class, on the CPU."""

    @abstractmethod
    def split_names(self, names: Iterable[str]) -> ClassNames:
        """The names of each split's classes, of all `names`."""

    @cached_property
    def bank(self) -> Bank:
        """All images by class, on the device."""
        bank = self.load()
        return replace(bank, images=bank.images.to(self.device))

    @cached_property
    def pools(self) -> dict[Split, Pool]:
        """The images of each split."""
        rows, read = numbered(self.bank.counts), rows_of(self.bank.images)
        named = self.split_names(self.bank.counts)
        return {s: Pool.of({name: rows[name] for name in named[s]}, read) for s in SPLITS}

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of the bank: names of classes, numbers of images, images."""
        for split in SPLITS:
            self._pool(split)
        return self.bank.checksum


def check_present(
    place: str, splits: ClassNames, present: Iterable[str], near: Iterable[str] = ()
) -> None:
    """Raise `DataError` for the first split that lacks classes in `place`.

    `near`: other names that are there, one of which may be a class mistyped.

    >>> splits = {"train": ("ant", "cat"), "validation": ("bee",), "test": ("dog",)}
    >>> check_present("/data", splits, ["ant", "bee", "dog"], near=["cats"])
    Traceback (most recent call last):
    metablocks.errors.DataError: /data: holds 1 of the 2 classes of train; missing: cat; did you
    mean "cats"?
    """
    present = set(present)
    for split, names in splits.items():
        listed = list(names)
        missing = [name for name in listed if name not in present]
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise DataError(
                f"{place}: holds {len(listed) - len(missing)} of the {len(listed)} classes of {split}; "
                f"missing: {', '.join(missing[:_LISTED])}{more}{suggest(missing[0], near)}"
            )


def cached(name: str, read: Callable[[], Bank]) -> Bank:
    """The bank `name` of the cache folder; else `read()`, written there if the folder can be written.

    A bank is written whole or not at all, and checked against its checksum when it is loaded; one
    that is damaged, in whatever way, is read anew. `name` holds a `fingerprint` of the data.
    """
    path = cache_folder() / f"{name}-{FORMAT}.npz"
    with contextlib.suppress(Exception):  # damaged bytes raise whatever they happen to mean
        return _load(path)
    bank = read()
    with contextlib.suppress(OSError):
        _save(path, bank)
    return bank


def _load(path: Path) -> Bank:
    check_file(path)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        names, counts = stored["names"].tolist(), stored["counts"].tolist()
        bank = Bank(dict(zip(names, counts, strict=True)), torch.from_numpy(stored["images"]))
        if str(stored["checksum"]) != bank.checksum or sum(counts) != len(bank.images):
            raise ValueError("the checksum written with the bank is not the bank's")
    return bank


def _save(path: Path, bank: Bank) -> None:
    with replacing(path) as file:
        np.savez(
            file,
            images=bank.images.numpy(),
            names=np.array(list(bank.counts)),
            counts=np.array(list(bank.counts.values()), dtype=np.int64),
            checksum=np.array(bank.checksum),
        )
