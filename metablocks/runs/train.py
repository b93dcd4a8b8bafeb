"""The training loop: tasks in, meta-gradient, optimiser step; evaluate, record, checkpoint.

    for each meta-step t: tasks t·B … t·B + B − 1 → learner.backward → optimizer.step

One loop serves every recipe. It can stop after any meta-step and go on bit for bit.
"""

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from metablocks.errors import RunError
from metablocks.executors import Share, share_of
from metablocks.learner import MetaGradient
from metablocks.memory import forget_peak, peak_memory
from metablocks.meta_steps import meta_steps
from metablocks.processes import leads
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.learned import learned
from metablocks.runs.scores import Scores, score
from metablocks.runs.state import TrainingState
from metablocks.runs.tensorboard import Watch
from metablocks.tasks.base import Split
from metablocks.types import Progress, Tasks


class Stopped(Exception):  # noqa: N818  (no error: what was asked for)
    """Training was asked to stop, and has: the checkpoint holds every meta-step taken."""


def train(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    *,
    quiet: bool = False,
    save_every: float = 10.0,
    watch: Watch = lambda row: None,
) -> TrainingState:
    """Train to the end of the recipe from `state`, which is brought up to date and returned.

    A checkpoint is written after every epoch, and within an epoch after so many minutes. `watch` gets
    the lines that the logs get. With a distributed learner all processes call this: each takes its own
    tasks, all decide alike, and the first one writes.

    Raises `Stopped` after the first SIGINT, SIGTERM or SIGHUP, with the checkpoint written, and
    `RunError` if the loss or the meta-gradient is no longer finite, unless the recipe skips such
    meta-steps, and some of the epoch are finite.
    """
    tasks, share = experiment.tasks_per_step, share_of(experiment.learner.executor)
    total = experiment.epochs * experiment.steps_per_epoch * tasks
    bar = progress_bar(total, "task", initial=state.step * tasks, quiet=quiet or not leads())
    validated: dict[str, str] = {}
    meter = Meter(experiment.device, state.spent)
    logged = directory.epochs_logged
    lines = logging_redirect_tqdm([logging.getLogger("metablocks")])  # above the bar

    def save() -> float:
        state.spent = meter.spent()
        _save_last(experiment, directory, state)
        return time.monotonic()

    with bar, lines, _stop_signals(share) as signals:
        try:
            saved = time.monotonic()
            while state.epochs < experiment.epochs:
                signals.stop_if_wished()
                with meter.training():
                    for result in _epoch(experiment, state):
                        state.record(result)
                        bar.update(tasks)
                        loss = f"{float(result.loss):.3f}"
                        bar.set_postfix({"loss": loss, **validated}, refresh=False)
                        late = leads() and time.monotonic() - saved > 60 * save_every
                        if signals.stop_if_wished(late):
                            saved = save()
                if not state.losses:
                    raise RunError(
                        f"no meta-step of epoch {state.epochs + 1} was taken: all skipped"
                    )
                scores = _validate(experiment, state, signals)
                line = _finish_epoch(experiment, directory, state, scores, meter, logged, watch)
                saved = time.monotonic()
                if leads():
                    bar.write(line, file=sys.stdout)
                    sys.stdout.flush()
                if scores:
                    validated = {f"validation {scores.measure}": scores.text(-1)}
            signals.stop_if_wished()
        except Stopped:
            save()
            raise
    return state


