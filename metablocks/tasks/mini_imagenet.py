"""Mini-ImageNet: N-way K-shot tasks of 100 ImageNet classes, 600 photographs each, 84×84 RGB.

The classes of train, validation and test are the published 64 / 16 / 20
(`metablocks.tasks.class_splits`). Two layouts work, in a folder `mini_imagenet` or in the folder
that is named:

1. A folder of images for each class, named by WordNet id, there or below `train/`, `val/`, `test/`.
   The split of a class is a matter of its name alone, whatever folder it lies below. Folders of
   other names, as of the rest of ImageNet, are not looked at.
2. The files `train.csv`, `val.csv`, `test.csv` of Ravi and Larochelle's split, with the columns
   `filename` and `label`, and the images in `images/`. These are used if both layouts are there.

Images are `.jpg`, `.jpeg` or `.png`, of any size: one that is not 84×84 is resized to it by Pillow's
Lanczos filter, its sides' proportion given up, as in the code of Finn, Abbeel, Levine 2017. The
images of a class come in the order of their file names. (1) JPEG decoders and versions of Pillow
may differ in the last bits, so the checksum of one copy of the data can differ between machines.

There is no download: the images come under ImageNet's terms of access.
"""

import csv
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from metablocks.checks import checked
from metablocks.errors import DataError, TaskError
from metablocks.tasks.base import Split
from metablocks.tasks.class_splits import (
    MINI_IMAGENET,
    ClassSplits,
    SplitClasses,
    check_present,
    class_names,
)
from metablocks.tasks.episode_sampling import ClassBank
from metablocks.tasks.image_tasks import Bytes, stack_classes
from metablocks.tasks.storage import Storage, cached, fingerprint, pillow

FOLDER = "mini_imagenet"
SIZE = 84
FORMAT = 1  # of the cached bank: raise it when the images or their order change

Images: TypeAlias = dict[str, list[Path]]
"""{class: its image files, sorted}, in the order of the bank."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_TABLES: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_BELOW = ("", "train", "val", "test")


def _within(folder: Path) -> Path | None:
    for root in (folder / FOLDER, folder):
        if _has_tables(root) or any(_class_folders(root)):
            return root
    return None


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
class MiniImagenet(SplitClasses):
    """Tasks of mini-ImageNet photographs, of the published 64 / 16 / 20 classes.

    `sample` returns inputs float32 in [0, 1], RGB, `[tasks, ways * examples, 3, 84, 84]`, and
    targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. Classes
    may hold unequal numbers of images; each draws among its own.

    The images are loaded at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked without data. `data` is the folder that holds `mini_imagenet`,
    or that folder; without it `$METABLOCKS_DATA` and the cache folder are searched. There is no
    download. The decoded images, 1.3 GB of the whole data set, are cached, if the cache folder
    can be written, so that the next start takes seconds.

    Raises, when built, `TaskError` for fields out of range (`ways` is at most 16, the classes of
    the validation split; shots + queries at most 600) and `DataError` for a `data` without
    mini-ImageNet. Raises, at first use, `DataError` if the data is absent, incomplete or
    unreadable, and `TaskError` if a class has fewer than shots + queries images.

    Source: Vinyals et al. 2016 (the images); Ravi, Larochelle 2017 (the split).

    >>> source = MiniImagenet(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, [len(source.classes[s]) for s in source.classes]
    ((3, 84, 84), 5, [64, 16, 20])
    >>> MiniImagenet(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: MiniImagenet: ways=20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    input_shape: ClassVar[tuple[int, ...]] = (3, SIZE, SIZE)
    splits: ClassVar[ClassSplits] = MINI_IMAGENET
    storage: ClassVar[Storage] = Storage(
        "mini-ImageNet",
        f"a folder {FOLDER}/ with either a folder of .jpg or .png images for each class, named by "
        "WordNet id (n01532829/ and 99 more), there or below train/, val/ and test/, or the files "
        "train.csv, val.csv and test.csv (columns filename,label) and the images in images/",
        _within,
        terms="its images come under ImageNet's terms",
    )

    def load(self) -> ClassBank:
        """The bank of all 100 classes, uint8 `[100, images, 3, 84, 84]`, RGB, on the CPU.

        Classes stand in the order train, validation, test. The bank is cached under a name made of
        the names, sizes and times of change of all images.
        """
        with self.storage.located(self.data) as root:
            images = listing(root)
            state = fingerprint(root, _items(images))
            return cached(f"{FOLDER}-{FORMAT}-{state[:20]}", lambda: read(images))


def _items(images: Images) -> Iterator[str | Path]:
    """The names of classes, which the tables may change, and their files."""
    for name, files in images.items():
        yield f"{name}\n"
        yield from files


def listing(root: Path) -> Images:
    """The image files of each class of the splits.

    Raises `DataError` naming the classes, folder or line that is missing or wrong.
    """
    images: Images = {}
    if _has_tables(root):
        place, near = f"{root} ({', '.join(_TABLES.values())})", list[str]()
        for label, path in _rows(root):
            images.setdefault(label, []).append(path)
    else:
        place, near = str(root), [path.name for path in _folders(root)]
        for folder in _class_folders(root):
            images.setdefault(folder.name, []).extend(_image_files(folder))
    # A folder that is named as another class is not a misprint of the missing one.
    near = [name for name in near if not re.fullmatch(r"n\d{8}", name)]
    check_present(place, MINI_IMAGENET, images, near)
    for name, files in images.items():
        if len({path.name for path in files}) < len(files):
            raise DataError(f"{place}: an image of {name} is there or listed twice")
    return {name: sorted(images[name]) for name in class_names(MINI_IMAGENET)}


def read(images: Images) -> ClassBank:
    """The bank of the images; raises `DataError` naming the first that cannot be read."""
    with ThreadPoolExecutor() as pool:  # decoding is most of the work, and leaves Python's lock

        def classes() -> Iterator[Bytes]:
            for files in images.values():
                yield np.stack(list(pool.map(_decode, files)))

        counts = [len(files) for files in images.values()]
        return stack_classes(list(images), counts, classes())


def _image_files(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{folder}: holds no image; images end in {', '.join(_SUFFIXES)}")
    return files


def _rows(root: Path) -> Iterator[tuple[str, Path]]:
    """The class and the image of every row of the tables. Raises `DataError` naming the line."""
    folder = root / "images"
    present = {path.name for path in folder.iterdir()}
    for split, table in _TABLES.items():
        place = str(root / table)
        try:
            rows = csv.DictReader((root / table).read_text(encoding="utf-8-sig").splitlines())
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


def _decode(path: Path) -> Bytes:
    """One image, RGB `[3, 84, 84]`."""
    Image = pillow()  # noqa: N806

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            rgb = image.convert("RGB")
            if rgb.size != (SIZE, SIZE):
                rgb = rgb.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            pixels: Bytes = np.asarray(rgb).transpose(2, 0, 1)
            return pixels
    except Exception as error:  # a damaged image raises whatever its bytes happen to mean
        raise DataError(f"{path}: cannot be read as a JPEG or PNG image ({error})") from error
