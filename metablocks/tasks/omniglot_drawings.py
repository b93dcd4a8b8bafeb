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
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from metablocks.errors import DataError
from metablocks.tasks.episode_sampling import ClassBank
from metablocks.tasks.image_tasks import Bytes
from metablocks.tasks.storage import pillow

FOLDER = "omniglot-py"
HALVES = ("images_background", "images_evaluation")
DRAWERS = 20
SIDE, SIZE = 105, 28  # pixels of a drawing, of an image in the bank
LAYOUT = (
    f"a folder {FOLDER}/ with {HALVES[0]} and {HALVES[1]}, each unpacked "
    "(<Alphabet>/<characterNN>/<CCCC>_<DD>.png) or as .zip"
)

Drawings: TypeAlias = dict[tuple[str, ...], Callable[[], bytes]]
"""{(half, alphabet, character, file): a function that reads it}"""


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

    Raises `DataError` naming the archive, character or drawing that is missing or damaged.
    """
    names: list[str] = []
    images: list[Bytes] = []
    for half in HALVES:
        for name, inks in _characters(root, half):
            names.append(name)
            images.append(_reduce(np.stack(inks)))
    return ClassBank(torch.from_numpy(np.stack(images)), tuple(names))


def _characters(root: Path, half: str) -> Iterator[tuple[str, list[Bytes]]]:
    """`(half/alphabet/character, its 20 drawings)` in order."""
    packed = archive(root, half)
    try:
        with zipfile.ZipFile(packed) if packed.is_file() else nullcontext() as opened:
            drawings = _in_archive(opened, half) if opened else _in_folder(root, half)
            if not drawings:
                raise DataError(f"{root / half}: holds no drawing; Omniglot is {LAYOUT}")
            for character, paths in groupby(sorted(drawings), lambda path: path[:3]):
                name, files = "/".join(character), list(paths)
                drawers = [Path(file[3]).stem.rpartition("_")[2] for file in files]
                if drawers != [f"{drawer:02d}" for drawer in range(1, DRAWERS + 1)]:
                    raise DataError(
                        f"{root}: {name} has drawings by {', '.join(drawers)}; Omniglot has one of "
                        f"every character by each of the drawers 01 to {DRAWERS}"
                    )
                yield name, [_decode(root, file, drawings[file]) for file in files]
    except zipfile.BadZipFile as error:
        raise DataError(f"{packed}: cannot be read as a zip archive ({error})") from error


def _in_folder(root: Path, half: str) -> Drawings:
    return {path.relative_to(root).parts: path.read_bytes for path in files(root, half)}


def _in_archive(opened: zipfile.ZipFile, half: str) -> Drawings:
    paths = [tuple(name.split("/")) for name in opened.namelist()]
    return {
        path: partial(opened.read, "/".join(path))
        for path in paths
        if len(path) == 4 and path[0] == half and _is_drawing(path[3])
    }


def _is_drawing(name: str) -> bool:
    return name.endswith(".png") and not name.startswith(".")


def _decode(root: Path, path: tuple[str, ...], read: Callable[[], bytes]) -> Bytes:
    """Ink, 0 or 1, `[105, 105]`."""
    Image = pillow()  # noqa: N806

    try:
        with Image.open(io.BytesIO(read()), formats=["PNG"]) as image:
            grey = np.asarray(image.convert("L"))
            if grey.shape != (SIDE, SIDE):
                raise ValueError(f"it is {image.width}×{image.height}, not {SIDE}×{SIDE}")
    except Exception as error:  # a damaged image raises whatever its bytes happen to mean
        message = f"{root.joinpath(*path)}: cannot be read as a drawing, a PNG image ({error})"
        raise DataError(message) from error
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
