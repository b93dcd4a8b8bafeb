"""The training loop: tasks in, meta-gradient, optimiser step; evaluate, record, checkpoint.

    for each meta-step t: tasks t·B … t·B + B − 1 → learner.backward → optimizer.step

One loop serves every recipe. It can stop after any meta-step and go on bit for bit.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from metablocks.fit import fit
from metablocks.learner import MetaGradient
from metablocks.memory import forget_peak, peak_memory
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.checkpoint import TrainingState
from metablocks.runs.directory import RunDirectory
from metablocks.runs.learned import learned
from metablocks.runs.scores import Scores, score
from metablocks.tasks.base import Split
from metablocks.types import Progress, Tasks


class Stopped(Exception):  # noqa: N818  (no error: what was asked for)
    """Training was asked to stop, and has: the checkpoint holds every meta-step taken."""


def train(
    experiment: Experiment, directory: RunDirectory, state: TrainingState, *, quiet: bool = False
) -> TrainingState:
    """Train to the end of the recipe from `state`, which is brought up to date and returned.

    Raises `Stopped` after the first SIGINT, SIGTERM or SIGHUP, with the checkpoint written, and
    `RunError` if the loss or the meta-gradient is no longer finite.
    """
    tasks = experiment.tasks_per_step
    total = experiment.epochs * experiment.steps_per_epoch * tasks
    bar = progress_bar(total, "task", initial=state.step * tasks, quiet=quiet)
    validated: dict[str, str] = {}
    meter = Meter(experiment.device, state.spent)
    lines = logging_redirect_tqdm([logging.getLogger("metablocks")])  # above the bar
    with bar, lines, _stop_signals() as signals:
        try:
            while state.epochs < experiment.epochs:
                signals.stop_if_wished()
                with meter.training():
                    for result in _epoch(experiment, state):
                        state.record(result)
                        bar.update(tasks)
                        loss = f"{state.losses[-1]:.3f}"
                        bar.set_postfix({"loss": loss, **validated}, refresh=False)
                        signals.stop_if_wished()
                scores = _validate(experiment, state, signals)
                line = _finish_epoch(experiment, directory, state, scores, meter)
                bar.write(line, file=sys.stdout)
                sys.stdout.flush()
                if scores:
                    validated = {f"validation {scores.measure}": scores.text(-1)}
        except Stopped:
            state.spent = meter.spent()
            checkpoint.save(directory.checkpoint("last"), experiment, state)
            raise
    return state


def final_scores(
    experiment: Experiment, split: Split, *, tasks: int | None = None, steps: int | None = None
) -> Scores:
    """Scores on the fixed tasks of a split, by the recipe's evaluation plan unless overridden."""
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
        )


def training_tasks(experiment: Experiment, number: int) -> Tasks:
    """The tasks of meta-step `number`, counted from 0."""
    first = number * experiment.tasks_per_step
    indices = range(first, first + experiment.tasks_per_step)
    return experiment.source.sample("train", indices).to(experiment.dtype)


def meta_step(experiment: Experiment, number: int, progress: Progress) -> MetaGradient:
    """Take meta-step `number`, counted from 0, alone.

    Returns the gradient that the optimiser was given. Raises `RunError` as `fit` does.
    """
    return next(_fit(experiment, [(training_tasks(experiment, number), progress)], number))


def _epoch(experiment: Experiment, state: TrainingState) -> Iterator[MetaGradient]:
    """Take the meta-steps that are left of the epoch in progress."""
    length = experiment.steps_per_epoch
    numbers = range(state.step, (state.epochs + 1) * length)
    batches = ((training_tasks(experiment, n), Progress(n / length)) for n in numbers)
    return _fit(experiment, batches, state.step)


def _fit(
    experiment: Experiment, batches: Iterable[tuple[Tasks, Progress]], first: int
) -> Iterator[MetaGradient]:
    optimizer, clip, precision = experiment.optimizer, experiment.clip, experiment.precision
    return fit(experiment.learner, optimizer, batches, clip=clip, precision=precision, first=first)


def _validate(
    experiment: Experiment, state: TrainingState, signals: "_StopSignals"
) -> Scores | None:
    """Scores on the validation tasks, or None if the epoch in progress is not to be validated."""
    epoch = state.epochs + 1
    if epoch % experiment.evaluation.every and epoch != experiment.epochs:
        return None
    with signals.anywhere():
        return final_scores(experiment, "validation")


def _finish_epoch(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    scores: Scores | None,
    meter: "Meter",
) -> str:
    """Log and checkpoint the epoch in progress; returns a line about it.

    The last checkpoint makes the epoch count. The lines of both logs and all else that it needs are
    written before it; what the checkpoint before it needs is deleted after it.
    """
    epoch = state.epochs + 1
    row: dict[str, Any] = {
        "epoch": epoch,
        "step": state.step,
        "lr": [group["lr"] for group in experiment.optimizer.param_groups],
        "train_loss": sum(state.losses) / len(state.losses),
    }
    if state.metrics:
        row["metrics"] = {name: sum(each) / len(each) for name, each in state.metrics.items()}
    if scores is not None:
        row["validation"] = scores.as_dict()
    row |= learned(experiment.learner, state.epochs)
    if experiment.scheduler:
        experiment.scheduler.step()
    if scores is not None:
        state.judge(epoch, scores, keep=experiment.evaluation.ensemble)
    state.epochs, state.losses, state.metrics, state.spent = epoch, [], {}, {}
    directory.append(directory.metrics, row)
    if state.best_epoch == epoch:
        checkpoint.save(directory.checkpoint("best"), experiment, state)
    if experiment.evaluation.ensemble > 1 and epoch in state.members:
        checkpoint.save(directory.member(epoch), experiment, state)
    cost = meter.lap()
    directory.append(directory.times, {"epoch": epoch, **cost})
    checkpoint.save(directory.checkpoint("last"), experiment, state)
    directory.keep_members(state.members)
    return _line(experiment, state, row["train_loss"], scores, cost)


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
        best = " (best)" if state.best_epoch == state.epochs else ""
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

    @contextmanager
    def training(self) -> Iterator[None]:
        """Time meta-steps."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._training += time.perf_counter() - started

    def spent(self) -> dict[str, float]:
        """The seconds of the epoch in progress so far, as in `lap`."""
        seconds = time.perf_counter() - self._started
        return {"seconds": round(seconds, 3), "training_seconds": round(self._training, 3)}

    def lap(self) -> dict[str, float | int | None]:
        """Cost of the epoch that ends here; the next one begins.

        `seconds`: on the clock, everything included. `training_seconds`: of those, what meta-steps
        took, without validation, logs and checkpoints. `peak_memory`, `memory_at_start`: bytes, by
        `peak_memory`, now and when the meter was made: reading the data does not count where the
        peak can be forgotten.
        """
        memory = {"peak_memory": peak_memory(self.device), "memory_at_start": self.memory_at_start}
        cost = {**self.spent(), **memory}
        self._started, self._training = time.perf_counter(), 0.0
        return cost


class _StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP becomes a wish to stop; the second acts as it always did."""

    def __init__(self) -> None:
        self.wished = False
        self._anywhere = False
        self.previous: dict[int, Any] = {}

    def stop_if_wished(self) -> None:
        if self.wished:
            raise Stopped

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Around pure work, which may be broken off at any point."""
        self._anywhere = True
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
def _stop_signals() -> Iterator[_StopSignals]:
    signals = _StopSignals()
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
