"""Storage of data sets: search in folders, download, and a cache of decoded images.

A data set is looked for in the folder a caller names, else in `$METABLOCKS_DATA` and the cache
folder, and is downloaded last. A download goes to a folder of its own, so that a broken one leaves
nothing behind and two processes do not write one file; what is worth keeping moves to the cache.
"""

import contextlib
import hashlib
import http.client
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from metablocks.errors import DataError, MissingError
from metablocks.tasks.episode_sampling import ClassBank

_NO_DOWNLOAD = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, http.client.HTTPException)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/metablocks`, or `~/.cache/metablocks`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache), "metablocks")


def search_path() -> list[Path]:
    """The folders searched when no folder is named: `$METABLOCKS_DATA`, the cache folder."""
    folder = os.environ.get("METABLOCKS_DATA")
    return [*([Path(os.path.expanduser(folder))] if folder else []), cache_folder()]


def pillow() -> Any:
    """Pillow's module `Image`; needed only if there is no cached bank.

    Raises `MissingError` if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingError(
            "image files are read with Pillow, which is not installed: pip install 'metablocks[images]'"
        ) from error
    return Image


@dataclass(frozen=True)
class Storage:
    """A data set's place on disk: how to recognise it, and how to download it.

    `name` and `layout` describe the data set in errors. `within(folder)` is the place of the data
    set in a folder, or None. `fetch(folder)` downloads it into a folder, and the files `keep`,
    relative to that folder, stay in the cache folder; without `fetch`, `terms` says why there is no
    download.
    """

    name: str
    layout: str
    within: Callable[[Path], Path | None]
    fetch: Callable[[Path], object] | None = None
    keep: tuple[str, ...] = ()
    terms: str = ""

    def find(self, data: str | Path | None = None) -> Path | None:
        """The place of the data set in `data`; without `data` in the `search_path()`, or None.

        >>> Storage("Omniglot", "a folder", lambda folder: None).find("/no/such/folder")
        Traceback (most recent call last):
        metablocks.errors.DataError: data='/no/such/folder': there is no such folder; data is a
        folder, or its parent

        Raises `DataError` for a `data` without the data set, or a folder that cannot be read.
        """
        for folder in search_path() if data is None else [Path(os.path.expanduser(data))]:
            try:
                place = self.within(folder)
            except OSError as error:
                raise DataError(f"{error.filename or folder}: cannot be read ({error})") from error
            if place is not None:
                return place
        if data is None:
            return None
        state = f"no {self.name} is there" if folder.is_dir() else "there is no such folder"
        raise DataError(f"data={str(data)!r}: {state}; data is {self.layout}, or its parent")

    @contextlib.contextmanager
    def located(self, data: str | Path | None) -> Iterator[Path]:
        """The place of the data set: found, or downloaded for as long as the context lasts.

        Raises `DataError` if it is neither; the message says where it was looked for, why it is not
        downloaded, and how to name its folder. Raises it, too, for a file that cannot be read
        meanwhile.
        """
        place = self.find(data)
        with contextlib.nullcontext(place) if place else self._downloaded() as place:
            try:
                yield place
            except DataError:
                raise
            except OSError as error:
                raise DataError(f"{error.filename or place}: cannot be read ({error})") from error

    @contextlib.contextmanager
    def _downloaded(self) -> Iterator[Path]:
        if self.fetch is None:
            raise self._absent(self.terms, "Get it, and pass")
        cache = cache_folder()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = TemporaryDirectory(prefix="download-", dir=cache, ignore_cleanup_errors=True)
        except OSError:
            folder = TemporaryDirectory(prefix="metablocks-", ignore_cleanup_errors=True)
        with folder as name:
            scratch = Path(name)
            try:
                self.fetch(scratch)
                place = self.within(scratch)
                if place is None:
                    raise OSError("the download is incomplete")
            except _NO_DOWNLOAD as error:
                reason = f"{type(error).__name__}: {error}"
                advice = "Either run once where there is a network, or pass"
                raise self._absent(reason, advice) from error
            with contextlib.suppress(OSError):
                for file in self.keep:
                    (cache / file).parent.mkdir(exist_ok=True)
                    shutil.copyfile(scratch / file, copy := scratch / "copy")
                    os.replace(copy, cache / file)
            yield place

    def _absent(self, reason: str, advice: str) -> DataError:
        searched = ", ".join(map(str, search_path()))
        return DataError(
            f"{self.name} is not on this machine (searched {searched}) and cannot be downloaded "
            f"({reason}). {advice} --data FOLDER or set METABLOCKS_DATA=FOLDER to {self.layout}, "
            "or its parent"
        )


def cached(name: str, read: Callable[[], ClassBank]) -> ClassBank:
    """The bank `name` of the cache folder; else `read()`, written there if the folder can be written.

    A bank is written whole or not at all, and checked against its checksum when it is loaded; one
    that is damaged is read anew. `name` holds a `fingerprint` of the data.
    """
    path = cache_folder() / f"{name}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _load(path)
    bank = read()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, bank)
    return bank


def remembered(name: str, compute: Callable[[], str]) -> str:
    """The checksum kept under `name` in the cache folder; else `compute()`, kept if it can be."""
    path = cache_folder() / f"{name}.sha256"
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    checksum = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(checksum)
    return checksum


def fingerprint(root: Path, items: Iterable[str | Path]) -> str:
    """SHA-256, in hex, of a state of the data, taken without decoding an image.

    It covers a text itself, an archive's bytes, and the name below `root`, size and time of change
    of any other file.
    """
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, str):
            digest.update(item.encode())
        elif item.suffix == ".zip":
            digest.update(hashlib.sha256(item.read_bytes()).digest())
        else:
            state = item.stat()
            name = item.relative_to(root)
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _load(path: Path) -> ClassBank:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        names = tuple(str(name) for name in stored["names"])
        counts = tuple(int(count) for count in stored["counts"]) if "counts" in stored else ()
        bank = ClassBank(torch.from_numpy(stored["images"]), names, counts or None)
        if str(stored["checksum"]) != bank.checksum:
            raise ValueError("the checksum written with the bank is not the bank's")
    return bank


def _save(path: Path, bank: ClassBank) -> None:
    handle, scratch = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                images=bank.images.numpy(),
                names=np.array(bank.names),
                counts=np.array(bank.counts or (), dtype=np.int64),  # empty if all are equal
                checksum=np.array(bank.checksum),
            )
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
