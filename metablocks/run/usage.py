"""What training costs, epoch by epoch: seconds and memory. Never part of a run's results."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class Meter:
    """Measures epochs, from the moment it is made: just before the first meta-step of a process.

    `spent` is what another process has spent on the first epoch, until it was stopped.

    >>> meter = Meter(torch.device("cpu"))
    >>> with meter.training():
    ...     pass  # a meta-step
    >>> sorted(meter.lap())
    ['memory_at_start', 'peak_memory', 'seconds', 'training_seconds']
    """

    def __init__(self, device: torch.device, spent: Mapping[str, float] | None = None) -> None:
        spent = spent or {}
        self.device = device
        forget_peak(device)
        self.memory_at_start = peak_memory(device)
        self._started = time.perf_counter() - spent.get("seconds", 0.0)
        self._training = spent.get("training_seconds", 0.0)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around a meta-step."""
        started = time.perf_counter()
        yield
        self._training += time.perf_counter() - started

    def spent(self) -> dict[str, float]:
        """The seconds of the epoch in progress so far, as in `lap`."""
        seconds = time.perf_counter() - self._started
        return {"seconds": round(seconds, 3), "training_seconds": round(self._training, 3)}

    def lap(self) -> dict[str, float | int | None]:
        """What the epoch cost that ends here; the next one begins.

        `seconds`: on the clock, everything included. `training_seconds`: of those, what meta-steps
        took, without validation, logs and checkpoints. `peak_memory`, `memory_at_start`: bytes, by
        `peak_memory`, now and when the meter was made: reading the data does not count where the
        peak can be forgotten.
        """
        memory = {
            "peak_memory": peak_memory(self.device),
            "memory_at_start": self.memory_at_start,
        }
        cost = {**self.spent(), **memory}
        self._started, self._training = time.perf_counter(), 0.0
        return cost


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now on: on Linux and on accelerators; elsewhere it goes on."""
    try:
        if device.type == "cpu":
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


def _peak_resident() -> int | None:
    """Linux: VmHWM. Elsewhere getrusage, which on Linux a process inherits from its parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on the BSDs
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
