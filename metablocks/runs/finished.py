"""Finished runs, read from their directories.

Reading takes the values of `recipe.yaml` as they stand; it builds no block and so runs no code of
the recipe's packages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

from annotated_types import MinLen
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from metablocks.checks import Count
from metablocks.errors import RecipeError, command, first_line, one_line
from metablocks.recipe import schema
from metablocks.recipe.layout import SECTIONS
from metablocks.recipe.load import read_text, shown
from metablocks.recipe.parse import parse, plain
from metablocks.runs.directory import RunDirectory, wrong_place
from metablocks.runs.logs import read_rows
from metablocks.runs.scores import Scores

_Numbers = Annotated[list[float | None], MinLen(1)]


class _Judged(TypedDict):
    mean: _Numbers
    interval: _Numbers


class _Epoch(TypedDict):
    epoch: int
    step: Count
    train_loss: float | None
    validation: NotRequired[_Judged]


class _Cost(TypedDict):
    epoch: int
    seconds: float
    training_seconds: float
    peak_memory: int | None
    memory_at_start: int | None


class _Block(TypedDict):
    block: str


class _Inner(TypedDict):
    batches: _Block


class _Outer(TypedDict):
    epochs: Count
    steps_per_epoch: Count
    tasks_per_step: Count


class _Evaluation(TypedDict):
    tasks: Count
    every: Count


class _Values(TypedDict):
    name: str
    seed: int
    tasks: _Block
    inner: _Inner
    outer: _Outer
    evaluation: _Evaluation


_EPOCH, _COST, _VALUES = TypeAdapter(_Epoch), TypeAdapter(_Cost), TypeAdapter(_Values)
"""The parts of logs and recipe that are compared: the files may be anybody's."""


class Validation(NamedTuple):
    """One validation: meta-steps and seconds of training before it, its mean score and interval."""

    step: int
    seconds: float
    mean: float
    interval: float


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
    test: Scores
    ensemble: Scores | None
    metrics: list[dict[str, Any]] = field(repr=False)
    times: list[dict[str, Any]] = field(repr=False)

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def inner_steps(self) -> int:
        """Inner steps before the test."""
        return len(self.test.mean) - 1

    @property
    def checksum(self) -> str | None:
        """Of the data behind the tasks, if there is any."""
        checksum: str | None = self.record["data"].get("checksum")
        return checksum

    @property
    def circumstances(self) -> tuple[object, object]:
        """Device and data: what runs of one recipe may differ in besides the seed."""
        return self.record.get("device"), self.checksum


def is_run(path: Path) -> bool:
    """True for the directory of a run, finished or not."""
    return (path / "recipe.yaml").is_file() and (path / "run.json").is_file()


def read_run(path: Path) -> FinishedRun:
    """The numbers of a finished run.

    Raises `RecipeError` for a run that was not tested yet, or lacks numbers that are compared.
    """
    directory = RunDirectory(path)
    metrics = directory.read_metrics()
    tests = [row for row in metrics if "test" in row]
    if not directory.tested or not any("epoch" in row for row in metrics):
        raise RecipeError(
            f"{path}: this run is not finished; {command('run', '--resume', path)} goes on with it"
        )
    test, ensemble = tests[-1]["test"], tests[-1].get("ensemble")
    record = directory.read_record()
    epochs = [row for row in metrics if "epoch" in row]
    times = [row for row in read_rows(directory.times) if row is not None]
    try:
        values = _read_values(directory.recipe)
        for log, rows in ((_EPOCH, epochs), (_COST, times)):
            for row in rows:
                log.validate_python(row, strict=True)
        training = list(accumulate(row["training_seconds"] for row in times))
        spent = {row["epoch"]: seconds for row, seconds in zip(times, training, strict=True)}
        memory = [(row["peak_memory"], row["memory_at_start"]) for row in times]
        return FinishedRun(
            path=path,
            values=values,
            record=_printable(record),
            steps=epochs[-1]["step"],
            training_seconds=training[-1],
            seconds=sum(row["seconds"] for row in times),
            peak_memory=largest([peak for peak, _ in memory]),
            memory_beyond_start=largest(
                [None if None in (peak, start) else peak - start for peak, start in memory]
            ),
            train_loss=number(epochs[-1]["train_loss"]),
            validations=tuple(
                Validation(
                    row["step"],
                    spent[row["epoch"]],
                    *(number(row["validation"][name][-1]) for name in ("mean", "interval")),
                )
                for row in epochs
                if "validation" in row
            ),
            test=Scores.from_dict(test),
            ensemble=Scores.from_dict(ensemble) if ensemble else None,
            metrics=metrics,
            times=times,
        )
    except RecipeError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ValidationError):
            reason = wrong_place(error)
        raise RecipeError(
            f"{path}: lacks numbers that are compared ({reason}); "
            "an older or damaged run, to be trained again"
        ) from error


def largest(values: Sequence[int | None]) -> int | None:
    """The largest known value."""
    return max((value for value in values if value is not None), default=None)


def _printable(value: Any) -> Any:
    """A record without what garbles a terminal or a table: who wrote it may have put that there."""
    if isinstance(value, dict):
        return {one_line(key): _printable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return one_line(value) if isinstance(value, str) else value


def number(value: Any) -> float:
    """A number of a log, in which null stands for nan."""
    return math.nan if value is None else float(value)


def _read_values(path: Path) -> dict[str, Any]:
    """The values of a resolved recipe, without building anything.

    Fields that sections were given since are at their defaults. Raises `RecipeError` for a file that is
    no recipe, and `ValueError` for a field of another type.
    """
    values = plain(parse(read_text(path), shown(path), []))
    if not isinstance(values, dict):
        raise RecipeError(f"{shown(path)}: not a recipe")
    for name, section in SECTIONS.items():
        if isinstance(own := values.get(name), dict):
            fields = schema.fields(section).values()
            values[name] = {f.name: f.default for f in fields if not f.required} | own
    _VALUES.validate_python(values)
    return values
