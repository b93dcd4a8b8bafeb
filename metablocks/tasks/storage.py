"""Storage of data sets: search in folders, download, and files that are read with care.

A data set is looked for in the folder a caller names, else in `$METABLOCKS_DATA` and the cache
folder, and is downloaded last. A download goes to a folder of its own, so that a broken one leaves
nothing behind and two processes do not write one file; what is worth keeping moves to the cache.
"""

import contextlib
import hashlib
import http.client
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from metablocks.errors import DataError, MetablocksError, first_line

FILE_LIMIT = 2**28
"""The most bytes of a file or an archive's member: the largest of the data sets is 155 MB."""

_NO_DOWNLOAD = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, http.client.HTTPException)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/metablocks`, or `~/.cache/metablocks`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache), "metablocks")


def search_path() -> list[Path]:
    """The folders searched when no folder is named: `$METABLOCKS_DATA`, the cache folder."""
    folder = os.environ.get("METABLOCKS_DATA")
    return [*([Path(os.path.expanduser(folder))] if folder else []), cache_folder()]


@contextlib.contextmanager
def reading(path: object, kind: str) -> Iterator[None]:
    """Turn whatever a damaged or foreign file raises into one `DataError`: the file, why, the remedy.

    >>> with reading("a.zip", "a zip archive"):
    ...     raise zipfile.BadZipFile("File is not a zip file")
    Traceback (most recent call last):
    metablocks.errors.DataError: a.zip: cannot be read as a zip archive (BadZipFile: File is not a zip
    file); it is damaged or of another kind: get it anew, or take it away
    """
    try:
        yield
    except MetablocksError:
        raise
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        plain = isinstance(error, OSError | ValueError)  # whose words say enough
        words = " ".join(first_line(error).split())
        why = words if plain else f"{type(error).__name__}: {words}"
        raise DataError(
            f"{path}: cannot be read as {kind} ({why}); it is damaged or of another kind: get it anew, "
            "or take it away"
        ) from error


@contextlib.contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turn the error of a file or folder that cannot be read into a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or place}: cannot be read ({error})") from error


def read_file(path: Path | str, kind: str, limit: int = FILE_LIMIT) -> bytes:
    """The bytes of a file, at most `limit`: its size is looked at first, and a pipe is not waited for.

    Raises `DataError`; `kind` says there what the file should be.
    """
    with reading(path, kind):
        check_size(check_file(path), limit)
        return Path(path).read_bytes()


def check_file(path: Path | str) -> int:
    """The size of a file; raises `ValueError` for what is none, and may keep a reader waiting."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is a folder, pipe or device, not a file")
    return state.st_size


def check_size(size: int, limit: int) -> None:
    """Raise `ValueError` for what is larger than its kind ever is."""
    if size > limit:
        raise ValueError(f"it holds {size:,} bytes, and at most {limit:,} are read")


@contextlib.contextmanager
def unzipped(path: Path, limit: int = FILE_LIMIT) -> Iterator[dict[str, Callable[[], bytes]]]:
    """The members of a zip archive by name: functions that give their bytes, at most `limit`.

    Raises `DataError` for an archive that cannot be read, and, by such a function, for a member that
    cannot: too large, damaged, encrypted, packed by an unknown method.
    """

    def read(info: zipfile.ZipInfo) -> bytes:
        with reading(f"{path}: {info.filename}", "a member of a zip archive"):
            check_size(info.file_size, limit)
            return archive.read(info)

    with contextlib.ExitStack() as stack:
        members: dict[str, Callable[[], bytes]]
        with reading(path, "a zip archive"):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = {info.filename: partial(read, info) for info in archive.infolist()}
        yield members


@dataclass(frozen=True)
class Storage:
    """A data set's place on disk: how to recognise it, and how to download it.

    `name` and `layout` describe the data set in errors. In a folder it is the first of `places` (""
    is the folder itself) for which `holds(place)` is true. `fetch(folder)` downloads it into a folder,
    and the files `keep`, relative to that folder, stay in the cache folder; without `fetch`, `terms`
    says why there is no download.
    """

    name: str
    layout: str
    places: tuple[str, ...]
    holds: Callable[[Path], bool]
    fetch: Callable[[Path], object] | None = None
    keep: tuple[str, ...] = ()
    terms: str = ""

    def find(self, data: str | Path | None = None) -> Path | None:
        """The place of the data set in `data`; without `data` in the `search_path()`, or None.

        >>> Storage("Omniglot", "a folder", ("",), Path.is_dir).find("/no/such/folder")
        Traceback (most recent call last):
        metablocks.errors.DataError: data='/no/such/folder': there is no such folder; data is a
        folder, or its parent

        Raises `DataError` for a `data` without the data set, or a folder that cannot be read.
        """
        for folder in search_path() if data is None else [Path(os.path.expanduser(data))]:
            with readable(folder):
                place = self._within(folder)
            if place is not None:
                return place
        if data is None:
            return None
        state = f"no {self.name} is there" if folder.is_dir() else "there is no such folder"
        raise DataError(f"data={str(data)!r}: {state}; data is {self.layout}, or its parent")

    def _within(self, folder: Path) -> Path | None:
        return next((p for p in (folder / place for place in self.places) if self.holds(p)), None)

    def whereabouts(self) -> str:
        """The place of the data set on this machine in words, or where it was looked for.

        Raises `DataError` for a folder that cannot be read.
        """
        place = self.find()
        if place is not None:
            return f"{self.name} is in {place}, to be read by --data {place}"
        way = "a run downloads it" if self.fetch else "it has no download: --data FOLDER"
        return f"{self.name} is not here (searched {self._searched}); {way}"

    @property
    def _searched(self) -> str:
        return ", ".join(map(str, search_path()))

    @contextlib.contextmanager
    def located(self, data: str | Path | None) -> Iterator[Path]:
        """The place of the data set: found, or downloaded for as long as the context lasts.

        Raises `DataError` if it is neither; the message says where it was looked for, why it is not
        downloaded, and how to name its folder. Raises it, too, for a file that cannot be read
        meanwhile.
        """
        place = self.find(data)
        with (
            contextlib.nullcontext(place) if place else self._downloaded() as place,
            readable(place),
        ):
            yield place

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
                place = self._within(scratch)
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
        return DataError(
            f"{self.name} is not on this machine (searched {self._searched}) and cannot be downloaded "
            f"({reason}). {advice} --data FOLDER or set METABLOCKS_DATA=FOLDER to {self.layout}, "
            "or its parent"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file in the folder of `path`, which takes its place when it is whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def remembered(name: str, compute: Callable[[], str]) -> str:
    """The checksum kept whole under `name` in the cache folder; else `compute()`, kept if it can be."""
    path = cache_folder() / f"{name}.sha256"
    with contextlib.suppress(OSError, ValueError):  # damaged, or not there
        check_file(path)
        known, its_own = path.read_text().split()
        if its_own == hashlib.sha256(known.encode()).hexdigest():
            return known
    checksum = compute()
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(f"{checksum} {hashlib.sha256(checksum.encode()).hexdigest()}".encode())
    return checksum


def fingerprint(root: Path, items: Iterable[str | Path]) -> str:
    """SHA-256, in hex, of a state of the data, taken without decoding an image.

    It covers a text itself, an archive's bytes, and of any other file the name below `root`, its size
    and its times: of the contents, which copying and unpacking set at will, and of any change.
    """
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, str):
            digest.update(name_bytes(item))
        elif item.suffix == ".zip":
            digest.update(hashlib.sha256(read_file(item, "a zip archive")).digest())
        else:
            state = item.stat()
            times = f"{state.st_mtime_ns}\0{state.st_ctime_ns}"
            digest.update(name_bytes(f"{item.relative_to(root)}\0{state.st_size}\0{times}\n"))
    return digest.hexdigest()


def below_here(path: Path) -> str:
    """The folder in which a relative path is looked for, as part of a message; nothing for others.

    >>> below_here(Path("/data/birds"))
    ''
    """
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def name_bytes(name: str) -> bytes:
    """The bytes of a file's name, which need not be a text in UTF-8.

    >>> name_bytes("café"), name_bytes("caf\\udce9")
    (b'caf\\xc3\\xa9', b'caf\\xe9')
    """
    return name.encode("utf-8", "surrogateescape")
