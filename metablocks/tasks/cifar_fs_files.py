"""CIFAR-100 on disk: find it, download it where it is not, and make the bank of CIFAR-FS of it.

The layout is torchvision's: a folder `cifar-100-python` with the pickles `train`, `test` and
`meta`, or the archive `cifar-100-python.tar.gz` of it; the folder is preferred where both lie
there. It is searched in the folder that the caller names, else in `$METABLOCKS_DATA`, in the cache
folder, and last downloaded by torchvision, which checks the archive's MD5. Data that is found is
read by content: its MD5 is checked by nobody, so that a smaller or repacked copy is as good.

(1) For that reason the pickles are not read by `pickle.load`, as torchvision reads what it has
checked, but by `metablocks.tasks.array_pickles`, which runs no code. Archives are read in memory,
and nothing is unpacked to disk.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from metablocks.errors import DataError
from metablocks.tasks.array_pickles import loads
from metablocks.tasks.class_splits import CIFAR_FS
from metablocks.tasks.data_folders import downloaded, search
from metablocks.tasks.episodes import ClassBank, Ints
from metablocks.tasks.named_classes import Bytes, check_present, class_names, stack_classes
from metablocks.torchvision_import import torchvision_module

FOLDER = "cifar-100-python"
ARCHIVE = f"{FOLDER}.tar.gz"
FILES = ("train", "test", "meta")
SIZE = 32
LAYOUT = f"a folder {FOLDER}/ with the files train, test and meta, or {ARCHIVE}"


def load(data: str | Path | None = None) -> ClassBank:
    """The bank of all 100 classes, uint8 `[100, images, 3, 32, 32]`, RGB, on the CPU.

    Classes stand in the order of the split's list: train, validation, test; the images of a class
    in the order of the files, those of `train` before those of `test`. `data` is the folder that
    holds `cifar-100-python` or its archive, or that folder; without it `$METABLOCKS_DATA` and the
    cache folder are searched, then torchvision downloads.

    Raises `DataError` where the data is absent, incomplete or unreadable.
    """
    place = find(data)
    if place is not None:
        return read(place)
    with downloaded(_fetch, [ARCHIVE], name="CIFAR-100", layout=LAYOUT) as folder:
        return read(folder / ARCHIVE)


def find(data: str | Path | None = None) -> Path | None:
    """CIFAR-100 in `data`, folder or archive; else in `$METABLOCKS_DATA` or the cache; else None.

    Raises `DataError` for a `data` that holds neither.
    """
    return search(data, _within, name="CIFAR-100", layout=LAYOUT)


def read(place: Path) -> ClassBank:
    """The bank of the folder or archive `place`.

    Raises `DataError` naming the file that is missing, damaged or not what it should be.
    """
    files = _from_folder(place) if place.is_dir() else _from_archive(place)
    names = _names(*files["meta"])
    parts = [_batch(*files[part], classes=len(names)) for part in ("train", "test")]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, SIZE, SIZE)
    labels = np.concatenate([labels for _, labels in parts])
    counts = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    near = [name for name in names if name not in class_names(CIFAR_FS)]
    check_present(str(place), CIFAR_FS, (name for name in names if counts[name]), near)
    order = class_names(CIFAR_FS)
    own = (images[labels == names.index(name)] for name in order)
    return stack_classes(order, [counts[name] for name in order], own)


def _within(folder: Path) -> Path | None:
    for place in (folder, folder / FOLDER):
        if all((place / file).is_file() for file in FILES):
            return place
    return packed if (packed := folder / ARCHIVE).is_file() else None


def _fetch(folder: Path) -> None:
    """Have torchvision download the archive and check its MD5; it neither unpacks nor reads it."""
    datasets = torchvision_module("datasets")
    known = datasets.CIFAR100
    datasets.utils.download_url(known.url, str(folder), known.filename, known.tgz_md5)


def _from_folder(folder: Path) -> dict[str, tuple[str, bytes]]:
    """{file: (where it lies, its content)}"""
    try:
        return {file: (str(folder / file), (folder / file).read_bytes()) for file in FILES}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error})") from error


def _from_archive(packed: Path) -> dict[str, tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(packed) as archive:
            for member in archive:
                *above, file = PurePosixPath("/", member.name).parts
                if file not in FILES or above[-1] != FOLDER or not member.isfile():
                    continue
                if (content := archive.extractfile(member)) is not None:
                    found[file] = (f"{packed}: {member.name}", content.read())
                if len(found) == len(FILES):
                    break
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{packed}: cannot be read as a tar archive ({error})") from error
    missing = [f"{FOLDER}/{file}" for file in FILES if file not in found]
    if missing:
        raise DataError(f"{packed}: lacks {', '.join(missing)}")
    return found


def _names(place: str, content: bytes) -> list[str]:
    """The names of the fine labels."""
    names = _entry(place, loads(content, place), "fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{place}: fine_label_names is no list of text")
    return names


def _batch(place: str, content: bytes, *, classes: int) -> tuple[Bytes, Ints]:
    """Images `[images, 3072]` and labels `[images]` of `train` or `test`."""
    batch = loads(content, place)
    images, labels = _entry(place, batch, "data"), _entry(place, batch, "fine_labels")
    pixels = 3 * SIZE * SIZE
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (pixels,)
    ):
        kind = f"{getattr(images, 'dtype', type(images).__name__)} {list(np.shape(images))}"
        raise DataError(f"{place}: data is {kind}; it is uint8 [images, {pixels}]")
    if (
        not isinstance(labels, list | np.ndarray)
        or len(labels) != len(images)
        or not all(isinstance(n, int | np.integer) and 0 <= n < classes for n in labels)
    ):
        raise DataError(
            f"{place}: fine_labels is no number from 0 to {classes - 1} for each of its "
            f"{len(images)} images"
        )
    return images, np.array(labels, dtype=np.int64)


def _entry(place: str, value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        keys = f"only {', '.join(map(str, value))}" if isinstance(value, dict) else "no dictionary"
        raise DataError(f"{place}: holds {keys}; CIFAR-100 holds {key} there")
    return value[key]
