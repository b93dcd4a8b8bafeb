"""What training costs, epoch by epoch: seconds and memory. Never part of a run's results."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from metablocks.memory import forget_peak, peak_memory


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
