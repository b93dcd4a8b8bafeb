"""Omniglot on disk: find it, download it where it is not, and keep the bank made of it.

The layout is torchvision's: a folder `omniglot-py` that holds `images_background` and
`images_evaluation`, each unpacked or as a `.zip` (see `metablocks.tasks.omniglot_drawings`). It is
searched in the folder that the caller names, else in `$METABLOCKS_DATA`, in the cache folder, and
last by torchvision's download. The finished bank is kept in the cache folder, under a name made of
the state of the data and the version of the format; it is written whole or not at all, and checked
when it is read back.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from metablocks.errors import DataError
from metablocks.tasks.episodes import ClassBank
from metablocks.tasks.omniglot_drawings import FOLDER, HALVES, LAYOUT, archive, drawings, read
from metablocks.tasks.torchvision_import import torchvision_datasets

FORMAT = 1  # of the kept bank: raise it when the images or their order change
_NO_DOWNLOAD = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, http.client.HTTPException)


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
    with _downloaded() as root:
        return _kept(root)


def checksum(bank: ClassBank) -> str:
    """SHA-256, in hex, of a bank's names, shape and images."""
    digest = hashlib.sha256(json.dumps([bank.names, list(bank.images.shape)]).encode())
    digest.update(bank.images.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/metablocks`, or `~/.cache/metablocks`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "metablocks")


def find(data: str | Path | None = None) -> Path | None:
    """The `omniglot-py` folder in `data`; else in `$METABLOCKS_DATA` or the cache; else None.

    Raises `DataError` for a `data` that does not hold both halves of Omniglot.
    """
    if data is not None:
        folder = Path(data).expanduser()
        found = _within(folder)
        if found is None:
            state = "no Omniglot is there" if folder.is_dir() else "there is no such folder"
            raise DataError(f"data={str(data)!r}: {state}; data is {LAYOUT}, or its parent")
        return found
    for folder in _places():
        if (found := _within(folder)) is not None:
            return found
    return None


def _places() -> list[Path]:
    named = os.environ.get("METABLOCKS_DATA")
    return [*([Path(named).expanduser()] if named else []), cache_folder()]


def _within(folder: Path) -> Path | None:
    for root in (folder, folder / FOLDER):
        if all(archive(root, half).is_file() or (root / half).is_dir() for half in HALVES):
            return root
    return None


@contextlib.contextmanager
def _downloaded() -> Iterator[Path]:
    """Download by torchvision; the archives stay in the cache folder, if it can be written.

    The download goes to a folder of its own: a broken one leaves nothing behind, and two processes
    do not write one file.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix="download-", dir=cache)
    except OSError:
        scratch = tempfile.mkdtemp(prefix="metablocks-")
    try:
        try:
            for background in (True, False):
                torchvision_datasets().Omniglot(scratch, background=background, download=True)
        except _NO_DOWNLOAD as error:
            searched = ", ".join(str(place) for place in _places())
            raise DataError(
                f"Omniglot is not on this machine (searched {searched}) and cannot be downloaded "
                f"({type(error).__name__}: {error}). Either run once where there is a network, or "
                f"pass --data FOLDER or set METABLOCKS_DATA=FOLDER to {LAYOUT}, or its parent"
            ) from error
        root = Path(scratch, FOLDER)
        with contextlib.suppress(OSError):
            (cache / FOLDER).mkdir(exist_ok=True)
            for half in HALVES:
                shutil.copyfile(archive(root, half), kept := Path(scratch, f"{half}.keep"))
                os.replace(kept, archive(cache / FOLDER, half))
        yield root
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _kept(root: Path) -> ClassBank:
    """The bank of the data in `root`: from the cache folder, or read, and kept there."""
    path = cache_folder() / f"omniglot-{FORMAT}-{_fingerprint(root)[:20]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _reread(path)
    bank = read(root)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, bank)
    return bank


def _reread(path: Path) -> ClassBank:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        names = tuple(str(name) for name in stored["names"])
        bank = ClassBank(torch.from_numpy(stored["images"]), names)
        if str(stored["checksum"]) != checksum(bank):
            raise ValueError("the checksum written with the bank is not the bank's")
    return bank


def _write(path: Path, bank: ClassBank) -> None:
    handle, scratch = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                images=bank.images.numpy(),
                names=np.array(bank.names),
                checksum=np.array(checksum(bank)),
            )
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


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
                status = path.stat()
                name = path.relative_to(root)
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error})") from error
    return digest.hexdigest()
