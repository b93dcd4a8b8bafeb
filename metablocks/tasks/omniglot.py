"""Omniglot: N-way K-shot tasks of 1623 handwritten characters by 20 drawers, 28×28.

Splits are of characters. `shuffled`: 1150 / 50 / 423 for train, validation, test, over all
characters regardless of alphabet (Antoniou, Edwards, Storkey 2018, "How to train your MAML").
`original`: the test characters are the 659 of the evaluation half, train and validation the 964 of
the background half, of which 50 validate (Lake, Salakhutdinov, Tenenbaum 2015). Which characters
these are is fixed by `SPLIT_SEED` and the characters' names; the seed of a run has no say, so no
run ever trains on another run's test characters.

A smaller data set in Omniglot's layout is split alike: `shuffled` tests on 423/1623 of its
characters, rounded, and either validates on 50, or on a quarter of those it validates and trains
on (`original`) or of all (`shuffled`), rounded down, where that is less than 50.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from metablocks.checks import choice
from metablocks.errors import TaskError
from metablocks.tasks import omniglot_files
from metablocks.tasks.base import SPLITS, Kind, Split
from metablocks.tasks.episodes import (
    ClassBank,
    Ints,
    check_episodes,
    check_split,
    sample_episodes,
)
from metablocks.tasks.omniglot_drawings import DRAWERS, HALVES, SIZE
from metablocks.types import TaskBatch

Division: TypeAlias = Literal["shuffled", "original"]

SPLIT_SEED = 20150
"""Fixes the order in which characters are dealt to the splits; no run changes it."""

CHECKSUM = "04cd7906e1f18236643d3644f929fcdade6bbb9ad5bf1beec96d31b362ce6918"
"""Checksum of the bank of the whole data set."""

SIZES: dict[Division, dict[Split, int]] = {
    "shuffled": {"train": 1150, "validation": 50, "test": 423},
    "original": {"train": 914, "validation": 50, "test": 659},
}
"""Characters of each split of the whole data set."""


@dataclass(frozen=True, kw_only=True)
class Omniglot:
    """Tasks of Omniglot characters.

    `sample` returns inputs float32 in [0, 1], ink 1, `[tasks, ways * examples, 1, 28, 28]`, and
    targets int64 `[tasks, ways * examples]`, class-major. With `rotate`, every class of a training
    task turns by a multiple of 90°, drawn anew in every task, the same for its support and query
    images (Santoro et al. 2016); validation and test never turn. Obeys the law of `TaskSource`;
    the draws do not depend on `rotate`.

    The images are read at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked where there is no data. `data` is the folder that holds `omniglot-py`, or
    that folder; see `metablocks.tasks.omniglot_files` for the search, the download and the cache.

    Raises, when built, `TaskError` for fields out of range (`ways` is at most 50, the characters
    of the validation split; shots + queries at most 20) and `DataError` for a `data` without
    Omniglot. Raises, at first use, `DataError` where the data is absent, incomplete or unreadable,
    and `TaskError` where a smaller data set has fewer than `ways` characters in a split.

    >>> source = Omniglot(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs
    ((1, 28, 28), 5)
    >>> Omniglot(ways=5, shots=10, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: Omniglot: shots=10 and queries=15 need 25 images of every class,
    and a class has 20; shots + queries is at most 20
    """

    ways: int
    shots: int
    queries: int
    rotate: bool = True
    split: Division = "shuffled"
    seed: int = 0
    device: str | torch.device = "cpu"
    data: str | Path | None = None

    def __post_init__(self) -> None:
        check_episodes(
            "Omniglot",
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            seed=self.seed,
            examples=DRAWERS,
        )
        if not isinstance(self.rotate, bool):
            raise TaskError(f"Omniglot: rotate={self.rotate!r}; rotate is True or False")
        choice("Omniglot", "split", self.split, Division, error=TaskError)
        self._check_ways(SIZES[self.split])
        if self.data is not None:
            omniglot_files.find(self.data)

    @property
    def kind(self) -> Kind:
        return "classification"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, SIZE, SIZE)

    @property
    def outputs(self) -> int:
        return self.ways

    @cached_property
    def bank(self) -> ClassBank:
        """All characters, uint8 `[characters, 20, 28, 28]`, ink 255, on the device."""
        return self._loaded.to(self.device)

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of the bank: names, shape, images. `CHECKSUM` for the whole data set."""
        return self._loaded.checksum

    @cached_property
    def classes(self) -> dict[Split, Ints]:
        """The characters of each split: numbers of classes of `bank`, ascending."""
        names = self._loaded.names
        assert names is not None
        classes = divide(names, self.split)
        self._check_ways({split: len(numbers) for split, numbers in classes.items()})
        return classes

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
            rotate=self.rotate and split == "train",
            seed=self.seed,
        )

    @cached_property
    def _loaded(self) -> ClassBank:
        return omniglot_files.load(self.data)

    def _check_ways(self, sizes: dict[Split, int]) -> None:
        if self.ways > min(sizes.values()):
            held = ", ".join(f"{split} {size}" for split, size in sizes.items())
            raise TaskError(
                f"Omniglot: ways={self.ways}, and the characters of split={self.split!r} are "
                f"{held}; ways is at most {min(sizes.values())}",
                block="Omniglot",
                field="ways",
            )


def divide(names: Sequence[str], division: Division) -> dict[Split, Ints]:
    """Deal characters, by name, to train, validation and test: ascending positions in `names`.

    A name is `images_background/<Alphabet>/<character>` or `images_evaluation/…`. Characters are
    dealt in the order of a hash of (`SPLIT_SEED`, alphabet, character): the first to validation,
    the next to test, the rest to train. `original` tests on the whole evaluation half instead.

    >>> names = [f"images_background/Greek/character{n:02d}" for n in range(1, 25)]
    >>> {split: len(numbers) for split, numbers in divide(names, "shuffled").items()}
    {'train': 12, 'validation': 6, 'test': 6}
    """
    evaluation = HALVES[1] + "/"
    order = sorted(range(len(names)), key=lambda number: _deal(names[number]))
    if division == "original":
        test = [number for number in order if names[number].startswith(evaluation)]
        order = [number for number in order if not names[number].startswith(evaluation)]
        validation, train = _split_off(order, _validating(len(order)))
    else:
        sizes = SIZES[division]
        validation, rest = _split_off(order, _validating(len(order)))
        test, train = _split_off(rest, round(len(order) * sizes["test"] / sum(sizes.values())))
    parts = zip(SPLITS, (train, validation, test), strict=True)
    return {split: np.array(sorted(part), dtype=np.int64) for split, part in parts}


def _validating(characters: int) -> int:
    return min(SIZES["shuffled"]["validation"], characters // 4)


def _split_off(order: list[int], count: int) -> tuple[list[int], list[int]]:
    return order[:count], order[count:]


def _deal(name: str) -> str:
    character = name.partition("/")[2]
    return hashlib.sha256(f"{SPLIT_SEED}/{character}".encode()).hexdigest()
