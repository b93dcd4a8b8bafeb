"""Logs, one line of JSON an epoch or test: read in spite of damage, written without nan."""

import json
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without what a killed process left of one; none if there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def read_rows(path: Path) -> list[dict[str, Any] | None]:
    """The whole lines of a log; None for a damaged one."""

    def read(line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        known = isinstance(row.get("epoch"), int) if "epoch" in row else "test" in row
        return row if known else None

    return [read(line) for line in whole_lines(path)]


def epochs_of(lines: list[dict[str, Any] | None]) -> list[int]:
    """The epoch of every line of a log; a damaged line is taken for the next one, a test for its last.

    >>> epochs_of([{"epoch": 1}, None, {"epoch": 3}, {"test": {}}])
    [1, 2, 3, 3]
    """
    epochs: list[int] = []
    for row in lines:
        last = epochs[-1] if epochs else 0
        epochs.append(last + 1 if row is None else row.get("epoch", last))
    return epochs


def json_line(row: dict[str, Any]) -> bytes:
    """A line of a log, with null in the place of what JSON has no number for.

    >>> json_line({"epoch": 1, "train_loss": float("nan")})
    b'{"epoch": 1, "train_loss": null}\\n'
    """
    return f"{json.dumps(to_jsonable_python(row, inf_nan_mode='null'), allow_nan=False)}\n".encode()
