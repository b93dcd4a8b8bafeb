"""Mini-ImageNet: N-way K-shot tasks of 100 ImageNet classes, 600 photographs each, 84×84 RGB.

The classes of train, validation and test are the published 64 / 16 / 20
(`metablocks.tasks.class_splits`). Two layouts work, in a folder `mini_imagenet` or in the folder
that is named:

1. A folder of images for each class, named by WordNet id, there or below `train/`, `val/`, `test/`.
   The split of a class is a matter of its name alone, whatever folder it lies below. Folders of
   other names, as of the rest of ImageNet, are not looked at.
2. The files `train.csv`, `val.csv`, `test.csv` of Ravi and Larochelle's split, with the columns
   `filename` and `label`, and the images in `images/`. These are used if both layouts are there.

Images are of any size: one that is not 84×84 is resized to it by Pillow's
Lanczos filter, its sides' proportion given up, as in the code of Finn, Abbeel, Levine 2017. The
images of a class come in the order of their file names. (1) JPEG decoders and versions of Pillow
may differ in the last bits, so the checksum of one copy of the data can differ between machines.

There is no download: the images come under ImageNet's terms of access.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from metablocks.checks import checked
from metablocks.errors import DataError, TaskError
from metablocks.tasks.base import Split
from metablocks.tasks.class_splits import MINI_IMAGENET, ClassSplits, SplitSet, class_names
from metablocks.tasks.class_tasks import numbered
from metablocks.tasks.image_files import Files, images_of, in_threads, opened, pixels
from metablocks.tasks.image_sets import Bank, cached, check_present
from metablocks.tasks.storage import Storage, fingerprint, read_file

FOLDER = "mini_imagenet"
SIZE = 84

_TABLES: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_BELOW = ("", "train", "val", "test")


def _holds(root: Path) -> bool:
    return _has_tables(root) or any(_class_folders(root))


def _has_tables(root: Path) -> bool:
    tables = any((root / table).is_file() for table in _TABLES.values())
    return tables and (root / "images").is_dir()


def _class_folders(root: Path) -> Iterator[Path]:
    known = set(class_names(MINI_IMAGENET))
    return (folder for folder in _folders(root) if folder.name in known)


def _folders(root: Path) -> Iterator[Path]:
    for below in _BELOW:
        if (root / below).is_dir():
            yield from (path for path in sorted((root / below).iterdir()) if path.is_dir())


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class MiniImagenet(SplitSet):
    """Tasks of mini-ImageNet photographs, of the published 64 / 16 / 20 classes.

    RGB, 84×84; `data` holds `mini_imagenet`. The decoded images, 1.3 GB of the whole data set, are
    cached, if the cache folder can be written, so that the next start takes seconds. Fields, shapes
    and errors: `metablocks.tasks.image_sets.ImageSet`.

    Source: Vinyals et al. 2016 (the images); Ravi, Larochelle 2017 (the split).

    >>> import metablocks as mb
    >>> source = mb.tasks.MiniImagenet(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, source.sizes
    ((3, 84, 84), 5, {'train': 64, 'validation': 16, 'test': 20})
    >>> mb.tasks.MiniImagenet(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: MiniImagenet ways is 20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    input_shape: ClassVar[tuple[int, ...]] = (3, SIZE, SIZE)
    splits: ClassVar[ClassSplits] = MINI_IMAGENET
    storage: ClassVar[Storage] = Storage(
        "mini-ImageNet",
        f"a folder {FOLDER}/ with either a folder of .jpg or .png images for each class, named by "
        "WordNet id (n01532829/ and 99 more), there or below train/, val/ and test/, or the files "
        "train.csv, val.csv and test.csv (columns filename,label) and the images in images/",
        (FOLDER, ""),
        _holds,
        terms="its images come under ImageNet's terms",
    )

    def load(self) -> Bank:
        """The bank of all 100 classes in the order train, validation, test.

        It is cached under a name made of the names, sizes and times of change of all images.
        """
        with self.storage.located(self.data) as root:
            images = listing(root)
            state = fingerprint(root, _items(images))
            return cached(f"{FOLDER}-{state[:20]}", lambda: read(images))


def _items(images: Files) -> Iterator[str | Path]:
    """The names of classes, which the tables may change, and their files."""
    for name, files in images.items():
        yield f"{name}\n"
        yield from files


def listing(root: Path) -> Files:
    """The image files of each class of the splits.

    Raises `DataError` naming the classes, folder or line that is missing or wrong.
    """
    images: Files = {}
    if _has_tables(root):
        place, near = f"{root} ({', '.join(_TABLES.values())})", list[str]()
        for label, path in _rows(root):
            images.setdefault(label, []).append(path)
    else:
        place, near = str(root), [path.name for path in _folders(root)]
        for folder in _class_folders(root):
            images.setdefault(folder.name, []).extend(images_of(folder))
    # A folder that is named as another class is not a misprint of the missing one.
    near = [name for name in near if not re.fullmatch(r"n\d{8}", name)]
    check_present(place, MINI_IMAGENET, images, near)
    for name, files in images.items():
        if len({path.name for path in files}) < len(files):
            raise DataError(f"{place}: an image of {name} is there or listed twice")
    return {name: sorted(images[name]) for name in class_names(MINI_IMAGENET)}


def read(images: Files) -> Bank:
    """The bank of the images; raises `DataError` naming the first that cannot be read."""
    counts = {name: len(files) for name, files in images.items()}
    every = torch.empty(sum(counts.values()), 3, SIZE, SIZE, dtype=torch.uint8)
    for name, rows in numbered(counts).items():  # one class at a time beside the whole
        every[rows[0] : rows[-1] + 1] = torch.stack(in_threads(_decode, images[name]))
    return Bank(counts, every)


def _decode(path: Path) -> Tensor:
    """One image, RGB `[3, 84, 84]`, decoded in full, as those whose results are compared did it."""
    with opened(path) as image:
        return pixels(image, (SIZE, SIZE), 3)


def _rows(root: Path) -> Iterator[tuple[str, Path]]:
    """The class and the image of every row of the tables. Raises `DataError` naming the line."""
    folder = root / "images"
    present = {path.name for path in folder.iterdir()}
    for split, table in _TABLES.items():
        place = str(root / table)
        try:
            text = read_file(root / table, "filename,label").decode("utf-8-sig")
            rows = csv.DictReader(text.splitlines())
            for row in rows:
                place = f"{root / table}: line {rows.line_num}"
                name, label = str(row["filename"]).strip(), str(row["label"]).strip()
                if label not in MINI_IMAGENET[split]:
                    raise ValueError(f"label {label} is not a class of {split}")
                if name not in present:
                    raise ValueError(f"{name} is not in {folder}")
                yield label, folder / name
        except (ValueError, KeyError, csv.Error) as error:
            message = f"{place}: cannot be read as filename,label ({error})"
            raise DataError(message) from error
