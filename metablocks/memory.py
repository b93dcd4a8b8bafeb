"""Memory: the most that a process has held, budgets as people write them, what freed memory does."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import torch

from metablocks.checks import Such
from metablocks.errors import BlockError

_WORDS = 'bytes, or a size such as "4GiB", "512 MiB"'
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def parse_bytes(text: str | int) -> int:
    """A number of bytes: an integer, or text such as "512 MiB", "4GiB" or "2.5GB".

    >>> parse_bytes("4GiB"), parse_bytes("1.5 KB"), parse_bytes(7)
    (4294967296, 1500, 7)

    Raises `BlockError` for anything else, and for less than one byte.
    """
    size = _bytes(text)
    if size < 1:
        raise BlockError(f"memory is {text!r}; it takes {_WORDS}", field="memory")
    return size


def _bytes(text: str | int) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", str(text).strip())
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


Memory: TypeAlias = Annotated[str | int, Such(lambda text: _bytes(text) > 0, _WORDS)]
"""A budget as a field of a block."""


def format_bytes(size: float) -> str:
    """A size as people read it.

    >>> format_bytes(3 * 2**20), format_bytes(5 * 2**30)
    ('3 MiB', '5 GiB')
    """
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.4g} MiB"


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now on: on Linux and on accelerators; elsewhere it goes on.

    On the CPU what is free is given back first, or it would count as held.
    """
    try:
        if device.type == "cpu":
            release_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.get_device_module(device.type).reset_peak_memory_stats(device)
    except (OSError, AttributeError, RuntimeError):  # another system, or it is not permitted
        pass


def peak_memory(device: torch.device) -> int | None:
    """The most memory, in bytes, that this process has held so far; None where nobody knows.

    On the CPU the peak of the resident set: interpreter, libraries and data included. On an
    accelerator the peak of what torch has allocated there.

    >>> peak_memory(torch.device("meta")) is None
    True
    """
    if device.type == "cpu":
        return _peak_resident()
    try:
        return int(torch.get_device_module(device.type).max_memory_allocated(device))
    except (AttributeError, RuntimeError):  # a backend that does not count
        return None


def out_of_memory(error: BaseException) -> bool:
    """True for the exceptions by which Python, and torch on a CPU or an accelerator, run out of memory.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("MPS backend out of memory"))
    (True, True)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")  # mps; the CPU's
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


def release_memory(device: torch.device) -> None:
    """Give back to the system, or to the accelerator, what torch keeps of freed memory."""
    gc.collect()  # of an error, the frames that hold tensors
    if device.type == "cpu":
        release_freed_memory()
    else:
        empty_cache = getattr(torch.get_device_module(device.type), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


def keep_freed_memory() -> bool:
    """Let this process keep, for the tensors to come, the memory that tensors on the CPU gave back.

    The C library returns large blocks to the system, which clears every page of them when they are
    asked for again; several workers (`Loop(workers=2)`) wait for that in turn. From now on the process
    holds until it ends what it once took, and its peak may be a fifth higher. `metablocks run` does
    this when it begins.

    Returns whether it was set: glibc alone has it, and what the environment says of that stands:
    `MALLOC_TRIM_THRESHOLD_=131072`, glibc's own number, turns it off.

    Law: no result changes.
    Source: glibc's `mallopt`.

    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = _of_glibc("mallopt")
    said = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or said or any(name in os.environ for name in _MALLOC):
        return False
    # By the numbers of glibc's malloc.h. The pad keeps the arenas of threads, which go by it alone.
    top_pad, trim_threshold, mmap_threshold = -2, -1, -3
    most = 2**31 - 1
    settings = {mmap_threshold: most, trim_threshold: most, top_pad: 2**28}
    taken = [mallopt(option, value) == 1 for option, value in settings.items()]
    return all(taken)


def release_freed_memory() -> None:
    """Give back to the system what is free in this process, where the C library can (glibc)."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(function: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _peak_resident() -> int | None:
    """Linux: VmHWM. Elsewhere getrusage, which on Linux a process inherits from its parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on the BSDs
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
