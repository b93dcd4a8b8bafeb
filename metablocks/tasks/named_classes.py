"""Data sets whose classes have names and a published split: numbers, checks, the bank.

The classes of a bank stand in the order of the split's list: train, validation, test.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.errors import DataError, TaskError, suggest
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_splits import ClassSplits
from metablocks.tasks.episodes import ClassBank, Ints, check_episodes

Bytes = NDArray[np.uint8]

_NAMED = 5  # classes that an error lists before it counts the rest


def class_names(splits: ClassSplits) -> tuple[str, ...]:
    """The classes of a bank: those of train, then of validation, then of test."""
    return tuple(name for split in SPLITS for name in splits[split])


def class_numbers(splits: ClassSplits) -> dict[Split, Ints]:
    """The classes of each split: their positions in `class_names(splits)`, ascending.

    >>> class_numbers({"train": ("ant", "cat"), "validation": ("bee",), "test": ("dog",)})
    {'train': array([0, 1]), 'validation': array([2]), 'test': array([3])}
    """
    ends = np.cumsum([len(splits[split]) for split in SPLITS])
    parts = np.split(np.arange(ends[-1], dtype=np.int64), ends[:-1])
    return dict(zip(SPLITS, parts, strict=True))


def check_fields(
    block: str,
    splits: ClassSplits,
    *,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    examples: int,
) -> None:
    """Raise `TaskError` for an episode that a split, or `examples` images a class, cannot give."""
    check_episodes(block, ways=ways, shots=shots, queries=queries, seed=seed, examples=examples)
    most = min(len(names) for names in splits.values())
    if ways > most:
        held = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise TaskError(
            f"{block}: ways={ways}, and the classes of its splits are {held}; "
            f"ways is at most {most}",
            block=block,
            field="ways",
        )


def check_present(
    place: str, splits: ClassSplits, present: Iterable[str], near: Iterable[str] = ()
) -> None:
    """Raise `DataError` for the first split that lacks classes in `place`.

    `near`: names that are there and mean nothing, one of which may be a class mistyped.

    >>> splits = {"train": ("ant", "cat"), "validation": ("bee",), "test": ("dog",)}
    >>> check_present("/data", splits, ["ant", "bee", "dog"], near=["cats"])
    Traceback (most recent call last):
    metablocks.errors.DataError: /data: holds 1 of the 2 classes of train; missing: cat; did you
    mean "cats"?
    """
    there = set(present)
    for split in SPLITS:
        missing = [name for name in splits[split] if name not in there]
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise DataError(
                f"{place}: holds {len(splits[split]) - len(missing)} of the "
                f"{len(splits[split])} classes of {split}; missing: "
                f"{', '.join(missing[:_NAMED])}{more}{suggest(missing[0], near)}"
            )


def check_images(
    block: str, splits: ClassSplits, bank: ClassBank, *, shots: int, queries: int
) -> None:
    """Raise `TaskError` naming the smallest class, where it is too small for an episode."""
    counts = bank.counts or (bank.examples,) * bank.classes
    fewest = min(counts)
    if shots + queries <= fewest:
        return
    name = class_names(splits)[counts.index(fewest)]
    split = next(split for split in SPLITS if name in splits[split])
    raise TaskError(
        f"{block}: shots={shots} and queries={queries} need {shots + queries} images of every "
        f"class, and {name} ({split}) has {fewest}; shots + queries is at most {fewest}, "
        "or add images",
        block=block,
        field="shots",
    )


def stack_classes(
    names: Sequence[str], counts: Sequence[int], classes: Iterable[Bytes]
) -> ClassBank:
    """The bank of classes `[count, channels, height, width]` that come one after another.

    The bank's memory is taken once, and one class at a time beside it. Smaller classes are padded.
    """
    images: Bytes | None = None
    for number, (count, own) in enumerate(zip(counts, classes, strict=True)):
        if images is None:
            images = np.zeros((len(counts), max(counts), *own.shape[1:]), dtype=np.uint8)
        images[number, :count] = own
    assert images is not None
    unequal = tuple(counts) if len(set(counts)) > 1 else None
    return ClassBank(torch.from_numpy(images), tuple(names), unequal)
