"""Where data sets lie: the folder a caller names, `$METABLOCKS_DATA`, the cache folder, a download.

One data set has one folder or archive name, which is looked for in these places in this order. A
download goes to a folder of its own, so that a broken one leaves nothing behind and two processes
do not write one file; what is worth keeping of it moves to the cache folder.
"""

import contextlib
import http.client
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metablocks.errors import DataError

_NO_DOWNLOAD = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, http.client.HTTPException)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/metablocks`, or `~/.cache/metablocks`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "metablocks")


def places() -> list[Path]:
    """Where data is looked for when no folder is named: `$METABLOCKS_DATA`, the cache folder."""
    named = os.environ.get("METABLOCKS_DATA")
    return [*([Path(named).expanduser()] if named else []), cache_folder()]


def search(
    data: str | Path | None, within: Callable[[Path], Path | None], *, name: str, layout: str
) -> Path | None:
    """`within(data)`; without `data` the first of `places()` that `within` finds something in.

    `within` says where in a folder the data set lies, or None; `name` and `layout` are for people.

    Raises `DataError` for a `data` that does not hold the data set, or a folder that cannot be read.

    >>> search("/no/such/folder", lambda folder: None, name="Omniglot", layout="a folder")
    Traceback (most recent call last):
    metablocks.errors.DataError: data='/no/such/folder': there is no such folder; data is a folder,
    or its parent
    """
    if data is not None:
        folder = Path(data).expanduser()
        found = _look(within, folder)
        if found is None:
            state = f"no {name} is there" if folder.is_dir() else "there is no such folder"
            raise DataError(f"data={str(data)!r}: {state}; data is {layout}, or its parent")
        return found
    for folder in places():
        if (found := _look(within, folder)) is not None:
            return found
    return None


def _look(within: Callable[[Path], Path | None], folder: Path) -> Path | None:
    try:
        return within(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error})") from error


def absent(name: str, why: str, ways: str, layout: str) -> DataError:
    """The error of a data set that is in no place: where was looked, and what would work.

    `why` it is not downloaded; `ways` to get it, up to and without naming the folder.
    """
    searched = ", ".join(str(place) for place in places())
    return DataError(
        f"{name} is not on this machine (searched {searched}) and cannot be downloaded ({why}). "
        f"{ways} --data FOLDER or set METABLOCKS_DATA=FOLDER to {layout}, or its parent"
    )


@contextlib.contextmanager
def downloaded(
    fetch: Callable[[Path], object], keep: Sequence[str], *, name: str, layout: str
) -> Iterator[Path]:
    """A folder that `fetch` has downloaded the data set into; it lasts as long as the context.

    The files `keep`, relative to that folder, stay in the cache folder, if it can be written.

    Raises `DataError` where `fetch` fails; the message names both ways to get the data.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="download-", dir=cache))
    except OSError:
        scratch = Path(tempfile.mkdtemp(prefix="metablocks-"))
    try:
        try:
            fetch(scratch)
        except _NO_DOWNLOAD as error:
            why = f"{type(error).__name__}: {error}"
            ways = "Either run once where there is a network, or pass"
            raise absent(name, why, ways, layout) from error
        with contextlib.suppress(OSError):
            for file in keep:
                (cache / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(scratch / file, kept := scratch / "keep")
                os.replace(kept, cache / file)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
