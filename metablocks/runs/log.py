"""The text that a run prints, kept in its folder: `log.txt`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def kept_lines(path: Path) -> Iterator[None]:
    """Append to `path` what is printed, and what the package logs, meanwhile; progress bars are not.

    The file is opened with the first text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.txt"
    >>> with kept_lines(path):
    ...     print("epoch 1")
    epoch 1
    >>> path.read_text().splitlines()
    ['epoch 1']
    """
    log = logging.getLogger("metablocks")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(_Twice(sys.stdout, handler)):
            yield
    finally:
        log.removeHandler(handler)
        handler.close()


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
