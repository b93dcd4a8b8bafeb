"""The training loop: tasks in, meta-gradient, optimiser step; evaluate, record, checkpoint.

    for each meta-step t: tasks t·B … t·B + B − 1 → learner.backward → optimizer.step

One loop serves every recipe. It can stop after any meta-step and go on bit for bit.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from metablocks.errors import RunError
from metablocks.recipe import Experiment
from metablocks.run import checkpoint
from metablocks.run.directory import RunDirectory
from metablocks.run.scores import Scores, score
from metablocks.run.state import TrainingState
from metablocks.tasks.base import Split
from metablocks.types import Progress


class Stopped(Exception):  # noqa: N818  (no error: what was asked for)
    """Training was asked to stop, and has: the checkpoint holds every meta-step taken."""


def train(
    experiment: Experiment, directory: RunDirectory, state: TrainingState, *, quiet: bool = False
) -> TrainingState:
    """Train to the end of the recipe from `state`, which is brought up to date and returned.

    Raises `Stopped` after the first SIGINT or SIGTERM, with the checkpoint written, and `RunError`
    where the loss is no longer finite.
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
    started = time.perf_counter()
    with bar, _stop_signals() as asked_to_stop:
        while state.epochs < experiment.epochs:
            if asked_to_stop():
                checkpoint.save(directory.checkpoint("last"), experiment, state)
                raise Stopped
            if state.step < (state.epochs + 1) * experiment.steps_per_epoch:
                _meta_step(experiment, state)
                bar.update()
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
                continue
            scores = _finish_epoch(experiment, directory, state)
            seconds = round(time.perf_counter() - started, 3)
            directory.append(directory.times, {"epoch": state.epochs, "seconds": seconds})
            started = time.perf_counter()
            if scores and not quiet:
                bar.write(_line(experiment, state, scores), file=sys.stdout)
    return state


def final_scores(
    experiment: Experiment, split: Split, *, tasks: int | None = None, steps: int | None = None
) -> Scores:
    """Scores on the fixed tasks of a split, by the recipe's evaluation plan unless overridden."""
    plan = experiment.evaluation
    return score(
        experiment.learner,
        experiment.source,
        split,
        tasks=plan.tasks if tasks is None else tasks,
        steps=plan.inner_steps if steps is None else steps,
        batch=experiment.tasks_per_step,
        dtype=experiment.dtype,
    )


def _meta_step(experiment: Experiment, state: TrainingState) -> None:
    first = state.step * experiment.tasks_per_step
    indices = range(first, first + experiment.tasks_per_step)
    tasks = experiment.source.sample("train", indices).to(experiment.dtype)
    progress = Progress(epoch=state.step / experiment.steps_per_epoch)
    loss = float(experiment.learner.backward(tasks, progress=progress).loss)
    if not math.isfinite(loss):
        raise RunError(
            f"the training loss is {loss} at meta-step {state.step + 1} of epoch {state.epochs + 1}: "
            "training diverged. A lower inner.rule rate or outer.optimizer.lr usually helps"
        )
    experiment.optimizer.step()
    experiment.optimizer.zero_grad()
    state.losses.append(loss)
    state.step += 1


def _finish_epoch(
    experiment: Experiment, directory: RunDirectory, state: TrainingState
) -> Scores | None:
    """Evaluate when due, log, checkpoint. The checkpoint comes last: it makes the epoch count."""
    epoch = state.epochs + 1
    row = {
        "epoch": epoch,
        "step": state.step,
        "lr": [group["lr"] for group in experiment.optimizer.param_groups],
        "train_loss": sum(state.losses) / len(state.losses),
    }
    scores = None
    if epoch % experiment.evaluation.every == 0 or epoch == experiment.epochs:
        scores = final_scores(experiment, "validation")
        row["validation"] = scores.as_dict()
    if experiment.scheduler:
        experiment.scheduler.step()
    better = scores is not None and scores.better_than(state.best)
    if better:
        state.best, state.best_epoch = scores, epoch
    state.epochs, state.losses = epoch, []
    directory.append(directory.metrics, row)
    if better:
        checkpoint.save(directory.checkpoint("best"), experiment, state)
    checkpoint.save(directory.checkpoint("last"), experiment, state)
    return scores


def _line(experiment: Experiment, state: TrainingState, scores: Scores) -> str:
    steps = len(scores.mean) - 1
    best = " (best)" if state.best_epoch == state.epochs else ""
    return (
        f"epoch {state.epochs}/{experiment.epochs}  validation {scores.measure} "
        f"{scores.text(0)} → {scores.text(steps)} after {steps} steps{best}"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a wish to stop; the second acts as it always did."""
    wished = False
    previous: dict[int, Any] = {}

    def wish(number: int, frame: FrameType | None) -> None:
        nonlocal wished
        wished = True
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, wish)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield lambda: wished
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