def final_scores(
    experiment: Experiment,
    split: Split,
    *,
    tasks: int | None = None,
    steps: int | None = None,
    between: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores on the fixed tasks of a split, by the recipe's evaluation plan unless overridden.

    `between` is called before each batch of tasks.
    """
    plan = experiment.evaluation
    with experiment.precision():
        return score(
            experiment.learner,
            experiment.source,
            split,
            tasks=plan.tasks if tasks is None else tasks,
            steps=plan.inner_steps if steps is None else steps,
            batch=experiment.tasks_per_step,
            dtype=experiment.dtype,
            between=between,
        )


def training_tasks(experiment: Experiment, number: int) -> Tasks:
    """The tasks of meta-step `number`, counted from 0; in several processes this one's share of them."""
    first = number * experiment.tasks_per_step
    indices = range(first, first + experiment.tasks_per_step)
    own = share_of(experiment.learner.executor).part(indices)
    return experiment.source.sample("train", own).to(experiment.dtype) if own else []


def meta_step(experiment: Experiment, number: int, progress: Progress) -> MetaGradient:
    """Take meta-step `number`, counted from 0, alone.

    Returns the gradient that the optimiser was given. Raises `RunError` as `fit` does.
    """
    return next(_meta_steps(experiment, range(number, number + 1), progress))


def advance(experiment: Experiment, state: TrainingState, steps: int) -> None:
    """Train until so many meta-steps are taken, without validations, logs and checkpoints.

    Law: afterwards parameters, optimiser, schedule and random states are, bit for bit, those of `train`.
    """
    while state.step < steps:
        for result in _epoch(experiment, state, steps):
            state.record(result)
        if state.step == (state.epochs + 1) * experiment.steps_per_epoch:
            _end_epoch(experiment, state)


def _epoch(
    experiment: Experiment, state: TrainingState, steps: int | None = None
) -> Iterator[MetaGradient]:
    """Take the meta-steps that are left of the epoch in progress, `steps` in all at most."""
    end = (state.epochs + 1) * experiment.steps_per_epoch
    return _meta_steps(experiment, range(state.step, end if steps is None else min(end, steps)))


def _meta_steps(
    experiment: Experiment, numbers: range, progress: Progress | None = None
) -> Iterator[MetaGradient]:
    """Take the meta-steps of these numbers, each at its own progress unless given."""
    length = experiment.steps_per_epoch
    batches = ((training_tasks(experiment, n), progress or Progress(n / length)) for n in numbers)
    return meta_steps(
        experiment.learner,
        experiment.optimizer,
        batches,
        clip=experiment.clip,
        precision=experiment.precision,
        first=numbers.start,
        nonfinite=experiment.nonfinite,
        indexed=True,
    )


def _validate(
    experiment: Experiment, state: TrainingState, signals: "_StopSignals"
) -> Scores | None:
    """Scores on the validation tasks, or None if the epoch in progress is not to be validated."""
    epoch = state.epochs + 1
    if epoch % experiment.evaluation.every and epoch != experiment.epochs:
        return None
    with signals.anywhere():
        return final_scores(experiment, "validation", between=signals.stop_if_wished)


def _finish_epoch(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    scores: Scores | None,
    meter: "Meter",
    logged: int,
    watch: Watch,
) -> str:
    """Log and checkpoint the epoch in progress; returns a line about it.

    The last checkpoint makes the epoch count. The lines of both logs and all else that it needs are
    written before it, unless the epoch is among the `logged` of a finished run; what neither it nor
    the checkpoint before it needs is deleted after it. All that is the first process's to do.
    """
    epoch, before = state.epochs + 1, state.members
    row: dict[str, Any] = {
        "epoch": epoch,
        "step": state.step,
        "lr": [group["lr"] for group in experiment.optimizer.param_groups],
        "train_loss": sum(state.losses) / len(state.losses),
    }
    if state.skipped:
        row["skipped"] = state.skipped
    if state.metrics:
        row["metrics"] = {name: sum(each) / len(each) for name, each in state.metrics.items()}
    if scores is not None:
        row["validation"] = scores.as_dict()
    row |= learned(experiment.learner, state.epochs)
    if scores is not None:
        state.judge(epoch, scores, keep=experiment.evaluation.ensemble)
    state.kept = sorted({*before, *state.members})
    _end_epoch(experiment, state)
    if leads():
        if epoch > logged:
            directory.append(directory.metrics, row)
        if state.best_epoch == epoch:
            checkpoint.save(directory.checkpoint("best"), experiment, state)
        if experiment.evaluation.ensemble > 1 and epoch in state.members:
            checkpoint.save(directory.member(epoch), experiment, state)
    cost = {"epoch": epoch, **meter.lap()}
    if leads() and epoch > logged:
        directory.append(directory.times, cost)
        watch(row | cost)
    _save_last(experiment, directory, state)
    if leads():
        directory.keep_members(state.kept)
    return _line(experiment, state, row["train_loss"], scores, cost)


def _end_epoch(experiment: Experiment, state: TrainingState) -> None:
    """Count the epoch in progress, and take the schedule's step."""
    if experiment.scheduler:
        experiment.scheduler.step()
    state.epochs += 1
    state.losses, state.metrics, state.skipped, state.spent = [], {}, 0, {}


def _save_last(experiment: Experiment, directory: RunDirectory, state: TrainingState) -> None:
    last, previous = directory.checkpoint("last"), directory.checkpoint("previous")
    if leads():
        checkpoint.save(last, experiment, state, before=previous)


def _line(
    experiment: Experiment,
    state: TrainingState,
    loss: float,
    scores: Scores | None,
    cost: Mapping[str, Any],
) -> str:
    """Loss and scores of the epoch that has ended, its speed, and the time left at that speed."""
    parts = [f"epoch {state.epochs}/{experiment.epochs}", f"loss {loss:.4g}"]
    if scores is not None:
        steps = len(scores.mean) - 1
        finite = math.isfinite(scores.error)
        best = " (best)" if finite and state.best_epoch == state.epochs else ""
        parts.append(
            f"validation {scores.measure} {scores.text(0)} → {scores.text(steps)} "
            f"after {steps} steps{best}"
        )
    tasks = experiment.steps_per_epoch * experiment.tasks_per_step
    speed = tasks / max(cost["training_seconds"], 1e-3)
    left = tqdm.format_interval((experiment.epochs - state.epochs) * cost["seconds"])
    return "  ".join([*parts, f"{speed:,.0f} tasks/s, {left} left"])


class Meter:
    """Measure the seconds and memory of epochs, from the first meta-step of a process on.

    `spent` is what another process has spent on the first epoch, until it was stopped.

    >>> meter = Meter(torch.device("cpu"))
    >>> with meter.training():
    ...     pass  # meta-steps
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
        self._since: float | None = None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Time meta-steps."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._training += time.perf_counter() - self._since
            self._since = None

    def spent(self) -> dict[str, float]:
        """The seconds of the epoch in progress so far, as in `lap`."""
        now = time.perf_counter()
        training = self._training + (0.0 if self._since is None else now - self._since)
        seconds = now - self._started
        return {"seconds": round(seconds, 3), "training_seconds": round(training, 3)}

    def lap(self) -> dict[str, float | int | None]:
        """Cost of the epoch that ends here; the next one begins.

        `seconds`: on the clock, everything included. `training_seconds`: of those, what meta-steps
        took, with checkpoints between them, but without validation and logs. `peak_memory`,
        `memory_at_start`: bytes, by `peak_memory`, now and when the meter was made: reading the data
        does not count where the peak can be forgotten.
        """
        memory = {"peak_memory": peak_memory(self.device), "memory_at_start": self.memory_at_start}
        cost = {**self.spent(), **memory}
        self._started, self._training = time.perf_counter(), 0.0
        return cost


class _StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP becomes a wish to stop; the second acts as it always did.

    What one process wishes, all of the share do, at the same point.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self.wished = False
        self._anywhere = False
        self.previous: dict[int, Any] = {}

    def stop_if_wished(self, other: bool = False) -> bool:
        """Stop if any process wishes it; returns True if any process wishes the `other`."""
        wished, others = zip(*self.share.numbers(self.wished, other), strict=True)
        if any(wished):
            raise Stopped
        return any(others)

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Around pure work, which a process by itself may break off at any point."""
        self._anywhere = self.share.processes == 1
        try:
            self.stop_if_wished()
            yield
        finally:
            self._anywhere = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.wished = True
        signal.signal(number, self.previous.get(number, signal.SIG_DFL))
        if self._anywhere:
            raise Stopped


@contextmanager
def _stop_signals(share: Share) -> Iterator[_StopSignals]:
    signals = _StopSignals(share)
    with on_stop_signals(signals.handle) as signals.previous:
        yield signals


@contextmanager
def on_stop_signals(handle: Callable[[int, FrameType | None], object]) -> Iterator[dict[int, Any]]:
    """Handle SIGINT, SIGTERM and SIGHUP, in the main thread (elsewhere they are the caller's).

    An ignored SIGHUP (nohup) stays ignored. Yields the handlers before, which are put back afterwards.
    """
    previous: dict[int, Any] = {}
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # the terminal has gone
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                previous[number] = signal.signal(number, handle)
        yield previous
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)


def progress_bar(total: int, unit: str, *, initial: int = 0, quiet: bool = False) -> "tqdm[Any]":
    """A bar on stderr, with speed and time left; none where that is not a terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc="training",
        unit=unit,
        disable=quiet or not sys.stderr.isatty(),
        mininterval=0.2,
        dynamic_ncols=True,
    )
