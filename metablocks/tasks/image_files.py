"""Folders of image files: the classes below a folder, one image decoded, many read when needed.

A class is a folder that holds images; its name is its path below the folder that is searched. Links
are followed. Files and folders whose names begin with a dot, and files that are no images by their
suffix, are not looked at. Every order is that of names, so that it is the same on every machine.
"""

import hashlib
import io
import os
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from metablocks.errors import DataError, MissingError
from metablocks.tasks.base import Split
from metablocks.tasks.class_tasks import ClassTasks, Pool, digest_of, numbered
from metablocks.tasks.episode_sampling import Ints
from metablocks.tasks.storage import fingerprint, read_file, readable, reading, remembered

FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
PIXELS = 2**26
"""The most pixels of an image, 8192×8192 say: more take a gigabyte or more to decode."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

Files: TypeAlias = dict[str, list[Path]]
"""The image files of each class, sorted."""

_KIND = f"an image, one of {', '.join(FORMATS)}"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def classes_below(folder: Path) -> Files:
    """The image files of every class below a folder, sorted by name.

    Raises `DataError`, naming the place, for a folder without images, for one that holds images and
    folders, for a link that leads nowhere or into a folder above it, and for what cannot be read.
    """
    with readable(folder):
        return dict(sorted(_visit(folder, "", ())))


def _visit(folder: Path, name: str, above: tuple[Any, ...]) -> Iterator[tuple[str, list[Path]]]:
    state = folder.stat()
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise DataError(f"{folder}: is reached by a link from inside itself; take the link away")
    folders, files = entries_of(folder)
    if files and (folders or not name):
        where = f"beside the folder {folders[0]}" if folders else "and in no folder of a class"
        raise DataError(
            f"{folder}: holds an image, {files[0].name}, {where}; each class is one folder of images"
        )
    if not files and not folders:
        raise _without_images(folder)
    if files:
        yield name, files
    for below in folders:
        yield from _visit(folder / below, f"{name}/{below}".lstrip("/"), (*above, here))


def entries_of(folder: Path) -> tuple[list[str], list[Path]]:
    """The names of the folders in a folder, and its image files, both sorted.

    Raises `DataError` for a link that leads nowhere.
    """
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in visible if entry.is_dir()]
    for link in (folder / entry.name for entry in visible if entry.is_symlink()):
        if not link.exists():
            raise DataError(f"{link}: is a link that leads nowhere; take it away")
    images = (entry.name for entry in visible if entry.name.lower().endswith(SUFFIXES))
    return folders, [folder / name for name in images if name not in folders]


def images_of(folder: Path) -> list[Path]:
    """The image files in the folder of one class, sorted; raises `DataError` if there is none."""
    _, files = entries_of(folder)
    if not files:
        raise _without_images(folder)
    return files


def _without_images(folder: Path) -> DataError:
    return DataError(f"{folder}: holds no image; images end in {', '.join(SUFFIXES)}")


def pillow() -> Any:
    """Pillow's module `Image`.

    Raises `MissingError` if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingError(
            "image files are read with Pillow, which is not installed: pip install 'metablocks[images]'"
        ) from error
    return Image


@contextmanager
def opened(path: Path | str, content: bytes | None = None) -> Iterator[Any]:
    """A file, or its `content`, as an image of Pillow's; what fails in the context is a `DataError`.

    Raises it for a file that is not an image of one of the `FORMATS`, is damaged, or has more than
    `PIXELS` pixels, which are not decoded.
    """
    Image = pillow()  # noqa: N806
    content = read_file(path, _KIND) if content is None else content
    with reading(path, _KIND):
        try:
            image = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
        except Image.UnidentifiedImageError:  # names an object in memory
            raise ValueError("its content is none of these") from None
        with image:
            if image.width * image.height > PIXELS:
                raise ValueError(
                    f"it is {image.width}×{image.height}, and images of at most {PIXELS:,} pixels are "
                    "read: make it smaller"
                )
            _check_range(image)
            yield image


def _check_range(image: Any) -> None:
    """Raise `ValueError` for pixels of which nobody knows what is white."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floats" if image.mode == "F" else "32-bit numbers"
        raise ValueError(f"its pixels are {kind}, of no known range: write it with 8 or 16 bits")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size, which may be one side of a square."""
    return size if isinstance(size, tuple) else (size, size)


