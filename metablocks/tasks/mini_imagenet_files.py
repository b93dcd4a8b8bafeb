"""Mini-ImageNet on disk: find it, list its images by class, read them, keep the bank made of them.

Two layouts work, in a folder `mini_imagenet` or in the folder that is named:

1. A folder of images for each class, named by WordNet id, there or below `train/`, `val/`, `test/`.
   Which split a class belongs to is a matter of its name alone, whatever folder it lies below.
   Folders of other names, as of the rest of ImageNet, are not looked at.
2. The files `train.csv`, `val.csv`, `test.csv` of Ravi and Larochelle's split, with the columns
   `filename` and `label`, and the images in `images/`. These are used where both layouts are found.

Images are `.jpg`, `.jpeg` or `.png`, of any size: what is not 84×84 is resized to it by Pillow's
Lanczos filter, its sides' proportion given up, as in the code of Finn, Abbeel, Levine 2017. The
images of a class come in the order of their file names. (1) JPEG decoders and versions of Pillow
may differ in the last bits, so the checksum of one copy of the data can differ between machines.

There is no download: the images come under ImageNet's terms of access.
"""

import csv
import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np

from metablocks.errors import DataError
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_splits import MINI_IMAGENET
from metablocks.tasks.data_folders import absent, search
from metablocks.tasks.episodes import ClassBank
from metablocks.tasks.kept_bank import kept, stamp
from metablocks.tasks.named_classes import Bytes, check_present, class_names, stack_classes

FOLDER = "mini_imagenet"
SIZE = 84
FORMAT = 1  # of the kept bank: raise it when the images or their order change
LAYOUT = (
    f"a folder {FOLDER}/ with either a folder of .jpg or .png images for each class, named by "
    "WordNet id (n01532829/ and 99 more), there or below train/, val/ and test/, or the files "
    "train.csv, val.csv and test.csv (columns filename,label) and the images in images/"
)

Images: TypeAlias = dict[str, list[Path]]
"""{class: its image files, sorted}, in the order of the bank."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_TABLES: dict[Split, str] = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_BELOW = ("", "train", "val", "test")


def load(data: str | Path | None = None) -> ClassBank:
    """The bank of all 100 classes, uint8 `[100, images, 3, 84, 84]`, RGB, on the CPU.

    Classes stand in the order of the split's list: train, validation, test. `data` is the folder
    that holds `mini_imagenet`, or that folder; without it `$METABLOCKS_DATA` and the cache folder
    are searched. The bank is kept in the cache folder (1.3 GB of the whole data set), if that can
    be written, under a name made of the names, sizes and times of change of all images.

    Raises `DataError` where the data is absent, incomplete or unreadable.
    """
    root = find(data)
    if root is None:
        why = "its images come under ImageNet's terms"
        raise absent("mini-ImageNet", why, "Get it, and pass", LAYOUT)
    images = listing(root)
    name = f"{FOLDER}-{FORMAT}-{_fingerprint(root, images)[:20]}"
    return kept(name, lambda: read(images))


def find(data: str | Path | None = None) -> Path | None:
    """The folder of images in `data`; else in `$METABLOCKS_DATA` or the cache; else None.

    Raises `DataError` for a `data` in which neither layout is found.
    """
    return search(data, _within, name="mini-ImageNet", layout=LAYOUT)


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


def _has_tables(root: Path) -> bool:
    there = any((root / table).is_file() for table in _TABLES.values())
    return there and (root / "images").is_dir()


def _class_folders(root: Path) -> Iterator[Path]:
    known = set(class_names(MINI_IMAGENET))
    return (folder for folder in _folders(root) if folder.name in known)


def _folders(root: Path) -> Iterator[Path]:
    for below in _BELOW:
        if (root / below).is_dir():
            yield from (path for path in sorted((root / below).iterdir()) if path.is_dir())


def _from_folders(root: Path) -> Images:
    found: dict[str, Path] = {}
    for folder in _class_folders(root):
        if folder.name in found:
            raise DataError(
                f"{folder.name} lies in both {found[folder.name]} and {folder}; "
                "a class is one folder, so that no image is there twice"
            )
        found[folder.name] = folder
    # A folder that is named as another class is no misprint of the missing one.
    near = [path.name for path in _folders(root) if not re.fullmatch(r"n\d{8}", path.name)]
    check_present(str(root), MINI_IMAGENET, found, near)
    return {name: _image_files(folder) for name, folder in found.items()}


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
    there = {path.name for path in folder.iterdir()}
    images: Images = {}
    listed: dict[str, str] = {}  # image: where it was listed
    for split in SPLITS:
        table = root / _TABLES[split]
        for line, name, label in _rows(table):
            place = f"{table}: line {line}"
            if label not in MINI_IMAGENET[split]:
                other = [s for s in SPLITS if label in MINI_IMAGENET[s]]
                belongs = f"it is a class of {other[0]}" if other else "it is in no split's list"
                raise DataError(f"{place}: label {label} is no class of {split}; {belongs}")
            if name not in there:
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
                given = ",".join(rows.fieldnames or ())
                raise DataError(f"{table}: its columns are {given!r}; they are filename,label")
            for row in rows:
                name, label = row["filename"], row["label"]
                if not name or not label:
                    raise DataError(f"{table}: line {rows.line_num}: lacks a filename or a label")
                yield rows.line_num, name.strip(), label.strip()
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as a table ({error})") from error


def _fingerprint(root: Path, images: Images) -> str:
    """What tells one state of the data from another without decoding an image."""
    digest = hashlib.sha256()
    try:
        for name, files in images.items():
            digest.update(f"{name}\n".encode())
            for path in files:
                digest.update(stamp(path, root))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error})") from error
    return digest.hexdigest()


def _decode(path: Path) -> Bytes:
    """One image, RGB `[3, 84, 84]`."""
    from PIL import Image  # of torchvision's dependencies; needed only where there is no kept bank

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
