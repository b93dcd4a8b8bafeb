"""Data sets of torchvision for the source `Episodes` in recipes: all examples of every class.

Each function puts the halves of a data set together, so that `splits` of the source can part its
classes. `folder` is torchvision's `root`, the parent of its folder of the data set.

Raise `TaskError` for a folder without the data set, and `DataError` for one that cannot be read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch.utils.data import ConcatDataset

from metablocks.checks import checked
from metablocks.errors import TaskError
from metablocks.tasks.storage import reading
from metablocks.torchvision_import import torchvision_module

Examples: TypeAlias = ConcatDataset[Any]

_EVALUATED = 964  # the number of the first character of Omniglot's second half


@checked(TaskError)
def emnist(
    *, folder: str | Path, split: Literal["letters", "balanced", "byclass", "digits"] = "letters"
) -> Examples:
    """Handwritten letters or digits, grey, 28×28.

    - `folder`: torchvision's `root`, the parent of its folder of the data set.
    - `split`: which characters: see `torchvision.datasets.EMNIST`.

    Source: Cohen, Afshar, Tapson, van Schaik 2017.
    """
    halves = [{"split": split, "train": train} for train in (True, False)]
    return _together("EMNIST", "EMNIST", folder, halves)


@checked(TaskError)
def fgvc_aircraft(
    *, folder: str | Path, level: Literal["variant", "family", "manufacturer"] = "variant"
) -> Examples:
    """Photographs of aircraft, of any size.

    - `folder`: torchvision's `root`, the parent of its folder of the data set.
    - `level`: what makes a class.

    Source: Maji, Rahtu, Kannala, Blaschko, Vedaldi 2013.
    """
    halves = [{"split": split, "annotation_level": level} for split in ("trainval", "test")]
    return _together("FGVCAircraft", "fgvc-aircraft-2013b", folder, halves)


@checked(TaskError)
def flowers102(*, folder: str | Path) -> Examples:
    """Photographs of flowers, of any size, 102 kinds.

    - `folder`: torchvision's `root`, the parent of its folder of the data set.

    Source: Nilsback, Zisserman 2008.
    """
    halves = [{"split": split} for split in ("train", "val", "test")]
    return _together("Flowers102", "flowers-102", folder, halves)


@checked(TaskError)
def cifar100(*, folder: str | Path) -> Examples:
    """Photographs, 32×32, of 100 kinds.

    - `folder`: torchvision's `root`, the parent of its folder of the data set.

    Source: Krizhevsky 2009.
    """
    halves = [{"train": train} for train in (True, False)]
    return _together("CIFAR100", "cifar-100-python", folder, halves)


@checked(TaskError)
def omniglot_characters(*, folder: str | Path) -> Examples:
    """Drawn characters, 105×105, of both halves.

    - `folder`: torchvision's `root`, the parent of its folder of the data set.

    Source: Lake, Salakhutdinov, Tenenbaum 2015.
    """
    halves: list[dict[str, Any]] = [
        {"background": True},
        {"background": False, "target_transform": lambda label: _EVALUATED + label},
    ]
    return _together("Omniglot", "omniglot-py", folder, halves)


DATASETS: dict[str, Callable[..., Examples]] = {
    block.__name__: block
    for block in (emnist, fgvc_aircraft, flowers102, cifar100, omniglot_characters)
}
"""The data sets of recipes by name."""


def _together(name: str, below: str, folder: str | Path, halves: list[dict[str, Any]]) -> Examples:
    root = Path(os.path.expanduser(folder))
    if not (root / below).is_dir():
        raise TaskError(
            f"{name}: folder is {str(folder)!r}, and has no folder {below}; "
            f"torchvision.datasets.{name}({str(folder)!r}, download=True) makes it",
            field="folder",
        )
    with reading(root / below, f"torchvision's {name}"):
        dataset = getattr(torchvision_module("datasets"), name)
        return ConcatDataset([dataset(str(root), **options) for options in halves])
