"""Omniglot on disk: find it, download it where it is not, and keep the bank made of it.

The layout is torchvision's: a folder `omniglot-py` that holds `images_background` and
`images_evaluation`, each unpacked or as a `.zip` (see `metablocks.tasks.omniglot_drawings`). It is
searched in the folder that the caller names, else in `$METABLOCKS_DATA`, in the cache folder, and
last by torchvision's download. The finished bank is kept in the cache folder, under a name made of
the state of the data and the version of the format (see `metablocks.tasks.kept_bank`).
"""

import hashlib
from pathlib import Path

from metablocks.errors import DataError
from metablocks.tasks.data_folders import downloaded, search
from metablocks.tasks.episodes import ClassBank
from metablocks.tasks.kept_bank import kept, stamp
from metablocks.tasks.omniglot_drawings import FOLDER, HALVES, LAYOUT, archive, drawings, read
from metablocks.torchvision_import import torchvision_module

FORMAT = 1  # of the kept bank: raise it when the images or their order change


def load(data: str | Path | None = None) -> ClassBank:
    """The bank of all characters, uint8 `[characters, 20, 28, 28]`, ink 255, on the CPU.

    Characters come in the order background, evaluation; in each by alphabet, then by character
    name; drawers 01 to 20. Names are `images_background/Greek/character01`. `data` is the folder
    that holds `omniglot-py`, or that folder; without it `$METABLOCKS_DATA` and the cache folder
    are searched, then torchvision downloads. The bank is kept in the cache folder, if that can be
    written; a kept bank that is damaged is made anew.

    Raises `DataError` where the data is absent, incomplete or unreadable.
    """
    root = find(data)
    if root is not None:
        return _kept(root)
    archives = [f"{FOLDER}/{half}.zip" for half in HALVES]
    with downloaded(_fetch, archives, name="Omniglot", layout=LAYOUT) as folder:
        return _kept(folder / FOLDER)


def find(data: str | Path | None = None) -> Path | None:
    """The `omniglot-py` folder in `data`; else in `$METABLOCKS_DATA` or the cache; else None.

    Raises `DataError` for a `data` that does not hold both halves of Omniglot.
    """
    return search(data, _within, name="Omniglot", layout=LAYOUT)


def _within(folder: Path) -> Path | None:
    for root in (folder, folder / FOLDER):
        if all(archive(root, half).is_file() or (root / half).is_dir() for half in HALVES):
            return root
    return None


def _fetch(folder: Path) -> None:
    for background in (True, False):
        torchvision_module("datasets").Omniglot(str(folder), background=background, download=True)


def _kept(root: Path) -> ClassBank:
    """The bank of the data in `root`: from the cache folder, or read, and kept there."""
    return kept(f"omniglot-{FORMAT}-{_fingerprint(root)[:20]}", lambda: read(root))


def _fingerprint(root: Path) -> str:
    """What tells one state of the data from another without decoding an image.

    Of an archive its bytes; of an unpacked tree the name, size and time of change of every file.
    """
    digest = hashlib.sha256()
    for half in HALVES:
        packed = archive(root, half)
        try:
            if packed.is_file():
                digest.update(hashlib.sha256(packed.read_bytes()).digest())
                continue
            for path in drawings(root / half):
                digest.update(stamp(path, root))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error})") from error
    return digest.hexdigest()
