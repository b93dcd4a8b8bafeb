"""The text that a run prints, kept in its folder: `log.txt`."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    log = logging.getLogger("metablocks")
    handler = _Keeper(path, delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(_Twice(sys.stdout, handler)):
            yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _Keeper(logging.FileHandler):
    """Writes a log as long as its file can be written."""

    def _open(self) -> io.TextIOWrapper:
        file = open_to_append(Path(self.baseFilename))
        return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening the file
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | MemoryError):
            super().handleError(record)
            return
        self.addFilter(lambda record: False)
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError, MemoryError):
            if stream is not None:
                stream.close()
        reason = getattr(error, "strerror", None) or "out of memory"
        _log.warning("%s: cannot be written (%s); it lacks the rest", self.baseFilename, reason)


class _Twice:
    """A stream whose text a log gets too, a line at a time."""

    def __init__(self, stream: Any, handler: logging.Handler) -> None:
        self._stream = stream
        self._handler = handler
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._handler.handle(logging.makeLogRecord({"msg": line}))
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
