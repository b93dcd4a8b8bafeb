"""The executor that is measured, not assumed."""

import logging
import time
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.compiled import Compile, Compiler
from metablocks.errors import ExecutorError, caller_stacklevel
from metablocks.executors import (
    Executor,
    Loop,
    RandomDrawsWarning,
    TaskFunction,
    Tasks,
    TaskWork,
    Vmap,
)
from metablocks.generators import (
    Generator,
    States,
    devices_of,
    generators_of,
    get_states,
    set_states,
)
from metablocks.memory import forget_peak, format_bytes, parse_bytes, peak_memory
from metablocks.types import TaskBatch, Tensors

log = logging.getLogger("metablocks")

_ROUNDS = 2  # timed calls of a candidate, after one that warms up


class AutoExecutor:
    """Runs the first batch by every candidate, and goes on with the fastest that fits.

    Candidates are `Loop`, and `Vmap` over all tasks and over chunks of an eighth, a quarter and a half
    of them; on a CPU then `Loop` with as many workers as torch has threads, and, where there are images,
    the faster of these two loops with query sets laid out channels last. Each computes the first
    meta-gradient once to warm up and twice against the clock; peak memory beyond what was held before
    is measured too. The choice is made once, so that a run goes on as it began; `chosen` names it,
    `reason` is one line of figures, which is logged.

    - `memory`: a budget for the peak beyond what is held anyway, in bytes or as "4GiB". A `Vmap` that
      would break it by the figures of smaller chunks is not tried. What breaks it is tried again with
      the estimator's thrifty twin, where it has one (`Adjoint` with fewer copies). Where nothing fits,
      the smallest is taken, with a warning.
    - `compile`: what is chosen is then traced or compiled (see `Compiler`).

    Tasks of unequal size, which no `Vmap` takes, go to `Loop`, as does a model that `vmap` cannot run
    or that draws random numbers, whose draws would be others. Evaluations before the first
    meta-gradient go to `Vmap()`.

    Law: the chosen executor's, which is the plain loop's.

    >>> executor = AutoExecutor(memory="4GiB")
    >>> executor, executor.chosen
    (AutoExecutor(memory='4GiB', compile=False), None)

    Raises `BlockError` for a `memory` that is no size and a `compile` that is none.
    """

    def __init__(self, *, memory: str | int | None = None, compile: Compile = False) -> None:  # noqa: A002
        Compiler.of("AutoExecutor", compile)
        self.memory = memory
        self.compile = compile
        self.reason: str | None = None
        self._budget = None if memory is None else parse_bytes(memory)
        self._choice: _Candidate | None = None
        self._executor: Executor | None = None

    def __repr__(self) -> str:
        return f"AutoExecutor(memory={self.memory!r}, compile={self.compile!r})"

    @property
    def chosen(self) -> str | None:
        """What was chosen, as its call; None before the first meta-gradient."""
        return str(self._choice) if self._choice else None

    def record(self) -> dict[str, Any] | None:
        """The choice as plain values, for `use`."""
        if self._choice is None:
            return None
        executor = self._choice.executor
        fields = {name: getattr(executor, name) for name in _fields(executor)}
        block = type(executor).__name__
        return {"block": block, "fields": fields, "thrifty": self._choice.thrifty}

    def use(self, record: dict[str, Any]) -> None:
        """Go on with an earlier choice."""
        block = {"Loop": Loop, "Vmap": Vmap}[record["block"]]
        self._go_on_with(_Candidate(block(**record["fields"]), record["thrifty"]))

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        count = len(tasks)
        if not isinstance(tasks, TaskBatch):
            return Loop()(fn, shared, buffers, tasks)
        if self._choice is None:
            if isinstance(fn, TaskWork) and fn.key is not None:
                return self._choose(fn, shared, buffers, tasks, count)
            return Vmap()(fn, shared, buffers, tasks)
        assert self._executor is not None
        return self._executor(self._choice.work(fn), shared, buffers, tasks)

    def _go_on_with(self, choice: "_Candidate") -> None:
        self._choice = choice
        self._executor = replace(choice.executor, compile=self.compile)

    def _choose(
        self, fn: TaskWork, shared: Any, buffers: Tensors, tasks: TaskBatch, count: int
    ) -> tuple[Any, Any]:
        devices = devices_of(shared)
        generators = generators_of(shared)
        begin = get_states(generators)
        costs: dict[_Candidate, tuple[float, int]] = {}
        results: dict[_Candidate, tuple[Any, Any, States]] = {}

        def fits(candidate: _Candidate) -> bool:
            return not self._budget or (candidate in costs and costs[candidate][1] <= self._budget)

        def measure(candidate: _Candidate) -> None:
            work = candidate.work(fn)
            try:
                results[candidate], costs[candidate] = _measure(
                    candidate.executor, devices[-1], generators, begin, work, shared, buffers, tasks
                )
            except (ExecutorError, RandomDrawsWarning) as error:
                log.info("%s is out: %s", candidate, error)

        chunks = sorted({count // 8, count // 4, count // 2} - {0, 1, count})
        for thrifty in (False, True) if fn.thrifty else (False,):
            if thrifty and all(map(fits, costs)):
                break
            loop = _Candidate(Loop(), thrifty)
            tried = [(loop, 1), *((_Candidate(Vmap(chunk=c), thrifty), c) for c in chunks)]
            for candidate, width in [*tried, (_Candidate(Vmap(), thrifty), count)]:
                if not self._breaks_budget(width, costs, thrifty, count):
                    measure(candidate)
            for settings in _settings(devices[-1], tasks, count):
                better = replace(loop, executor=replace(loop.executor, **settings))
                measure(better)
                if better in costs and costs[better][0] < costs[loop][0] and fits(better):
                    loop = better
        fitting = [candidate for candidate in costs if fits(candidate)]
        if not fitting:
            fitting = [min(costs, key=lambda candidate: costs[candidate][1])]
            warnings.warn(
                f"no executor keeps to memory={self.memory!r}; {fitting[0]} takes the least, "
                f"{format_bytes(costs[fitting[0]][1])}",
                stacklevel=caller_stacklevel(),
            )
        best = min(fitting, key=lambda candidate: costs[candidate][0])
        self._go_on_with(best)
        told = ", ".join(
            f"{candidate} {1000 * seconds:.3g} ms and {format_bytes(peak)}"
            for candidate, (seconds, peak) in sorted(costs.items(), key=lambda item: item[1][0])
        )
        self.reason = f"{best} for {count} tasks: {told}"
        log.info("executor: %s", self.reason)
        to_sum, to_stack, end = results[best]
        set_states(end)
        return to_sum, to_stack

    def _breaks_budget(
        self, width: int, costs: "dict[_Candidate, tuple[float, int]]", thrifty: bool, count: int
    ) -> bool:
        """Whether so many tasks at once would break the budget, by what fewer of them took."""
        if self._budget is None:
            return False
        known = {
            _width(c.executor, count): peak
            for c, (_, peak) in costs.items()
            if c.thrifty == thrifty
        }
        return bool(known) and known[max(known)] * width / max(known) > self._budget


@dataclass(frozen=True)
class _Candidate:
    executor: Loop | Vmap
    thrifty: bool = False

    def work(self, fn: TaskFunction) -> TaskFunction:
        """The function, or its thrifty twin."""
        return getattr(fn, "thrifty", None) or fn if self.thrifty else fn

    def __str__(self) -> str:
        set_ = [f"{k}={getattr(self.executor, k)!r}" for k in _fields(self.executor)]
        return f"{type(self.executor).__name__}({', '.join(set_)}){', thrifty' * self.thrifty}"


def _fields(executor: Loop | Vmap) -> list[str]:
    """The settings that are not the default's, but for compile."""
    names = [f.name for f in fields(executor) if f.init and f.name != "compile"]
    return [name for name in names if getattr(executor, name) != getattr(type(executor)(), name)]


def _width(executor: Loop | Vmap, count: int) -> int:
    """How many tasks are under way at a time."""
    return executor.workers if isinstance(executor, Loop) else executor.chunk or count


def _settings(device: torch.device, tasks: TaskBatch, count: int) -> list[dict[str, Any]]:
    """What may make a loop faster, one after another."""
    if device.type != "cpu":
        return []
    settings: list[dict[str, Any]] = []
    workers = min(torch.get_num_threads(), count)
    if workers > 1:
        settings.append({"workers": workers})
    leaves = pytree.tree_leaves(tasks.query[0])
    if any(x.ndim == 5 and x.is_floating_point() for x in leaves if isinstance(x, Tensor)):
        settings += [{"channels_last": "query"}, {"channels_last": True}]
    return settings


def _measure(
    executor: Executor,
    device: torch.device,
    generators: list[Generator],
    begin: States,
    *args: Any,
) -> tuple[tuple[Any, Any, States], tuple[float, int]]:
    """What an executor gives, with the random states after it; its seconds, its peak in bytes."""
    times: list[float] = []
    forget_peak(device)
    held = peak_memory(device) or 0
    for _ in range(1 + _ROUNDS):
        set_states(begin)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RandomDrawsWarning)
            to_sum, to_stack = executor(*args)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    peak = max(0, (peak_memory(device) or 0) - held)
    return (to_sum, to_stack, get_states(generators)), (min(times[1:]), peak)
