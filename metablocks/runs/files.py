"""Files written whole or not at all; what cannot be written ends in one line, by `RunError`."""

import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from metablocks.errors import MetablocksError, RunError
from metablocks.memory import out_of_memory

PARTIAL = ".partial"
"""The end of the names of temporary files; those of dead processes may be deleted."""

_WRITABLE = "make the folder writable, or give --out another"
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there: the quota is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "--out takes a folder with a shorter path",
    errno.ENOENT: "the folder was moved or deleted meanwhile",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ELOOP: "take it away",
    errno.ENOMEM: "free some memory on this machine",
}


def write_atomically(
    path: Path, write: Callable[[Any], object], *, before: Path | None = None
) -> None:
    """Replace a file in one go: whoever reads it sees the old or the new, never a part.

    The old one is kept as `before`, if that is given; for a moment there is none at `path` then. The
    new one outlives a loss of power once this returns. Raises `RunError` as `writing` does, with the
    old file as it was, or as `before`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    with writing(path):
        try:
            with partial.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before and path.exists():
                path.replace(before)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the place and the remedy if a file or folder cannot be written, by `RunError`.

    That is for want of memory, too, as what is written is often copied first.

    >>> with writing(Path("runs/a/checkpoint.pt")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    metablocks.errors.RunError: runs/a/checkpoint.pt: cannot be written (No space left on device);
    free some space there. What was saved before is as it was
    """
    try:
        yield
    except MetablocksError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if out_of_memory(error):
            number, reason = errno.ENOMEM, "out of memory"
        elif not isinstance(error, OSError):
            raise
        remedy = _REMEDIES.get(number or 0, "--out takes a folder that can be written to")
        raise RunError(
            f"{path}: cannot be written ({reason or error}); {remedy}. What was saved before is as it "
            "was"
        ) from error


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to append to it.

    Raises `OSError` for a link, which in a run of somebody else's may lead to any file of the user's,
    and for a pipe, which would not be opened before somebody reads it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.ELOOP, "a link, pipe or folder, not a file")
    return path.open("ab")


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlive a loss of power, where the system has a call for that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that does not sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go; what UTF-8 does not have, as in some names of files, is escaped."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one go."""
    write_atomically(path, lambda file: file.write(content))
