"""The text that a run prints, kept in its folder: `log.txt`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metablocks.runs.files import open_to_append

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def kept_lines(path: Path) -> Iterator[None]:
    """Append to `path` what is printed, and what the package logs, meanwhile; progress bars are not.

    The file is opened with the first text. If it cannot be written, one line says so, and the rest is
    not kept.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.txt"
    >>> with kept_lines(path):
    ...     print("epoch 1")
    epoch 1
    >>> path.read_text().splitlines()
    ['epoch 1']
    """
    log, file = logging.getLogger("metablocks"), _Kept(path)
    handler = logging.StreamHandler(file)
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(_Twice(sys.stdout, file)):
            yield
    finally:
        log.removeHandler(handler)
        file.close()


class _Kept:
    """Text that a file gets as long as it can be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._lost = False

    def write(self, text: str) -> None:
        if self._lost:
            return
        try:
            self._file = self._file or open_to_append(self.path)
            self._file.write(text.encode(errors="backslashreplace"))
            self._file.flush()
        except (OSError, MemoryError) as error:
            self._lost = True
            self.close()
            reason = getattr(error, "strerror", None) or "out of memory"
            _log.warning("%s: cannot be written (%s); it lacks the rest", self.path, reason)

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError, MemoryError):
                self._file.close()


class _Twice:
    """A stream whose text a file gets, too."""

    def __init__(self, stream: Any, file: _Kept) -> None:
        self._stream = stream
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
