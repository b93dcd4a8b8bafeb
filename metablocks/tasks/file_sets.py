"""Published sets of image files, read when they are drawn: CUB-200-2011 and tieredImageNet.

Both are photographs in a folder for each class, of any size, made RGB of `size` (84×84) by
`metablocks.tasks.image_files.decode`. Neither is downloaded.

CUB: 200 kinds of birds, 11 788 photographs, from https://www.vision.caltech.edu/datasets/cub_200_2011/
(Wah, Branson, Welinder, Perona, Belongie, "The Caltech-UCSD Birds-200-2011 Dataset", 2011). Its split
is that of Chen, Liu, Kira, Wang, Huang, "A Closer Look at Few-shot Classification", ICLR 2019
(github.com/wyharveychen/CloserLookFewShot, filelists/CUB): in the order of their numbers from 0, every
second class trains, and the others validate and test by turns.

tieredImageNet: 608 classes of ImageNet, 779 165 photographs (Ren, Triantafillou, Ravi, Snell, Swersky,
Tenenbaum, Larochelle, Zemel, "Meta-Learning for Semi-Supervised Few-Shot Classification", ICLR 2018).
The classes of a split are those of its folder or of its list: train.csv, val.csv and test.csv of
github.com/renmengye/few-shot-ssl-public, l2kl/data/tiered_imagenet_split, whose rows begin with a
WordNet id. The photographs are those of ImageNet's training set, and come under its terms.
"""

import csv
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from metablocks.checks import Count, CountFrom0, checked
from metablocks.errors import DataError, TaskError
from metablocks.tasks.base import Split
from metablocks.tasks.class_tasks import check_apart
from metablocks.tasks.folders import by_folder
from metablocks.tasks.image_files import Files, FileTasks, classes_below, entries_of, images_of
from metablocks.tasks.image_sets import ImageSet, check_present
from metablocks.tasks.storage import Storage, read_file, reading

_LISTS: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}


@dataclass(frozen=True, kw_only=True)
class FileSet(FileTasks, ImageSet):
    """A set of image files, decoded when they are drawn.

    - `size`: side of the images, or height and width, in pixels.
    - `cache`: MiB of decoded images that stay in memory at most.
    """

    size: Count | tuple[Count, Count] = 84
    cache: CountFrom0 = 1024

    @abstractmethod
    def listing(self, root: Path) -> Mapping[Split, Files]:
        """The image files of each split's classes."""

    @cached_property
    def _files(self) -> tuple[Path, Mapping[Split, Files]]:
        with self.storage.located(self.data) as root:
            classes = self.listing(root)
        there = {split: len(named) for split, named in classes.items()}
        if there != self.sizes:
            raise DataError(
                f"{root}: holds {_counted(there)} classes; {self.storage.name} has "
                f"{_counted(self.sizes)}"
            )
        check_apart(type(self).__name__, classes)
        return root, classes


def _counted(sizes: Mapping[Split, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in sizes.items())


def _has_lists(root: Path) -> bool:
    return all((root / name).is_file() for name in _LISTS.values())


def _has_folders(root: Path) -> bool:
    return all((root / name).is_dir() for name in ("train", "val", "test"))


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class CUB(FileSet):
    """Tasks of CUB-200-2011, photographs of birds, of 100 / 50 / 50 classes.

    RGB, `size`; `data` holds `CUB_200_2011` as its archive unpacks it. Fields, shapes and errors:
    `metablocks.tasks.image_sets.ImageSet`.

    Source: Wah et al. 2011 (the images); Chen et al. 2019 (the split).

    >>> import metablocks as mb
    >>> source = mb.tasks.CUB(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.sizes
    ((3, 84, 84), {'train': 100, 'validation': 50, 'test': 50})
    """

    sizes: ClassVar[dict[Split, int]] = {"train": 100, "validation": 50, "test": 50}
    storage: ClassVar[Storage] = Storage(
        "CUB-200-2011",
        "a folder CUB_200_2011/ with images/001.Black_footed_Albatross/ and 199 more",
        ("CUB_200_2011", ""),
        lambda root: (root / "images" / "001.Black_footed_Albatross").is_dir(),
        terms="it comes from https://www.vision.caltech.edu/datasets/cub_200_2011/",
    )

    def listing(self, root: Path) -> dict[Split, Files]:
        """The image files of each split's classes, by their order."""
        every = list(classes_below(root / "images").items())
        return {
            "train": dict(every[::2]),
            "validation": dict(every[1::4]),
            "test": dict(every[3::4]),
        }


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class TieredImagenet(FileSet):
    """Tasks of tieredImageNet, photographs, of the published 351 / 97 / 160 classes.

    RGB, `size`; `data` holds `tiered_imagenet`, with a folder of images for each class in `train/`,
    `val/` and `test/`, or else with the published lists `train.csv`, `val.csv`, `test.csv` and
    ImageNet's folders of classes in `images/`, which may be a link. Fields, shapes and errors:
    `metablocks.tasks.image_sets.ImageSet`.

    Source: Ren et al. 2018.

    >>> import metablocks as mb
    >>> source = mb.tasks.TieredImagenet(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.sizes
    ((3, 84, 84), {'train': 351, 'validation': 97, 'test': 160})
    """

    sizes: ClassVar[dict[Split, int]] = {"train": 351, "validation": 97, "test": 160}
    storage: ClassVar[Storage] = Storage(
        "tieredImageNet",
        "a folder tiered_imagenet/ with either a folder of images for each class, named by WordNet id, "
        "in train/, val/ and test/, or the files train.csv, val.csv and test.csv (a WordNet id first) "
        "and the folders of classes in images/",
        ("tiered_imagenet", "tieredImageNet", ""),
        lambda root: _has_folders(root) or _has_lists(root),
        terms="its images come under ImageNet's terms",
    )

    def listing(self, root: Path) -> dict[Split, Files]:
        """The image files of each split's classes, by folder or by list."""
        if _has_folders(root):
            return by_folder(root)
        names = {split: _first_column(root / file) for split, file in _LISTS.items()}
        folder = root / "images"
        check_present(str(folder), names, entries_of(folder)[0])
        return {
            split: {name: images_of(folder / name) for name in sorted(listed)}
            for split, listed in names.items()
        }


def _first_column(path: Path) -> list[str]:
    kind = "a list of classes, a WordNet id first in each row"
    text = read_file(path, kind)
    with reading(path, kind):
        return [row[0].strip() for row in csv.reader(text.decode("utf-8-sig").splitlines()) if row]
