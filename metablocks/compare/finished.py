"""Finished runs, read from their directories, and their test scores pooled over seeds.

Reading takes the values of `recipe.yaml` as they stand; it builds no block and so runs no code of
the recipe's packages.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from metablocks.errors import RecipeError
from metablocks.recipe.load import read_text, shown
from metablocks.recipe.parse import parse, plain
from metablocks.runs.directory import RunDirectory


@dataclass(frozen=True)
class Score:
    """Scores on test tasks after the last inner step, of one run or pooled over several.

    An accuracy is a share, 0 to 1.
    """

    tasks: int
    mean: float
    interval: float
    """Half the width of the 95 % confidence interval over tasks."""
    std: float
    worst_decile: float
    """Mean of the worst tenth of tasks; of several runs, the mean of theirs."""
    loss: float
    seed_std: float | None = None
    """Of the means of the seeds; None with one seed."""
    members: int = 1
    """Checkpoints of an ensemble."""


class Validation(NamedTuple):
    """One validation: meta-steps and seconds of training before it, and its mean score."""

    step: int
    seconds: float
    mean: float


@dataclass(frozen=True)
class FinishedRun:
    """A run that was trained and tested."""

    path: Path
    values: dict[str, Any] = field(repr=False)
    """The resolved recipe."""
    record: dict[str, Any] = field(repr=False)
    """`run.json`."""
    steps: int
    """Meta-steps."""
    training_seconds: float
    """In meta-steps alone."""
    seconds: float
    """Of training with its validations and checkpoints, without the test."""
    peak_memory: int | None
    """In bytes, during training: of the process on a CPU, of its tensors on an accelerator."""
    memory_beyond_start: int | None
    """In bytes: peak memory less the memory in use when training began."""
    train_loss: float
    """Mean of the last epoch."""
    validations: tuple[Validation, ...]
    measure: str
    """`accuracy` (higher is better) or `mse` (lower is better)."""
    inner_steps: int
    test: Score
    ensemble: Score | None
    metrics: list[dict[str, Any]] = field(repr=False)
    times: list[dict[str, Any]] = field(repr=False)

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def circumstances(self) -> tuple[object, object]:
        """Device and data: what runs of one recipe may differ in besides the seed."""
        return self.record.get("device"), self.record.get("data", {}).get("checksum")


def is_run(path: Path) -> bool:
    """True for the directory of a run, finished or not."""
    return (path / "recipe.yaml").is_file() and (path / "run.json").is_file()


def read_run(path: Path) -> FinishedRun:
    """The numbers of a finished run.

    Raises `RecipeError` for a run that was not tested yet, or lacks numbers that are compared.
    """
    directory = RunDirectory(path)
    metrics, times = directory.read_metrics(), directory.read_times()
    tests = [row for row in metrics if "test" in row]
    epochs = [row for row in metrics if "epoch" in row]
    if not tests or not epochs:
        raise RecipeError(
            f"{path}: this run is not finished; metablocks run --resume {shlex.quote(str(path))} goes "
            "on with it"
        )
    test, ensemble = tests[-1]["test"], tests[-1].get("ensemble")
    try:
        training = list(accumulate(row["training_seconds"] for row in times))
        spent = {row["epoch"]: seconds for row, seconds in zip(times, training, strict=True)}
        memory = [(row["peak_memory"], row["memory_at_start"]) for row in times]
        return FinishedRun(
            path=path,
            values=_read_values(directory.recipe),
            record=json.loads(directory.record.read_text()),
            steps=epochs[-1]["step"],
            training_seconds=training[-1],
            seconds=sum(row["seconds"] for row in times),
            peak_memory=largest([peak for peak, _ in memory]),
            memory_beyond_start=largest(
                [None if None in (peak, start) else peak - start for peak, start in memory]
            ),
            train_loss=epochs[-1]["train_loss"],
            validations=tuple(
                Validation(row["step"], spent[row["epoch"]], row["validation"]["mean"][-1])
                for row in epochs
                if "validation" in row
            ),
            measure=test["measure"],
            inner_steps=test.get("inner_steps", len(test["mean"]) - 1),
            test=_final_score(test),
            ensemble=_final_score(ensemble) if ensemble else None,
            metrics=metrics,
            times=times,
        )
    except (KeyError, IndexError, OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: lacks numbers that are compared ({type(error).__name__}: {error}); "
            "an older or damaged run, to be trained again"
        ) from error


def pool(scores: Sequence[Score]) -> Score:
    """Scores of several seeds, pooled over all tasks of all of them.

    With n_s tasks, mean m_s and spread s_s for seed s, and m the mean over all N = Σ n_s tasks,

        std² = Σ_s ((n_s − 1) s_s² + n_s (m_s − m)²) / (N − 1),    interval = 1.96 std / √N

    A worst decile and a loss are the means of the seeds' own. The interval is about tasks; how much
    the result depends on the seed of training is `seed_std`, the spread of the m_s.

    >>> pool([Score(2, 0.5, 0.0, 0.0, 0.5, 1.0), Score(2, 0.7, 0.0, 0.0, 0.7, 0.5)])
    Score(tasks=4, mean=0.6, interval=0.113..., std=0.115..., worst_decile=0.6, loss=0.75,
    seed_std=0.141..., members=1)
    """
    total = sum(score.tasks for score in scores)

    def mean(name: str) -> float:
        return float(sum(score.tasks * getattr(score, name) for score in scores)) / total

    middle = mean("mean")
    squares = sum((s.tasks - 1) * s.std**2 + s.tasks * (s.mean - middle) ** 2 for s in scores)
    std = math.sqrt(squares / (total - 1)) if total > 1 else 0.0
    return Score(
        tasks=total,
        mean=middle,
        interval=1.96 * std / math.sqrt(total),
        std=std,
        worst_decile=mean("worst_decile"),
        loss=mean("loss"),
        seed_std=stdev(score.mean for score in scores) if len(scores) > 1 else None,
        members=scores[0].members,
    )


def largest(values: Sequence[int | None]) -> int | None:
    """The largest known value."""
    return max((value for value in values if value is not None), default=None)


def _read_values(path: Path) -> dict[str, Any]:
    """The values of a resolved recipe, without building anything."""
    values = plain(parse(read_text(path), shown(path), []))
    if not isinstance(values, dict):
        raise RecipeError(f"{shown(path)}: not a recipe")
    return values


def _final_score(row: dict[str, Any]) -> Score:
    names = ("mean", "interval", "std", "worst_decile", "loss")
    last = {name: row[name][-1] for name in names}
    return Score(tasks=row["tasks"], members=len(row.get("members", [1])), **last)