def decode(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """One image, uint8 `[channels, *size]`, 1 channel grey and 3 RGB.

    An image of another size is resized by Pillow's Lanczos filter, its sides' proportion given up. A
    photograph is turned as its EXIF data say; what is transparent is put on white; 16-bit grey keeps
    its upper 8 bits; of several frames the first counts.

    Raises `DataError` for a file that cannot be read as an image; see `opened`.
    """
    with opened(path) as image:
        image.draft(None, (2 * size[1], 2 * size[0]))  # a large JPEG is decoded smaller
        return pixels(_upright(image), size, channels)


def _upright(image: Any) -> Any:
    """The image turned as its EXIF data say; as it is, if they cannot be read."""
    from PIL import ImageOps

    image.load()  # whose faults are the image's own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # damaged bytes raise whatever they happen to mean
            return image


def pixels(image: Any, size: tuple[int, int] | None, channels: int) -> Tensor:
    """The pixels of an image of Pillow's, uint8 `[channels, height, width]`; see `decode`."""
    Image = pillow()  # noqa: N806

    _check_range(image)
    if image.mode.startswith("I"):  # I;16, or I in older versions of Pillow
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    array = np.array(image)
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1))


def content_of(path: Path) -> bytes:
    """SHA-256 of an image file, whose structure is looked through: PNG's sums, JPEG's whole stream.

    Raises `DataError` for a file that is damaged or no image.
    """
    content = read_file(path, _KIND)
    with opened(path, content) as image:
        if image.format == "PNG":
            image.verify()
        else:
            image.draft("L", (1, 1))
            image.load()
    return hashlib.sha256(content).digest()


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`function` of every item, in as many threads as PyTorch takes."""
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


class Cached:
    """Examples that are read when they are needed, and kept as far as `limit` bytes reach.

    `read(rows)` gives the examples of some numbers, of one shape and dtype. The oldest make room.
    Threads may take examples at once.
    """

    def __init__(self, read: Callable[[Sequence[int]], Iterable[Tensor]], limit: int) -> None:
        self._read, self._limit = read, limit
        self._kept: dict[int, Tensor] = {}  # in the order in which they were read
        self._lock = threading.Lock()

    def take(self, rows: Ints) -> Tensor:
        """The examples of the numbers `rows`, `[rows, ...]`."""
        wanted = rows.tolist()
        with self._lock:
            absent = [row for row in dict.fromkeys(wanted) if row not in self._kept]
            read = zip(absent, self._read(absent), strict=True)
            self._kept |= {row: example.clone() for row, example in read}
            examples = torch.stack([self._kept[row] for row in wanted])
            most = self._limit // max(1, examples[0].nbytes)
            for row in [*islice(self._kept, max(0, len(self._kept) - most))]:
                del self._kept[row]
        return examples


class FileTasks(ClassTasks):
    """Tasks of image files, which are decoded to one `size` when they are drawn.

    `cache` MiB of decoded images are kept at most.
    """

    size: int | tuple[int, int]
    cache: int
    grey = False

    @property
    @abstractmethod
    def _files(self) -> tuple[Path, Mapping[Split, Files]]:
        """The folder of the data, and in it the image files of each split's classes."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (1 if self.grey else 3, *sides(self.size))

    @cached_property
    def pools(self) -> dict[Split, Pool]:
        """The images of each split, read when they are drawn."""
        channels, *size = self.input_shape
        files = [file for of_class in self._listed.values() for file in of_class]

        def read(rows: Sequence[int]) -> list[Tensor]:
            return in_threads(lambda row: decode(files[row], (size[0], size[1]), channels), rows)

        images = Cached(read, self.cache * 2**20)
        rows = numbered({place: len(of_class) for place, of_class in self._listed.items()})
        return {
            split: Pool.of({name: rows[split, name] for name in named}, images.take)
            for split, named in self._files[1].items()
        }

    @cached_property
    def checksum(self) -> str:
        """SHA-256, in hex, of splits, names of classes and the files' contents.

        Every file is read once and looked through for damage. The sum is remembered in the cache folder
        for as long as no file changes its name, size or time of change.
        """
        for split in self.pools:
            self._pool(split)
        described = [[split, name, len(files)] for (split, name), files in self._listed.items()]
        files = [file for of_class in self._listed.values() for file in of_class]
        state = fingerprint(self._files[0], [str(described), *files])
        return remembered(
            f"folders-{state[:40]}", lambda: digest_of(described, in_threads(content_of, files))
        )

    @property
    def _listed(self) -> dict[tuple[Split, str], list[Path]]:
        """The files of every class, by its split and name."""
        return {
            (split, name): files
            for split, named in self._files[1].items()
            for name, files in named.items()
        }
