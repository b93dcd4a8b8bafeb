"""Omniglot: N-way K-shot tasks of 1623 handwritten characters by 20 drawers, 28×28.

Splits are of characters. `shuffled`: 1150 / 50 / 423 for train, validation, test, over all
characters regardless of alphabet (Antoniou, Edwards, Storkey 2018, "How to train your MAML").
`original`: the test characters are the 659 of the evaluation half, train and validation the 964 of
the background half, of which 50 validate (Lake, Salakhutdinov, Tenenbaum 2015). Which characters
these are is fixed by `SPLIT_SEED` and the characters' names; a run's seed does not matter, so no
run ever trains on another run's test characters.

A smaller data set in Omniglot's layout is split alike: `shuffled` tests on 423/1623 of its
characters, rounded, and either validates on 50, or on a quarter of those it validates and trains
on (`original`) or of all (`shuffled`), rounded down, if that is less than 50.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from metablocks.checks import checked
from metablocks.errors import TaskError
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.episode_sampling import Ints
from metablocks.tasks.image_sets import Bank, DecodedSet, cached
from metablocks.tasks.omniglot_drawings import (
    DRAWERS,
    FOLDER,
    HALVES,
    LAYOUT,
    SIZE,
    archive,
    files,
    read,
)
from metablocks.tasks.storage import Storage, fingerprint
from metablocks.torchvision_import import torchvision_module

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


def _holds(root: Path) -> bool:
    return all(archive(root, half).is_file() or (root / half).is_dir() for half in HALVES)


def _fetch(folder: Path) -> None:
    for background in (True, False):
        torchvision_module("datasets").Omniglot(str(folder), background=background, download=True)


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Omniglot(DecodedSet):
    """Tasks of Omniglot characters.

    Ink is 1, paper 0, 28×28. With `rotate`, every class of a training task turns by a multiple of 90°,
    drawn anew in every task, the same for its support and query images (Santoro et al. 2016);
    validation and test never turn, and the draws do not depend on `rotate`. `data` holds
    `omniglot-py`, which torchvision downloads; the decoded images are cached. Fields, shapes and
    errors: `metablocks.tasks.image_sets.ImageSet`.

    - `split`: "shuffled": all characters are dealt, 1150 / 50 / 423; "original": the evaluation
      half is for the test.

    >>> import metablocks as mb
    >>> source = mb.tasks.Omniglot(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs
    ((1, 28, 28), 5)
    >>> mb.tasks.Omniglot(ways=5, shots=10, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: Omniglot shots 10 and queries 15 need 25 examples of every class, and
    a class has 20; shots + queries is at most 20, or add examples
    """

    input_shape: ClassVar[tuple[int, ...]] = (1, SIZE, SIZE)
    examples: ClassVar[int | None] = DRAWERS
    storage: ClassVar[Storage] = Storage(
        "Omniglot",
        LAYOUT,
        ("", FOLDER),
        _holds,
        _fetch,
        keep=tuple(f"{FOLDER}/{half}.zip" for half in HALVES),
    )

    rotate: bool = True
    split: Division = "shuffled"

    @property
    def sizes(self) -> dict[Split, int]:
        return SIZES[self.split]

    def split_names(self, names: Iterable[str]) -> dict[Split, list[str]]:
        listed = list(names)
        return {s: [listed[n] for n in of] for s, of in divide(listed, self.split).items()}

    def load(self) -> Bank:
        """The bank of all characters, ink 255.

        Characters come in the order background, evaluation; in each by alphabet, then by character
        name; drawers 01 to 20. Names are `images_background/Greek/character01`. The bank is cached
        under a name made of the state of the data.
        """
        with self.storage.located(self.data) as root:
            state = fingerprint(root, (file for half in HALVES for file in files(root, half)))
            return cached(f"omniglot-{state[:20]}", lambda: read(root))


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
        first = _validating(len(order))
        validation, train = order[:first], order[first:]
    else:
        sizes, first = SIZES[division], _validating(len(order))
        second = first + round(len(order) * sizes["test"] / sum(sizes.values()))
        validation, test, train = order[:first], order[first:second], order[second:]
    parts = zip(SPLITS, (train, validation, test), strict=True)
    return {split: np.array(sorted(part), dtype=np.int64) for split, part in parts}


def _validating(characters: int) -> int:
    return min(SIZES["shuffled"]["validation"], characters // 4)


def _deal(name: str) -> str:
    character = name.partition("/")[2]
    return hashlib.sha256(f"{SPLIT_SEED}/{character}".encode()).hexdigest()
