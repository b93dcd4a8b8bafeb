"""Choose an executor by measuring: every candidate computes one meta-gradient against the clock."""

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import UNCHECKED, checked
from metablocks.errors import ExecutorError, caller_stacklevel, first_line
from metablocks.estimators import Adjoint, Estimator
from metablocks.executors import Loop, RandomDrawsWarning, Vmap, check_tasks
from metablocks.executors.compiled import Compile
from metablocks.generators import devices_of
from metablocks.learner import MetaLearner
from metablocks.memory import (
    Memory,
    forget_peak,
    format_bytes,
    out_of_memory,
    parse_bytes,
    peak_memory,
    release_memory,
)
from metablocks.types import TaskBatch, Tasks, Tensors, as_tasks

log = logging.getLogger("metablocks")

_TRIES = 3  # numbers of graphs that are measured within a budget
_ROUNDS = 2  # timed meta-gradients of a candidate, after one that warms up


class Cost(NamedTuple):
    """Seconds and peak bytes of one meta-gradient, beyond what was held before."""

    seconds: float
    memory: int | None
    """None on a backend that does not count memory."""


class Choice(NamedTuple):
    """An executor and the estimator to go with it, and the costs of all that was measured."""

    executor: Loop | Vmap
    estimator: Estimator
    costs: dict[str, Cost]

    @property
    def reason(self) -> str:
        """One line of figures."""
        figures = ", ".join(
            f"{candidate} {1000 * cost.seconds:.3g} ms and {_size(cost)}"
            for candidate, cost in sorted(self.costs.items(), key=lambda item: item[1].seconds)
        )
        return f"{_call(self.executor)}: {figures}"


