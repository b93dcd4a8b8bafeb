"""A class bank that took long to read, kept in the cache folder.

It is written whole or not at all, and checked against its checksum when it is read back; one that
is damaged is made anew. Its name is made of the state of the data, so that other data is another
bank.
"""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from metablocks.tasks.data_folders import cache_folder
from metablocks.tasks.episodes import ClassBank


def kept(name: str, make: Callable[[], ClassBank]) -> ClassBank:
    """The bank kept as `name` in the cache folder; else `make()`, kept if that can be written."""
    path = cache_folder() / f"{name}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _reread(path)
    bank = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, bank)
    return bank


def stamp(path: Path, root: Path) -> bytes:
    """Name below `root`, size and time of change: tells files apart without reading them.

    Raises `OSError` where there is no such file.
    """
    status = path.stat()
    return f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()


def _reread(path: Path) -> ClassBank:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        names = tuple(str(name) for name in stored["names"])
        counts = tuple(int(count) for count in stored["counts"]) if "counts" in stored else ()
        bank = ClassBank(torch.from_numpy(stored["images"]), names, counts or None)
        if str(stored["checksum"]) != bank.checksum:
            raise ValueError("the checksum written with the bank is not the bank's")
    return bank


def _write(path: Path, bank: ClassBank) -> None:
    assert bank.names is not None
    handle, scratch = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                images=bank.images.numpy(),
                names=np.array(bank.names),
                counts=np.array(bank.counts or (), dtype=np.int64),  # none where all are equal
                checksum=np.array(bank.checksum),
            )
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
