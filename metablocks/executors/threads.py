"""Work on several items at once in threads of this process, torch's own threads divided among them.

Small operations gain little from a second thread inside them: two items side by side on one thread
each are done sooner than one after another on two.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    take: Callable[[Result], object],
) -> None:
    """`take(work(item))` for every item in turn, `threads` of them under way at a time.

    In the threads gradients are enabled, autocast is on, and default device, current device and stream
    are as for the caller. The first error ends it, once what is under way is done.

    >>> taken = []
    >>> map_in_threads(abs, [-1, -2, -3], threads=2, take=taken.append)
    >>> taken
    [1, 2, 3]
    """
    before = torch.get_num_threads()
    each = max(1, before // threads)
    run = partial(_run, _Modes(), work)
    try:
        with ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(each,)
        ) as pool:
            # Not pool.map: a generator would turn a StopIteration of the work into its own end.
            futures = deque(pool.submit(run, item) for item in items)
            try:
                while futures:
                    take(futures.popleft().result())
            finally:
                for future in futures:
                    future.cancel()
    finally:
        torch.set_num_threads(before)  # a part of that setting is the whole process's


def _run(modes: "_Modes", work: Callable[[Item], Result], item: Item) -> Result:
    with modes.entered():
        return work(item)


class _Modes:
    """The caller's modes, which torch keeps for each thread."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self.device = torch.get_default_device()
        self.index, self.stream = _current(accelerator) if accelerator else (None, None)
        types = ["cpu", *([accelerator.type] if accelerator else [])]
        self.grad = torch.is_grad_enabled()
        self.cache = torch.is_autocast_cache_enabled()
        self.autocast = {
            t: torch.get_autocast_dtype(t) for t in types if torch.is_autocast_enabled(t)
        }

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.index is not None:
                torch.accelerator.set_device_index(self.index)
            if self.stream is not None:
                torch.accelerator.set_stream(self.stream)
            if self.device.type != "cpu":  # a device mode costs a Python call at every operation
                stack.enter_context(self.device)
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.cache))
            yield


def _current(accelerator: torch.device) -> tuple[int | None, torch.Stream | None]:
    """Current device and stream; none of a backend that is not in use, or has no such thing (mps)."""
    used = getattr(torch.get_device_module(accelerator.type), "is_initialized", None)
    if used is None or not used():
        return None, None
    index = torch.accelerator.current_device_index()
    try:
        return index, torch.accelerator.current_stream()
    except (RuntimeError, NotImplementedError):
        return index, None
