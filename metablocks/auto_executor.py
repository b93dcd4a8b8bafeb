"""The executor that is measured, not assumed."""

import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from metablocks.compiled import Compile, Compiler
from metablocks.errors import ExecutorError
from metablocks.executors import (
    Executor,
    KeyedFunction,
    Loop,
    RandomDrawsWarning,
    TaskFunction,
    Tasks,
    Vmap,
    count_tasks,
)
from metablocks.generators import devices_of, get_states, set_states
from metablocks.memory import forget_peak, format_bytes, parse_bytes, peak_memory
from metablocks.types import TaskBatch, Tensors

log = logging.getLogger("metablocks")

_ROUNDS = 2  # timed calls of a candidate, after one that warms up


class AutoExecutor:
    """Runs the first batch by every candidate, and goes on with the fastest that fits.

    Candidates are `Loop`, and `Vmap` over all tasks and over chunks of an eighth, a quarter and a half
    of them. Each computes the first meta-gradient once to warm up and twice against the clock; peak
    memory beyond what was held before is measured too. The choice is made once, so that a run goes on
    as it began; `chosen` names it, `reason` is one line of figures, which is logged.

    - `memory`: a budget for the peak beyond what is held anyway, in bytes or as "4GiB". A `Vmap` that
      would break it by the figures of smaller chunks is not tried. Where nothing fits, the smallest
      is taken, with a warning.
    - `compile`: what is chosen is then compiled (see `Compiler`).

    Tasks of unequal size, which no `Vmap` takes, go to `Loop`, as does a model that `vmap` cannot run
    or that draws random numbers, whose draws would be others. Evaluations before the first
    meta-gradient go to `Vmap()`.

    Law: the chosen executor's, which is the plain loop's.

    >>> executor = AutoExecutor(memory="4GiB")
    >>> executor, executor.chosen
    (AutoExecutor(memory='4GiB', compile=False), None)

    Raises `BlockError` for a `memory` that is no size and another `compile` than True, False or "auto".
    """

    def __init__(self, *, memory: str | int | None = None, compile: Compile = False) -> None:  # noqa: A002
        Compiler.of("AutoExecutor", compile)
        self.memory = memory
        self.compile = compile
        self.chosen: str | None = None
        self.reason: str | None = None
        self._budget = None if memory is None else parse_bytes(memory)
        self._executor: Executor | None = None

    def __repr__(self) -> str:
        return f"AutoExecutor(memory={self.memory!r}, compile={self.compile!r})"

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        count = count_tasks(tasks)
        if not isinstance(tasks, TaskBatch):
            return Loop()(fn, shared, buffers, tasks)
        if self._executor is None and isinstance(fn, KeyedFunction):
            return self._choose(fn, shared, buffers, tasks, count)
        return (self._executor or Vmap())(fn, shared, buffers, tasks)

    def use(self, chosen: str) -> None:
        """Go on with an earlier choice, by its name."""
        chunk = chosen.removeprefix("vmap").strip()
        self.chosen = chosen
        self._executor = (
            Loop(compile=self.compile)
            if chosen == "loop"
            else Vmap(chunk=int(chunk) if chunk else None, compile=self.compile)
        )

    def _choose(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks, count: int
    ) -> tuple[Any, Any]:
        devices = devices_of(shared)
        chunks = sorted({count // 8, count // 4, count // 2} - {0, 1, count})
        names = ["loop", *(f"vmap {chunk}" for chunk in chunks), "vmap"]
        widths = dict(zip(names, [1, *chunks, count], strict=True))
        costs: dict[str, tuple[float, int]] = {}
        results: dict[str, tuple[Any, Any, list[Tensor]]] = {}
        begin = get_states(devices)
        for name in names:
            if self._breaks_budget(widths[name], costs, widths):
                continue
            plain = AutoExecutor()
            plain.use(name)
            assert plain._executor is not None
            try:
                results[name], costs[name] = _measure(
                    plain._executor, devices, begin, fn, shared, buffers, tasks
                )
            except (ExecutorError, RandomDrawsWarning) as error:
                log.info("%s is out: %s", name, error)
        fitting = {n: c for n, c in costs.items() if not self._budget or c[1] <= self._budget}
        if not fitting:
            smallest = min(costs, key=lambda name: costs[name][1])
            fitting = {smallest: costs[smallest]}
            warnings.warn(
                f"no executor keeps to memory={self.memory!r}; {smallest} takes the least, "
                f"{format_bytes(costs[smallest][1])}",
                stacklevel=5,
            )
        best = min(fitting, key=lambda name: fitting[name][0])
        self.use(best)
        told = ", ".join(
            f"{name} {1000 * seconds:.3g} ms and {format_bytes(peak)}"
            for name, (seconds, peak) in sorted(costs.items(), key=lambda item: item[1][0])
        )
        self.reason = f"{best} for {count} tasks: {told}"
        log.info("executor: %s", self.reason)
        to_sum, to_stack, end = results[best]
        set_states(devices, end)
        return to_sum, to_stack

    def _breaks_budget(
        self, width: int, costs: dict[str, tuple[float, int]], widths: dict[str, int]
    ) -> bool:
        """Whether so many tasks at once would break the budget, by what fewer of them took."""
        if self._budget is None or not costs:
            return False
        name = max(costs, key=lambda name: widths[name])
        return costs[name][1] * width / widths[name] > self._budget


def _measure(
    executor: Executor, devices: list[torch.device], begin: list[Tensor], *args: Any
) -> tuple[tuple[Any, Any, list[Tensor]], tuple[float, int]]:
    """What an executor gives, with the random states after it; its seconds, its peak in bytes."""
    device = devices[-1]  # the accelerator, where there is one
    times: list[float] = []
    forget_peak(device)
    held = peak_memory(device) or 0
    for _ in range(1 + _ROUNDS):
        set_states(devices, begin)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RandomDrawsWarning)
            to_sum, to_stack = executor(*args)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    peak = max(0, (peak_memory(device) or 0) - held)
    return (to_sum, to_stack, get_states(devices)), (min(times[1:]), peak)
