"""Data sets of torchvision for the source `Episodes` in recipes: all examples of every class.

Each function puts the halves of a data set together, so that `splits` of the source can part its
classes. torchvision's folder of it is looked for in `data`, `$METABLOCKS_DATA` and the cache folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch.utils.data import ConcatDataset

from metablocks.checks import checked
from metablocks.errors import TaskError
from metablocks.tasks.storage import Storage, reading
from metablocks.torchvision_import import torchvision_module

Data: TypeAlias = str | Path | None
Examples: TypeAlias = ConcatDataset[Any]

_EVALUATED = 964  # the number of the first character of Omniglot's second half


@checked(TaskError)
def emnist(
    *, split: Literal["letters", "balanced", "byclass", "digits"] = "letters", data: Data = None
) -> Examples:
    """Handwritten letters or digits, grey, 28×28. Source: Cohen, Afshar, Tapson, van Schaik 2017."""
    halves = [{"split": split, "train": train} for train in (True, False)]
    return _together("EMNIST", "EMNIST", data, halves)


@checked(TaskError)
def fgvc_aircraft(
    *, level: Literal["variant", "family", "manufacturer"] = "variant", data: Data = None
) -> Examples:
    """Photographs of aircraft, of any size. Source: Maji, Rahtu, Kannala, Blaschko, Vedaldi 2013."""
    halves = [{"split": split, "annotation_level": level} for split in ("trainval", "test")]
    return _together("FGVCAircraft", "fgvc-aircraft-2013b", data, halves)


@checked(TaskError)
def flowers102(*, data: Data = None) -> Examples:
    """Photographs of flowers, of any size, 102 kinds. Source: Nilsback, Zisserman 2008."""
    halves = [{"split": split} for split in ("train", "val", "test")]
    return _together("Flowers102", "flowers-102", data, halves)


@checked(TaskError)
def cifar100(*, data: Data = None) -> Examples:
    """Photographs, 32×32, of 100 kinds. Source: Krizhevsky 2009."""
    halves = [{"train": train} for train in (True, False)]
    return _together("CIFAR100", "cifar-100-python", data, halves)


@checked(TaskError)
def omniglot_characters(*, data: Data = None) -> Examples:
    """Drawn characters, 105×105, of both halves. Source: Lake, Salakhutdinov, Tenenbaum 2015."""
    halves = [
        {"background": True},
        {"background": False, "target_transform": lambda label: _EVALUATED + label},
    ]
    return _together("Omniglot", "omniglot-py", data, halves)


DATASETS: dict[str, Callable[..., Examples]] = {
    block.__name__: block
    for block in (emnist, fgvc_aircraft, flowers102, cifar100, omniglot_characters)
}
"""The data sets of recipes by name."""


def _together(name: str, folder: str, data: Data, halves: list[dict[str, Any]]) -> Examples:
    storage = Storage(
        f"torchvision's {name}",
        f"the parent of a folder {folder}/",
        lambda place: place if (place / folder).is_dir() else None,
        terms=f"torchvision.datasets.{name}(FOLDER, download=True) does it",
    )
    with storage.located(data) as root, reading(root / folder, f"torchvision's {name}"):
        dataset = getattr(torchvision_module("datasets"), name)
        return ConcatDataset([dataset(str(root), **options) for options in halves])
