"""Files of `torch.save` that end with their checksum.

    <torch.save of the content> <"metablocks checkpoint, sha256 "> <64 hex digits> <newline>

The last line seals the file: one that was torn, cut short, changed in a single bit or written by
something else is recognised before anything of it is used. `torch.load` reads the file as it is.
"""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metablocks.errors import DamagedError, RunError, first_line

_SEAL = b"metablocks checkpoint, sha256 "
_LENGTH = len(_SEAL) + 64 + 1


def write_sealed(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write the content of a checkpoint, and its checksum as the last line."""
    summing: Any = _Summing(file)
    try:
        torch.save(content, summing)
    except RuntimeError as error:  # torch's own, about what the failure left
        raise error.__context__ or error from None
    file.write(_SEAL + summing.digest.hexdigest().encode() + b"\n")


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a file of `torch.save`, on the CPU, and whether it is sealed.

    Raises `DamagedError` for a file that is absent, is not as it was written, or holds no format, and
    `RunError` for one that cannot be read.
    """
    if not path.is_file():
        raise DamagedError(f"{path}: no such checkpoint")
    try:
        with path.open("rb") as file:
            sealed = _is_sealed(file)
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        number = getattr(error, "errno", errno.EINVAL)  # which torch has for a file cut short
        if isinstance(error, MemoryError) or number != errno.EINVAL:
            raise RunError(f"{path}: cannot be read ({first_line(error)})") from error
        raise DamagedError(f"{path}: not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise DamagedError(f"{path}: not a metablocks checkpoint")
    return content, sealed


class _Summing:
    """A file that takes the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _is_sealed(file: BinaryIO) -> bool:
    """True for a file whose last line is the checksum of all before it; the file is rewound.

    Raises `ValueError` for another checksum.
    """
    length = file.seek(0, os.SEEK_END) - _LENGTH
    file.seek(max(length, 0))
    seal = file.read()
    file.seek(0)
    if length < 0 or not seal.startswith(_SEAL):
        return False
    digest, left = hashlib.sha256(), length
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    file.seek(0)
    if seal != _SEAL + digest.hexdigest().encode() + b"\n":
        raise ValueError("its checksum is another: the file was changed after it was written")
    return True
