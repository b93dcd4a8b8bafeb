"""Finished runs, read from their directories: what a comparison knows about each.

Reading takes the values of `recipe.yaml` as they stand; it builds no block and so runs no code of
the recipe's packages.
"""

import json
import shlex
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from metablocks.errors import RecipeError
from metablocks.recipe.load import read_text, shown
from metablocks.recipe.parse import parse, plain
from metablocks.runs.directory import RunDirectory


@dataclass(frozen=True)
class FinalScores:
    """Scores on the test tasks after the last inner step. Accuracy is a share, 0 to 1."""

    tasks: int
    measure: str
    """`accuracy` (higher is better) or `mse` (lower is better)."""
    inner_steps: int
    mean: float
    interval: float
    """Half the width of the 95 % confidence interval over tasks."""
    std: float
    worst_decile: float
    loss: float
    members: int = 1
    """How many checkpoints an ensemble has."""


@dataclass(frozen=True)
class Validated:
    """One validation: after how many meta-steps and seconds of training, and how well."""

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
    """In bytes, while it trained: of the process on a CPU, of its tensors on an accelerator."""
    memory_beyond_start: int | None
    """In bytes: by how much the peak lies above what was in use when training began."""
    train_loss: float
    """Mean of the last epoch."""
    curve: tuple[Validated, ...]
    test: FinalScores
    ensemble: FinalScores | None
    metrics: list[dict[str, Any]] = field(repr=False)
    times: list[dict[str, Any]] = field(repr=False)

    @property
    def seed(self) -> int:
        seed: int = self.values["seed"]
        return seed

    @property
    def recipe_hash(self) -> str:
        recipe: str = self.record["recipe"]
        return recipe


def is_run(path: Path) -> bool:
    """Whether a path is the directory of a run, finished or not."""
    return (path / "recipe.yaml").is_file() and (path / "run.json").is_file()


def read_values(path: Path) -> dict[str, Any]:
    """The values of a resolved recipe, without building anything."""
    values = plain(parse(read_text(path), shown(path), []))
    if not isinstance(values, dict):
        raise RecipeError(f"{shown(path)}: no recipe")
    return values


def read_run(path: Path) -> FinishedRun:
    """The numbers of a finished run.

    Raises `RecipeError` for one that was not tested yet, or lacks numbers that are compared.
    """
    directory = RunDirectory(path)
    metrics = directory.read_metrics()
    tests = [row for row in metrics if "test" in row]
    epochs = [row for row in metrics if "epoch" in row]
    if not tests or not epochs:
        raise RecipeError(
            f"{path}: this run is not finished; metablocks run --resume {shlex.quote(str(path))} goes "
            "on with it"
        )
    times = directory.read_times()
    try:
        training = list(accumulate(row["training_seconds"] for row in times))
        begun = [row["memory_at_start"] for row in times]
        peaks = [row["peak_memory"] for row in times]
        spent = {row["epoch"]: seconds for row, seconds in zip(times, training, strict=True)}
        return FinishedRun(
            path=path,
            values=read_values(directory.recipe),
            record=json.loads(directory.record.read_text()),
            steps=epochs[-1]["step"],
            training_seconds=training[-1],
            seconds=sum(row["seconds"] for row in times),
            peak_memory=max((peak for peak in peaks if peak is not None), default=None),
            memory_beyond_start=max(
                (
                    peak - start
                    for peak, start in zip(peaks, begun, strict=True)
                    if peak is not None and start is not None
                ),
                default=None,
            ),
            train_loss=epochs[-1]["train_loss"],
            curve=tuple(
                Validated(row["step"], spent[row["epoch"]], row["validation"]["mean"][-1])
                for row in epochs
                if "validation" in row
            ),
            test=_tested(tests[-1]["test"]),
            ensemble=_tested(tests[-1]["ensemble"]) if tests[-1].get("ensemble") else None,
            metrics=metrics,
            times=times,
        )
    except (KeyError, IndexError, OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: lacks numbers that are compared ({type(error).__name__}: {error}); "
            "an older or damaged run, to be trained again"
        ) from error


def _tested(row: dict[str, Any]) -> FinalScores:
    return FinalScores(
        tasks=row["tasks"],
        measure=row["measure"],
        inner_steps=row.get("inner_steps", len(row["mean"]) - 1),
        mean=row["mean"][-1],
        interval=row["interval"][-1],
        std=row["std"][-1],
        worst_decile=row["worst_decile"][-1],
        loss=row["loss"][-1],
        members=len(row.get("members", [1])),
    )
