"""Files of `torch.save` that end with their checksum.

    <torch.save of the content> <"metablocks checkpoint, sha256 "> <64 hex digits> <newline>

The last line seals the file: one that was torn, cut short, changed in a single bit or written by
something else is recognised before anything of it is used. `torch.load` reads the file as it is.
"""

import errno
import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metablocks.errors import DamagedError, RunError, first_line

_SEAL = b"metablocks checkpoint, sha256 "
_LENGTH = len(_SEAL) + 64 + 1


def write_sealed(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write the content of a checkpoint, and its checksum as the last line."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file.write(buffer.getbuffer())
    file.write(_seal(buffer.getbuffer()))


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a file of `torch.save`, on the CPU, and whether it is sealed.

    Raises `DamagedError` for a file that is absent, is not as it was written, or holds no format, and
    `RunError` for one that cannot be read.
    """
    if not path.is_file():
        raise DamagedError(f"{path}: no such checkpoint")
    try:
        file = path.read_bytes()
        saved, seal = memoryview(file)[:-_LENGTH], file[-_LENGTH:]
        sealed = seal.startswith(_SEAL)
        if sealed and seal != _seal(saved):
            raise ValueError("its checksum is another: the file was changed after it was written")
        content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:
        number = getattr(error, "errno", errno.EINVAL)  # which torch has for a file cut short
        if isinstance(error, MemoryError) or number != errno.EINVAL:
            raise RunError(f"{path}: cannot be read ({first_line(error)})") from error
        raise DamagedError(f"{path}: not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise DamagedError(f"{path}: not a metablocks checkpoint")
    return content, sealed


def _seal(saved: memoryview) -> bytes:
    """The last line of a file that holds these bytes before it."""
    return _SEAL + hashlib.sha256(saved).hexdigest().encode() + b"\n"
