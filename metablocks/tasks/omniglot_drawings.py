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

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.errors import DataError
from metablocks.tasks.image_files import opened, pixels
from metablocks.tasks.image_sets import Bank
from metablocks.tasks.storage import read_file, unzipped

Bytes = NDArray[np.uint8]

FOLDER = "omniglot-py"
HALVES = ("images_background", "images_evaluation")
DRAWERS = 20
SIDE, SIZE = 105, 28  # pixels of a drawing, of an image in the bank
LAYOUT = (
    f"a folder {FOLDER}/ with {HALVES[0]} and {HALVES[1]}, each unpacked "
    "(<Alphabet>/<characterNN>/<CCCC>_<DD>.png) or as .zip"
)


def archive(root: Path, half: str) -> Path:
    """The path of the archive of a half, which need not exist."""
    return root / f"{half}.zip"


def files(root: Path, half: str) -> list[Path]:
    """The files of a half: its archive, or else its drawings, sorted."""
    packed = archive(root, half)
    if packed.is_file():
        return [packed]
    return sorted(path for path in (root / half).glob("*/*/*.png") if _is_drawing(path.name))


def read(root: Path) -> Bank:
    """The bank of the data in the folder `root`, ink 255.

    Raises `DataError` naming the archive, character or drawing that is missing or damaged.
    """
    inks = {name: inks for half in HALVES for name, inks in _characters(root, half)}
    images = np.concatenate([_reduce(np.stack(of_class)) for of_class in inks.values()])
    return Bank(dict.fromkeys(inks, DRAWERS), torch.from_numpy(images[:, None]))


def _characters(root: Path, half: str) -> Iterator[tuple[str, list[Bytes]]]:
    """`(half/alphabet/character, its 20 drawings)` in order."""
    packed = archive(root, half)
    with unzipped(packed) if packed.is_file() else nullcontext(_unpacked(root, half)) as members:
        drawings: dict[tuple[str, ...], Callable[[], bytes]] = {}
        for name, member in members.items():
            path = tuple(name.split("/"))
            if len(path) == 4 and path[0] == half and _is_drawing(path[3]):
                drawings[path] = member
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
            yield name, [_decode(f"{root}/{'/'.join(file)}", drawings[file]()) for file in files]


def _unpacked(root: Path, half: str) -> dict[str, Callable[[], bytes]]:
    """The drawings of a half in a folder, as `unzipped` has those of an archive."""
    return {
        path.relative_to(root).as_posix(): partial(read_file, path, "a drawing")
        for path in files(root, half)
    }


def _is_drawing(name: str) -> bool:
    return name.endswith(".png") and not name.startswith(".")


def _decode(path: str, content: bytes) -> Bytes:
    """Ink, 0 or 1, `[105, 105]`."""
    with opened(path, content) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"it is {image.width}×{image.height}, not {SIDE}×{SIDE}")
        grey = pixels(image, None, 1)[0].numpy()
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
