"""The processes of one `torchrun`: they join, find out which they are, and exchange plain values.

    torchrun --nproc-per-node 4 -m metablocks run maml_strokes

Communication is that of `torch.distributed` (gloo on a CPU, nccl on GPUs), in its default group or one
of the caller's own. Who waits for a process that has ended gets a `ProcessError` at once, and for one
that hangs after `PATIENCE`.
"""

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metablocks.errors import MetablocksError, ProcessError, RunError, first_line

PATIENCE = timedelta(minutes=30)
"""The time that a process waits for the others, which may have executors to measure, or to compile.

So long it takes, too, until one that hangs (is stopped, not ended) is noticed: neither a shorter timeout
nor torch's monitored barrier tells it from one that compiles, or evaluates more slowly.
"""

_T = TypeVar("_T")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED, _ASKED = "metablocks/failed", "metablocks/asked"
_LAST_WORDS = 5.0  # seconds, where one has died and does not ask


def launched() -> bool:
    """True in a process that torchrun, or whatever else sets `RANK` and the like, has started.

    >>> launched()
    False
    """
    return all(name in os.environ for name in _VARIABLES)


def leads() -> bool:
    """True in the one process that prints and writes: rank 0, or a process by itself.

    >>> leads()
    True
    """
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Join the default group with the other processes that were launched; nothing for one by itself.

    Each process takes the accelerator of its local rank. A group that exists is used as it is.

    >>> with joined():
    ...     leads()
    True

    Raises `ProcessError` if the others do not come.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    import torch.distributed.nn  # later, its functions' defaults would hold the group for ever
    from torch.distributed.distributed_c10d import PrefixStore  # which not every torch has
    from torch.distributed.rendezvous import rendezvous

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.accelerator.is_available() and local < torch.accelerator.device_count():
        torch.accelerator.set_device_index(local)
    with _talking():
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
        store = PrefixStore(f"metablocks, attempt {attempt}", store)
        dist.init_process_group(store=store, rank=rank, world_size=count, timeout=PATIENCE)
    numbers(0.0)  # all are here: one that ends early leaves nobody who is still connecting
    try:
        yield
    except BaseException as error:
        says = isinstance(error, MetablocksError | KeyboardInterrupt)
        reported = _reported(store, rank) if says else False  # before the others notice
        if says:
            error.reported = reported  # type: ignore[attr-defined]
        if "nccl" not in str(dist.get_backend_config()):  # which would wait for the others first
            dist.destroy_process_group()
        _await_others(store, rank, count)
        raise
    dist.destroy_process_group()


def _reported(store: Any, rank: int) -> bool:
    """True if another process was the first to say why it ends; what it says is enough."""
    with suppress(RuntimeError):  # the store has gone
        return bool(store.compare_set(_FAILED, "", str(rank)) != str(rank).encode())
    return False


def _await_others(store: Any, rank: int, count: int) -> None:
    """Wait a little in rank 0, whose process the store ends with, for the others to have asked it."""
    with suppress(RuntimeError):
        asked, until = store.add(_ASKED, 1), time.monotonic() + _LAST_WORDS
        while rank == 0 and asked < count and time.monotonic() < until:
            time.sleep(0.05)
            asked = store.add(_ASKED, 0)


def check_device(device: torch.device) -> None:
    """Raise `RunError` for more processes than accelerators on this machine, if one is to be used."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    if device.type == "cpu" or count == 1:
        return
    here = torch.accelerator.device_count()
    if device.index is not None or count > here:
        raise RunError(
            f"{count} processes on this machine, on {device}, and it has {here} such devices: each "
            f"process takes one of its own. Give --device {device.type}, and --nproc-per-node {here} "
            "at most"
        )


def launch() -> tuple[str | None, bool]:
    """A name of the `torchrun` that started this process, and whether it may have done so before.

    The name is the same after a restart: on one machine it has the number of torchrun's own process, on
    several, where rank 0 may move to another, it is their `--rdzv-id`. None without torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None or not launched():
        return None, False
    if name != "none" and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return name, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    began = ""
    with suppress(OSError, IndexError):  # Linux: the parent's start, since numbers are used again
        text = Path(f"/proc/{os.getppid()}/stat").read_text()
        began = text.rpartition(")")[2].split()[19]
    return f"{name} {socket.gethostname()} {os.getppid()} {began}".rstrip(), True


def numbers(*mine: float, group: Any = None) -> list[list[float]]:
    """The numbers that all processes give, by rank; quicker than `gather`."""
    at = (
        "cpu"
        if "cpu" in dist.get_backend_config(group)
        else torch.accelerator.current_accelerator()
    )
    row = torch.tensor(mine, dtype=torch.float64, device=at)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    with _talking():
        dist.all_gather(rows, row, group=group)
    return [row.tolist() for row in rows]


def gather(value: _T, group: Any = None) -> list[_T]:
    """The values that all processes give, by rank."""
    each: list[Any] = [None] * dist.get_world_size(group)
    with _talking():
        dist.all_gather_object(each, value, group=group)
    return each


def broadcast(value: Any, source: int = 0, group: Any = None) -> Any:
    """The value that the process of rank `source` in the group gives."""
    box = [value]
    with _talking():
        dist.broadcast_object_list(box, group_src=source, group=group)
    return box[0]


def add_up(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """The sums over processes of tensors, which have equal shapes and dtypes everywhere.

    One message for each dtype and device.
    """
    sums = [*tensors]
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    for kind in sorted(kinds, key=str):
        places = [n for n, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensors[n].detach().reshape(-1) for n in places])
        with _talking():
            dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=group)
        parts = torch.split(flat, [tensors[n].numel() for n in places])
        for n, part in zip(places, parts, strict=True):
            sums[n] = part.view(tensors[n].shape)
    return sums


@contextmanager
def _talking() -> Iterator[None]:
    """A failure of the communication as a `ProcessError`."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = re.sub(r"^\[.*?\] ", "", first_line(error)).partition(". ")[0]  # gloo's own place
        raise ProcessError(
            f"the other processes do not answer: one of them has ended, or hangs ({reason})"
        ) from error