@checked()
def choose_executor(
    learner: MetaLearner, tasks: Annotated[Tasks, UNCHECKED], *, memory: Memory | None = None
) -> Choice:
    """The fastest executor for meta-gradients of this learner on batches such as `tasks`.

    Candidates are `Loop`, and `Vmap` over all tasks and over chunks of an eighth, a quarter and a half
    of them; on a CPU also `Loop` with as many workers as torch has threads, and, if there are images,
    the faster of these two loops with images laid out channels last. Each computes the meta-gradient
    once to warm up and twice against the clock.

    `memory` is a budget for the peak beyond what is held anyway, in bytes or as "4GiB". A `Vmap` that
    would break it by the figures of smaller chunks is not tried. If some candidate breaks it, all are
    tried again with the estimator's `low_memory` form, if it has one (for `Unrolled` `Adjoint`, for that
    one with fewer copies), and with the form of that. An `Adjoint` that is chosen within a budget keeps
    the graphs of as many steps as there is room for. If none fits, the smallest is taken, with a
    warning. On a backend that does not count memory (mps) there is no budget to hold: a warning says
    so, and the fastest is taken.

    A candidate that cannot run the model, or runs out of memory, is left out, as is a `Vmap` under
    which it draws random numbers that are not those of `Loop`. `tasks` are a batch, every tensor
    `[tasks, examples, ...]`; tasks of unequal size, a list, go to loops.

    Law: the learner, its random states included, is as it was, and any choice gives its gradient.

    >>> import torch
    >>> import metablocks as mb
    >>> learner = mb.MetaLearner(
    ...     torch.nn.Linear(1, 1),
    ...     loss=torch.nn.functional.mse_loss,
    ...     steps=1,
    ...     rule=mb.LearningRate(0.1),
    ... )
    >>> x = torch.ones(4, 3, 1)
    >>> choice = mb.choose_executor(learner, mb.TaskBatch((x, x), (x, x)), memory="1GiB")
    >>> learner.executor, learner.estimator = choice.executor, choice.estimator

    Raises `BlockError` for a `memory` that is not a size, `ExecutorError` if there is no memory for one
    task at a time, and what the learner raises under `Loop`.
    """
    tasks = as_tasks(tasks)
    count = check_tasks(tasks, learner.batches, learner.steps)
    budget = None if memory is None else parse_bytes(memory)
    device = devices_of(dict(learner.named_parameters()))[-1]
    if budget and peak_memory(device) is None:
        warnings.warn(
            f"memory={memory!r} is not held: torch counts no memory on {device}. The fastest executor is "
            "taken; to limit memory there, name one: Loop(), or Vmap(chunk=2)",
            stacklevel=caller_stacklevel(),
        )
        budget = None
    costs: dict[_Candidate, Cost] = {}
    parts = sorted({count // 8, count // 4, count // 2} - {0, 1, count})
    chunks = [*parts, None] if isinstance(tasks, TaskBatch) else []

    def fits(candidate: _Candidate) -> bool:
        return not budget or (candidate in costs and (costs[candidate].memory or 0) <= budget)

    lack = ""  # of memory, as the last error states it

    def measure(candidate: _Candidate) -> bool:
        """Measure a candidate; False if it runs out of memory."""
        nonlocal lack
        try:
            costs[candidate] = _measure(candidate, device, learner, tasks)
            return True
        except (ExecutorError, RandomDrawsWarning) as error:
            log.info("%s is left out: %s", candidate, error)
            return True
        except Exception as error:
            if not out_of_memory(error):
                raise
            lack = first_line(error)
            log.info("%s is left out: %s", candidate, lack)
        release_memory(device)  # the error, and the tensors of its frames, are gone
        return False

    for estimator in _leaner(learner):
        loop = _Candidate(Loop(), estimator)
        if not measure(loop):
            continue
        per_task: float = costs[loop].memory or 0
        for chunk in chunks:
            if budget and per_task * (chunk or count) > budget:
                break
            candidate = _Candidate(Vmap(chunk=chunk), estimator)
            if not measure(candidate):
                break
            if candidate in costs:
                per_task = (costs[candidate].memory or 0) / (chunk or count)
        for setting in _settings(device, tasks, count):
            candidate = replace(loop, executor=replace(loop.executor, **setting))
            measure(candidate)
            if fits(candidate) and candidate in costs and costs[candidate] < costs[loop]:
                loop = candidate
        if all(fits(candidate) for candidate in costs if candidate.estimator == estimator):
            break
    if not costs:
        raise ExecutorError(
            f"{device} has no memory for one task at a time: {lack} Take fewer inner steps, smaller sets "
            "of examples, FirstOrder(), or Adjoint()"
        )

    best = min(filter(fits, costs), key=lambda c: costs[c].seconds, default=None)
    if best is not None and budget and isinstance(best.estimator, Adjoint):
        probe = max(1, learner.steps // 2)  # by one graph what the process holds does not tell
        half = best.keeping(probe)
        if measure(half) and half in costs:
            least, more = (costs[candidate].memory or 0 for candidate in (best, half))
            room = min(learner.steps, (budget - least) * probe // max(more - least, 1))
            for graphs in range(room, max(room - _TRIES, 0), -1):
                kept = best.keeping(graphs)
                if not measure(kept):
                    break
                if fits(kept):  # quicker by what it does not do again, whatever the clock says
                    best = kept
                    break
    if best is None:
        best = min(costs, key=lambda candidate: costs[candidate].memory or 0)
        warnings.warn(
            f"no executor keeps to memory={memory!r}; {best} takes the least, {_size(costs[best])}",
            stacklevel=caller_stacklevel(),
        )
    return Choice(best.executor, best.estimator, {str(c): cost for c, cost in costs.items()})


@checked()
@dataclass(frozen=True, kw_only=True)
class AutoExecutor:
    """An executor that a run is to choose by `choose_executor` before it trains, and state.

    - `memory`: the budget of a meta-gradient, beyond what is held anyway, such as 4GiB; None for any.
    - `compile`: trace ("trace") or compile (True) what is chosen (see `Compiler`); or what of these and
      neither is fastest ("auto").

    Until then it is a `Loop`.

    >>> AutoExecutor(memory="4GiB")
    AutoExecutor(memory='4GiB', compile=False)

    Raises `BlockError` for a `memory` that is not a size, and an invalid `compile`.
    """

    memory: Memory | None = None
    compile: Compile | Literal["auto"] = False

    def __call__(self, fn: Any, shared: Any, buffers: Tensors, tasks: Tasks) -> tuple[Any, Any]:
        return Loop()(fn, shared, buffers, tasks)

    def choose(self, learner: MetaLearner, tasks: Tasks) -> Choice:
        """The choice for this learner; candidates are measured uncompiled, and the best then compiled."""
        choice = choose_executor(learner, tasks, memory=self.memory)
        if self.compile != "auto":
            return choice._replace(executor=replace(choice.executor, compile=self.compile))
        device = devices_of(dict(learner.named_parameters()))[-1]
        settings: tuple[Compile, ...] = (False, "trace", True)
        ways = [_Candidate(replace(choice.executor, compile=c), choice.estimator) for c in settings]
        costs = {way: _measure(way, device, learner, tasks) for way in ways}
        best = min(costs, key=lambda way: costs[way].seconds)
        measured = choice.costs | {str(way): cost for way, cost in costs.items()}
        return Choice(best.executor, best.estimator, measured)


@dataclass(frozen=True)
class _Candidate:
    executor: Loop | Vmap
    estimator: Estimator

    def keeping(self, graphs: int) -> "_Candidate":
        """The same with an `Adjoint` that keeps the graphs of so many more steps."""
        assert isinstance(self.estimator, Adjoint)
        graphs += self.estimator.graphs
        return replace(self, estimator=replace(self.estimator, graphs=graphs))

    def __str__(self) -> str:
        return f"{_call(self.executor)} with {self.estimator}"


def _leaner(learner: MetaLearner) -> Iterator[Estimator]:
    """The learner's estimator, and those of the same gradient that take less and less memory."""
    estimator: Estimator | None = learner.estimator
    while estimator is not None:
        yield estimator
        estimator = estimator.low_memory(learner.steps)


def _size(cost: Cost) -> str:
    return "an unknown amount of memory" if cost.memory is None else format_bytes(cost.memory)


def _call(executor: Loop | Vmap) -> str:
    """The executor's call, settings at their defaults left out."""
    usual = type(executor)()
    names = [f.name for f in fields(executor)]
    set_ = [n for n in names if getattr(executor, n) != getattr(usual, n)]
    return f"{type(executor).__name__}({', '.join(f'{n}={getattr(executor, n)!r}' for n in set_)})"


def _settings(device: torch.device, tasks: Tasks, count: int) -> Iterator[dict[str, Any]]:
    """Settings that may make a loop faster, one after another."""
    workers = min(torch.get_num_threads(), count)
    if device.type != "cpu":
        return
    if workers > 1:
        yield {"workers": workers}
    leaves = pytree.tree_leaves(tasks[0].query[0])
    if any(x.ndim == 4 and x.is_floating_point() for x in leaves if isinstance(x, Tensor)):
        yield {"channels_last": "query"}
        yield {"channels_last": True}


def _measure(
    candidate: _Candidate, device: torch.device, learner: MetaLearner, tasks: Tasks
) -> Cost:
    trial = copy.copy(learner)  # the same parameters
    trial.executor, trial.estimator = candidate.executor, candidate.estimator
    forget_peak(device)
    held = peak_memory(device)
    times = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RandomDrawsWarning)
            trial.meta_gradient(tasks)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    peak = peak_memory(device)
    return Cost(min(times[1:]), None if peak is None or held is None else max(0, peak - held))
