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
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from metablocks.checks import checked
from metablocks.errors import DataError, TaskError
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_splits import (
    MINI_IMAGENET,
    check_present,
    class_names,
    class_numbers,
)
from metablocks.tasks.episode_sampling import ClassBank, Ints
from metablocks.tasks.image_tasks import Bytes, ImageTasks, stack_classes
from metablocks.tasks.storage import Storage, cached, fingerprint

FOLDER = "mini_imagenet"
SIZE = 84
FORMAT = 1  # of the cached bank: raise it when the images or their order change

Images: TypeAlias = dict[str, list[Path]]
"""{class: its image files, sorted}, in the order of the bank."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_TABLES: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_BELOW = ("", "train", "val", "test")


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class MiniImagenet(ImageTasks):
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
    examples: ClassVar[int | None] = 600

    data: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ways({split: len(names) for split, names in MINI_IMAGENET.items()})
        if self.data is not None:
            STORAGE.find(self.data)

    @cached_property
    def classes(self) -> dict[Split, Ints]:
        """The classes of each split: numbers of classes of `bank`, ascending."""
        return class_numbers(MINI_IMAGENET)

    def load(self) -> ClassBank:
        """The bank of all 100 classes, uint8 `[100, images, 3, 84, 84]`, RGB, on the CPU.

        Classes stand in the order train, validation, test. The bank is cached under a name made of
        the names, sizes and times of change of all images.
        """
        with STORAGE.located(self.data) as root:
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

    Raises `DataError` naming the classes, folders or lines that are missing or wrong.
    """
    try:
        images = _from_tables(root) if _has_tables(root) else _from_folders(root)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{error.filename or root}: cannot be read ({error})") from error
    return {name: sorted(images[name]) for name in class_names(MINI_IMAGENET)}


def read(images: Images) -> ClassBank:
    """The bank of the images; raises `DataError` naming the first that cannot be read."""
    with ThreadPoolExecutor() as pool:  # decoding is most of the work, and leaves Python's lock

        def classes() -> Iterator[Bytes]:
            for files in images.values():
                yield np.stack(list(pool.map(_decode, files)))

        counts = [len(files) for files in images.values()]
        return stack_classes(list(images), counts, classes())


def _within(folder: Path) -> Path | None:
    for root in (folder / FOLDER, folder):
        if _has_tables(root) or any(_class_folders(root)):
            return root
    return None


STORAGE = Storage(
    "mini-ImageNet",
    f"a folder {FOLDER}/ with either a folder of .jpg or .png images for each class, named by "
    "WordNet id (n01532829/ and 99 more), there or below train/, val/ and test/, or the files "
    "train.csv, val.csv and test.csv (columns filename,label) and the images in images/",
    _within,
    terms="its images come under ImageNet's terms",
)


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


def _from_folders(root: Path) -> Images:
    classes: dict[str, Path] = {}
    for folder in _class_folders(root):
        if folder.name in classes:
            raise DataError(
                f"{folder.name} lies in both {classes[folder.name]} and {folder}; "
                "a class is one folder, so that no image is there twice"
            )
        classes[folder.name] = folder
    # A folder that is named as another class is not a misprint of the missing one.
    near = [path.name for path in _folders(root) if not re.fullmatch(r"n\d{8}", path.name)]
    check_present(str(root), MINI_IMAGENET, classes, near)
    return {name: _image_files(folder) for name, folder in classes.items()}


def _image_files(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{folder}: holds no image; images end in {', '.join(_SUFFIXES)}")
    return files


def _from_tables(root: Path) -> Images:
    folder = root / "images"
    present = {path.name for path in folder.iterdir()}
    images: Images = {}
    listed: dict[str, str] = {}  # {image: its place in a table}
    for split in SPLITS:
        table = root / _TABLES[split]
        for line, name, label in _rows(table):
            place = f"{table}: line {line}"
            if label not in MINI_IMAGENET[split]:
                other = [s for s in SPLITS if label in MINI_IMAGENET[s]]
                belongs = f"it is a class of {other[0]}" if other else "it is in no split's list"
                raise DataError(f"{place}: label {label} is not a class of {split}; {belongs}")
            if name not in present:
                raise DataError(f"{place}: {name} is not in {folder}")
            if name in listed:
                raise DataError(f"{place}: {name} is listed a second time, after {listed[name]}")
            listed[name] = place
            images.setdefault(label, []).append(folder / name)
    check_present(f"{root} ({', '.join(_TABLES.values())})", MINI_IMAGENET, images)
    return images


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """`(line number, filename, label)` of every row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                columns = ",".join(rows.fieldnames or ())
                raise DataError(f"{table}: its columns are {columns!r}; they are filename,label")
            for row in rows:
                name, label = row["filename"], row["label"]
                if not name or not label:
                    raise DataError(f"{table}: line {rows.line_num}: lacks a filename or a label")
                yield rows.line_num, name.strip(), label.strip()
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as a table ({error})") from error


def _decode(path: Path) -> Bytes:
    """One image, RGB `[3, 84, 84]`."""
    from PIL import Image  # of torchvision's dependencies; needed only if there is no cached bank

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            rgb = image.convert("RGB")
            if rgb.size != (SIZE, SIZE):
                rgb = rgb.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            pixels: Bytes = np.asarray(rgb).transpose(2, 0, 1)
            return pixels
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{path}: cannot be read as a JPEG or PNG image ({error})") from error
