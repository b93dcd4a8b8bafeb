"""Omniglot's drawings: read both halves, unpacked or archived, and reduce them to 28×28.

Each half is a tree `<Alphabet>/<characterNN>/<CCCC>_<DD>.png` (1-bit, 105×105, ink black; drawer
DD of 20), in a folder or in a `.zip` beside it. The archive is preferred if both are there: it
is one file, with a checksum for every image. Archives are read by content; their MD5 is checked by
torchvision when it downloads them, and by nobody later, so that a repacked archive is as good.

A drawing becomes 28×28 by exact area average: a pixel is the share of ink on its (105/28)² = 3.75²
square of the drawing, times 255, rounded. This is done in whole numbers, so that every machine
gets the same bytes. (1) Published code differs among itself in this resize, and none of it is
this one; the differences are in the grey of the edges.

Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015; github.com/brendenlake/omniglot (MIT licence).
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from metablocks.errors import DataError
from metablocks.tasks.episode_sampling import ClassBank
from metablocks.tasks.image_tasks import Bytes

FOLDER = "omniglot-py"
HALVES = ("images_background", "images_evaluation")
DRAWERS = 20
SIDE, SIZE = 105, 28  # pixels of a drawing, of an image in the bank
LAYOUT = (
    f"a folder {FOLDER}/ with {HALVES[0]} and {HALVES[1]}, each unpacked "
    "(<Alphabet>/<characterNN>/<CCCC>_<DD>.png) or as .zip"
)

Drawings: TypeAlias = dict[tuple[str, ...], tuple[str, Callable[[], bytes]]]
"""{(half, alphabet, character, file): (its place, a function that reads it)}"""


def archive(root: Path, half: str) -> Path:
    """The path of the archive of a half, which need not exist."""
    return root / f"{half}.zip"


def files(root: Path, half: str) -> list[Path]:
    """The files of a half: its archive, or else its drawings, sorted."""
    packed = archive(root, half)
    if packed.is_file():
        return [packed]
    return sorted(path for path in (root / half).glob("*/*/*.png") if _is_drawing(path.name))


def read(root: Path) -> ClassBank:
    """The bank of the data in the folder `root`, uint8 `[characters, 20, 28, 28]`, ink 255.

    Raises `DataError` naming the file that is missing, damaged or not what it should be.
    """
    names: list[str] = []
    images: list[Bytes] = []
    for half in HALVES:
        packed = archive(root, half)
        characters = _from_archive(packed, half) if packed.is_file() else _from_folder(root, half)
        for name, inks in characters:
            names.append(name)
            images.append(_reduce(np.stack(inks)))
    return ClassBank(torch.from_numpy(np.stack(images)), tuple(names))


def _from_folder(root: Path, half: str) -> Iterator[tuple[str, list[Bytes]]]:
    drawings: Drawings = {
        path.relative_to(root).parts: (str(path), path.read_bytes) for path in files(root, half)
    }
    return _characters(str(root / half), drawings)


def _from_archive(packed: Path, half: str) -> Iterator[tuple[str, list[Bytes]]]:
    try:
        with zipfile.ZipFile(packed) as opened:
            drawings: Drawings = {}
            for name in opened.namelist():
                parts = tuple(name.split("/"))
                if len(parts) == 4 and parts[0] == half and _is_drawing(parts[3]):
                    drawings[parts] = (f"{packed}: {name}", partial(opened.read, name))
            yield from _characters(str(packed), drawings)
    except DataError:
        raise
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{packed}: cannot be read as a zip archive ({error})") from error


def _is_drawing(name: str) -> bool:
    return name.endswith(".png") and not name.startswith(".")


def _characters(place: str, drawings: Drawings) -> Iterator[tuple[str, list[Bytes]]]:
    """`(half/alphabet/character, its 20 drawings)` in order, from {path: (place, read)}."""
    by_character: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in sorted(drawings):
        by_character.setdefault(path[:3], []).append(path)
    if not by_character:
        raise DataError(f"{place}: holds no drawing; Omniglot is {LAYOUT}")
    for character, paths in by_character.items():
        _check_drawers(place, character, [path[3] for path in paths])
        yield "/".join(character), [_decode(*drawings[path]) for path in paths]


def _check_drawers(place: str, character: tuple[str, ...], files: list[str]) -> None:
    drawers = [Path(file).stem.rpartition("_")[2] for file in files]
    expected = [f"{drawer:02d}" for drawer in range(1, DRAWERS + 1)]
    if drawers == expected:
        return
    missing = [f"{files[0].partition('_')[0]}_{d}.png" for d in expected if d not in drawers]
    surplus = [file for file, d in zip(files, drawers, strict=True) if d not in expected]
    fault = f"missing {', '.join(missing)}" if missing else f"not expected {', '.join(surplus)}"
    raise DataError(
        f"{place}: {'/'.join(character)} holds {len(files)} drawings, and Omniglot has {DRAWERS} "
        f"of every character, by drawers 01 to {DRAWERS}: {fault}"
    )


def _decode(place: str, read: Callable[[], bytes]) -> Bytes:
    """Ink, 0 or 1, `[105, 105]`."""
    from PIL import Image  # of torchvision's dependencies; needed only if there is no cached bank

    try:
        with Image.open(io.BytesIO(read()), formats=["PNG"]) as image:
            grey = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{place}: cannot be read as a PNG image ({error})") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{place}: is damaged in the archive ({error})") from error
    if grey.shape != (SIDE, SIDE):
        raise DataError(f"{place}: is {grey.shape[1]}×{grey.shape[0]}; drawings are {SIDE}×{SIDE}")
    ink: Bytes = (grey < 128).astype(np.uint8)
    return ink


def _reduce(ink: Bytes) -> Bytes:
    """Exact area average of ink 0 or 1 `[n, 105, 105]` as uint8 `[n, 28, 28]`, ink 255.

    105/28 = 15/4: four copies of each pixel, summed by fifteens. The sums are whole numbers of at
    most 15², exact in float32.
    """
    overlap = np.repeat(np.eye(SIDE, dtype=np.float32), 4, axis=0)  # [420, 105]
    weights = overlap.reshape(SIZE, 15, SIDE).sum(axis=1)  # [28, 105], rows sum to 15
    sums = (weights @ ink.astype(np.float32) @ weights.T).astype(np.int64)
    rounded: Bytes = ((2 * 255 * sums + 225) // (2 * 225)).astype(np.uint8)
    return rounded
