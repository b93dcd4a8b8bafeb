"""The training loop: tasks in, meta-gradient, optimiser step; evaluate, record, checkpoint.

    for each meta-step t: tasks t·B … t·B + B − 1 → learner.backward → optimizer.step

One loop serves every recipe. It can stop after any meta-step and go on bit for bit.
"""

import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from metablocks.errors import RunError
from metablocks.learner import MetaGradient
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import Scores, TaskScores, score_tasks, summarise
from metablocks.runs.state import TrainingState
from metablocks.runs.usage import Meter
from metablocks.tasks.base import Split
from metablocks.types import Progress, TaskBatch


class Stopped(Exception):  # noqa: N818  (no error: what was asked for)
    """Training was asked to stop, and has: the checkpoint holds every meta-step taken."""


def train(
    experiment: Experiment, directory: RunDirectory, state: TrainingState, *, quiet: bool = False
) -> TrainingState:
    """Train to the end of the recipe from `state`, which is brought up to date and returned.

    Raises `Stopped` after the first SIGINT or SIGTERM, with the checkpoint written, and `RunError`
    where the loss or the meta-gradient is no longer finite.
    """
    total = experiment.epochs * experiment.steps_per_epoch
    bar = tqdm(
        total=total,
        initial=state.step,
        desc="training",
        unit="step",
        disable=quiet,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )
    meter = Meter(experiment.device, state.spent)
    lines = logging_redirect_tqdm([logging.getLogger("metablocks")])  # above the bar
    with bar, lines, _stop_signals() as signals:
        try:
            while state.epochs < experiment.epochs:
                signals.stop_if_wished()
                if state.step < (state.epochs + 1) * experiment.steps_per_epoch:
                    with meter.training():
                        epoch = state.step / experiment.steps_per_epoch
                        state.record(meta_step(experiment, state.step, Progress(epoch)))
                    bar.update()
                    bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
                    continue
                scores = _validate(experiment, state, signals)
                _finish_epoch(experiment, directory, state, scores, meter)
                if scores and not quiet:
                    bar.write(_line(experiment, state, scores), file=sys.stdout)
        except Stopped:
            state.spent = meter.spent()
            checkpoint.save(directory.checkpoint("last"), experiment, state)
            raise
    return state


def final_scores(
    experiment: Experiment, split: Split, *, tasks: int | None = None, steps: int | None = None
) -> Scores:
    """Scores on the fixed tasks of a split, by the recipe's evaluation plan unless overridden."""
    return summarise(split, *final_task_scores(experiment, split, tasks=tasks, steps=steps))


def final_task_scores(
    experiment: Experiment, split: Split, *, tasks: int | None = None, steps: int | None = None
) -> TaskScores:
    """The same, task by task."""
    plan = experiment.evaluation
    with experiment.precision():
        return score_tasks(
            experiment.learner,
            experiment.source,
            split,
            tasks=plan.tasks if tasks is None else tasks,
            steps=plan.inner_steps if steps is None else steps,
            batch=experiment.tasks_per_step,
            dtype=experiment.dtype,
        )


def training_tasks(experiment: Experiment, number: int) -> TaskBatch:
    """The tasks of meta-step `number`, counted from 0."""
    first = number * experiment.tasks_per_step
    indices = range(first, first + experiment.tasks_per_step)
    return experiment.source.sample("train", indices).to(experiment.dtype)


def meta_step(experiment: Experiment, number: int, progress: Progress) -> MetaGradient:
    """Meta-step `number`, counted from 0: its tasks, their meta-gradient, a step of the optimiser.

    Returns what the optimiser was given. Raises `RunError`, before a parameter moves, where loss or
    meta-gradient is not finite; clipping does not mend that.
    """
    tasks = training_tasks(experiment, number)
    with experiment.precision():
        result = experiment.learner.backward(tasks, progress=progress)
    if result.trouble:
        raise RunError(
            f"the {result.trouble} at meta-step {number + 1}, in epoch "
            f"{math.floor(progress.epoch) + 1}: training diverged. A lower inner.rule rate or "
            "outer.optimizer.lr usually helps"
        )
    if experiment.clip:
        experiment.clip()
    experiment.optimizer.step()
    experiment.optimizer.zero_grad()
    return result


def _validate(
    experiment: Experiment, state: TrainingState, signals: "_StopSignals"
) -> Scores | None:
    """Scores on the validation tasks, where they are due after the epoch in progress."""
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
    meter: Meter,
) -> None:
    """Log and checkpoint. The last checkpoint makes the epoch count: what the one before it needs

    is deleted only then, and what it needs itself, the lines of both logs too, is written before.
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
    directory.append(directory.times, {"epoch": epoch, **meter.lap()})
    checkpoint.save(directory.checkpoint("last"), experiment, state)
    directory.keep_members(state.members)


def _line(experiment: Experiment, state: TrainingState, scores: Scores) -> str:
    steps = len(scores.mean) - 1
    best = " (best)" if state.best_epoch == state.epochs else ""
    return (
        f"epoch {state.epochs}/{experiment.epochs}  validation {scores.measure} "
        f"{scores.text(0)} → {scores.text(steps)} after {steps} steps{best}"
    )


class _StopSignals:
    """The first SIGINT or SIGTERM becomes a wish to stop; the second acts as it always did."""

    def __init__(self) -> None:
        self.wished = False
        self._anywhere = False
        self.previous: dict[signal.Signals, Any] = {}

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
        signal.signal(number, self.previous[signal.Signals(number)])
        if self._anywhere:
            raise Stopped


@contextmanager
def _stop_signals() -> Iterator[_StopSignals]:
    signals = _StopSignals()
    if threading.current_thread() is threading.main_thread():  # elsewhere they are the caller's
        for number in (signal.SIGINT, signal.SIGTERM):
            signals.previous[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for which, handler in signals.previous.items():
            signal.signal(which, handler)
