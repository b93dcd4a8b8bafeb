"""What becomes of a recipe: it runs, its gradient is right, or it is refused by name and place.

Anything else is a finding: another exception, at any point; numbers that are not finite; a refusal
without a place; a run that does not go on as it began; minutes of silence.
"""

import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

from metablocks.errors import RecipeError
from metablocks.executors import RandomDrawsWarning
from metablocks.gradcheck import check_gradients
from metablocks.recipe import Experiment, Recipe, build, from_text
from metablocks.recipe.listing import summary
from metablocks.runs.deployment import deployment
from metablocks.runs.train import final_scores, meta_step
from metablocks.types import Progress
from tools.fuzzing.resume_law import goes_on_bit_for_bit

SECONDS = 20
"""Of computing. A process that only waits gets ten times it, not counting while it is stopped."""

SOURCE = "fuzz.yaml"
PLACE = re.compile(rf"{re.escape(SOURCE)}:\d+:\d+( [\w.\[\]\"*!-]+)?: ")


class Finding(AssertionError):  # noqa: N818  (no error of the fuzz: what it looks for)
    """What a recipe should not have led to."""


class _TooLong(BaseException):
    """No `except Exception` on its way takes it for an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """`refused` is why; None where the recipe ran."""

    recipe: Recipe | None
    refused: str | None = None


def attempt(text: str, data: Path | None = None) -> Outcome:
    """Read the recipe, build it, take its first meta-steps, evaluate. Raises what should not be."""
    try:
        with _limits():
            return _attempt(text, data)
    except _TooLong:
        raise Finding(f"no end after {SECONDS} seconds") from None


def _attempt(text: str, data: Path | None) -> Outcome:
    try:
        recipe = from_text(text, SOURCE)
        experiment = build(recipe, data=data)
    except RecipeError as error:
        check_places(str(error))
        return Outcome(None, str(error))
    _check_text(recipe)
    _train(experiment)
    _evaluate(experiment)
    if int(recipe.hash, 16) % 4 == 0:  # a quarter of the recipes, the same ones every time
        goes_on_bit_for_bit(lambda: build(recipe, data=data))
    _check_gradients(recipe)
    return Outcome(recipe)


def check_places(message: str) -> None:
    """Raise `Finding` where a line of a refusal does not begin with file, line and column."""
    for line in message.splitlines() or [""]:
        if not PLACE.match(line):
            raise Finding(f"a refusal without a place: {line!r} in\n{message}")


def _check_text(recipe: Recipe) -> None:
    if from_text(recipe.to_yaml(), allow=recipe.allow).hash != recipe.hash:
        raise Finding(f"written out and read again, it is another recipe:\n{recipe.to_yaml()}")


def _train(experiment: Experiment) -> None:
    """Two meta-steps by the loop that `metablocks run` has, with an epoch's end after each."""
    torch.manual_seed(experiment.recipe.at("seed"))
    for number in range(2):
        result = meta_step(experiment, number, Progress(number / experiment.steps_per_epoch))
        _finite("training loss", result.loss)
        for name, grad in result.grads.items():
            _finite(f"meta-gradient of {name}", grad)
        if experiment.scheduler:
            experiment.scheduler.step()
        for name, tensor in experiment.learner.state_dict().items():
            _finite(f"{name} after meta-step {number + 1}", tensor)


def _evaluate(experiment: Experiment) -> None:
    summary(experiment)
    scores = final_scores(experiment, "validation", tasks=2)
    _finite("validation losses", torch.tensor(scores.loss))
    left = deployment(experiment, scores)
    if left and left.left_out:
        raise Finding(f"deployment left out {left.left_out}")
    task = experiment.source.sample("test", [0]).to(experiment.dtype)[0]
    adapted = experiment.learner.adapt(task.support)
    inputs = experiment.learner.batches.query(task.query, 0)[0]
    with torch.no_grad():
        _finite("an adapted model's prediction", adapted(inputs))


def _check_gradients(recipe: Recipe) -> None:
    report = check_gradients(recipe)
    if not report.ok:
        raise Finding(f"the gradient check says:\n{report.text()}")


def _finite(what: str, tensor: Any) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise Finding(f"{what} is not finite: {tensor}")


@contextmanager
def _limits() -> Iterator[None]:
    """Not too long, no compiler, and warnings are findings but for those that only tell."""

    ticks = 0

    def late(number: int, frame: FrameType | None) -> None:
        nonlocal ticks
        ticks += 1  # of a stopped process they run together into one
        if number == signal.SIGPROF or ticks == 10:
            raise _TooLong

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    previous = {which: signal.signal(which, late) for which in clocks}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        # Graphs are traced as ever and checked against the plain result; compiling takes longer.
        fused = patch(
            "metablocks.executors.graphs.fused", lambda graph, _: lambda leaves: graph(*leaves)
        )
        with fused, warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", RandomDrawsWarning)
            for told in ("no executor keeps to memory=", "not .*, but .*: it draws random numbers"):
                warnings.filterwarnings("ignore", told)
            yield
    finally:
        for which, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(which, previous[which])
