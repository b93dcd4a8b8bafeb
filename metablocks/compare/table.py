"""The table of a comparison: rounded for people (Markdown, text), in full for machines (CSV).

A row is an entry, its numbers pooled over the seeds of its runs. Ratios and differences are to the
first row that has results. A column without values is left out, except in the CSV, whose columns are
always the same.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from metablocks.compare.entries import Entry
from metablocks.compare.finished import FinishedRun, Score, largest, pool
from metablocks.memory import format_bytes

Cells = list[list[str]]
"""A header, then one list of equal length for each row."""

EMPTY = "–"
MEASURES = {"accuracy": ("accuracy", "higher is better"), "mse": ("MSE", "lower is better")}


@dataclass(frozen=True)
class Row:
    """One row of the table. Without finished runs there is no score, and every number is None."""

    recipe: str
    title: str
    seeds: tuple[int, ...]
    failed: int
    """Number of failed runs."""
    measure: str | None = None
    inner_steps: int | None = None
    score: Score | None = None
    ensemble: Score | None = None
    meta_steps: int | None = None
    tasks_per_step: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    """Of training with its validations, the mean over seeds."""
    peak_memory: int | None = None
    memory_beyond_start: int | None = None
    train_loss: float | None = None


def summarise(entry: Entry, runs: Sequence[FinishedRun], failed: int = 0) -> Row:
    """The row of an entry."""
    title = str(entry.values["name"])
    if not runs:
        return Row(entry.label, title, (), failed)
    ensembles = [run.ensemble for run in runs if run.ensemble]
    return Row(
        recipe=entry.label,
        title=title,
        seeds=tuple(run.seed for run in runs),
        failed=failed,
        measure=runs[0].measure,
        inner_steps=runs[0].inner_steps,
        score=pool([run.test for run in runs]),
        ensemble=pool(ensembles) if len(ensembles) == len(runs) else None,
        meta_steps=runs[0].steps,
        tasks_per_step=entry.values["outer"]["tasks_per_step"],
        seconds_per_step=sum(run.training_seconds for run in runs) / sum(run.steps for run in runs),
        seconds=fmean(run.seconds for run in runs),
        peak_memory=largest([run.peak_memory for run in runs]),
        memory_beyond_start=largest([run.memory_beyond_start for run in runs]),
        train_loss=fmean(run.train_loss for run in runs),
    )


def reference(rows: Sequence[Row]) -> Row:
    """The row that ratios and differences are to: the first that has results."""
    return next((row for row in rows if row.score), rows[0])


def measure_of(rows: Sequence[Row]) -> str:
    """`accuracy` or `mse`: one for all, since the tasks are."""
    return next((row.measure for row in rows if row.measure), "accuracy")


def score_text(score: Score, measure: str) -> str:
    """A mean with its interval.

    >>> score_text(Score(600, 0.951, 0.004, 0.05, 0.8, 0.2), "accuracy")
    '95.10 ± 0.40 %'
    """
    if measure == "accuracy":
        return f"{100 * score.mean:.2f} ± {100 * score.interval:.2f} %"
    return f"{_number(score.mean)} ± {_number(score.interval)}"


def share_text(value: float, measure: str) -> str:
    """A score, or a spread of scores, without an interval."""
    return f"{100 * value:.2f} %" if measure == "accuracy" else _number(value)


def gap_text(value: float, measure: str, sign: str = "") -> str:
    """A difference of two scores; `sign` is a format's, such as "+"."""
    return f"{100 * value:{sign}.2f} points" if measure == "accuracy" else _number(value)


def seconds_text(value: float) -> str:
    """Seconds as people read them.

    >>> seconds_text(0.0123), seconds_text(41.23), seconds_text(754)
    ('12.3 ms', '41.2 s', '12 min 34 s')
    """
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"


def _number(value: float, measure: str = "") -> str:
    return f"{value:.4f}" if math.isnan(value) or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


_COLUMNS: list[tuple[str, str, Callable[[Any, str], str]]] = [
    # heading, attribute of a row, text of its value by the measure
    ("recipe", "recipe", lambda value, _: str(value)),
    ("test", "score", score_text),
    ("beside the first", "score.mean", share_text),
    ("std over tasks", "score.std", share_text),
    ("worst decile", "score.worst_decile", share_text),
    ("SD over seeds", "score.seed_std", share_text),
    (
        "ensemble",
        "ensemble",
        lambda e, measure: f"{score_text(e, measure)} ({e.members} checkpoints)",
    ),
    ("inner steps", "inner_steps", lambda value, _: f"{value:,}"),
    ("meta-steps", "meta_steps", lambda value, _: f"{value:,}"),
    ("time a step", "seconds_per_step", lambda value, _: seconds_text(value)),
    ("time in all", "seconds", lambda value, _: seconds_text(value)),
    ("peak memory", "peak_memory", lambda value, _: format_bytes(value)),
    ("beyond start", "memory_beyond_start", lambda value, _: format_bytes(value)),
    ("training loss", "train_loss", _number),
    ("test loss", "score.loss", _number),
    ("seeds", "seeds", lambda value, _: ", ".join(map(str, value)) or EMPTY),
    ("failed runs", "failed", lambda value, _: str(value or EMPTY)),
]
_WITH_RATIO = {"time a step", "time in all", "peak memory", "beyond start"}

_CSV = {
    "recipe": "recipe",
    "title": "title",
    "seeds": "seeds",
    "failed_runs": "failed",
    "measure": "measure",
    "inner_steps": "inner_steps",
    "tasks": "score.tasks",
    "mean": "score.mean",
    "interval_95": "score.interval",
    "difference": "score.mean",
    "std_over_tasks": "score.std",
    "worst_decile": "score.worst_decile",
    "std_over_seeds": "score.seed_std",
    "test_loss": "score.loss",
    "train_loss": "train_loss",
    "ensemble_mean": "ensemble.mean",
    "ensemble_interval_95": "ensemble.interval",
    "ensemble_members": "ensemble.members",
    "meta_steps": "meta_steps",
    "tasks_per_step": "tasks_per_step",
    "seconds_per_step": "seconds_per_step",
    "seconds_per_step_ratio": "seconds_per_step",
    "seconds": "seconds",
    "peak_memory_bytes": "peak_memory",
    "peak_memory_ratio": "peak_memory",
    "memory_beyond_start_bytes": "memory_beyond_start",
}
"""Columns of the CSV, and the attributes of a row that they are made of."""


def cells(rows: Sequence[Row]) -> Cells:
    """The table that people read."""
    measure, first = measure_of(rows), reference(rows)
    columns = [[heading] for heading, _, _ in _COLUMNS]
    for row in rows:
        for column, (heading, attribute, text) in zip(columns, _COLUMNS, strict=True):
            value, other = _value(row, attribute), _value(first, attribute)
            cell = EMPTY if value is None else text(value, measure)
            if heading == "beside the first" and value is not None:
                cell = EMPTY if row is first else _beside(value, other, measure)
            elif heading in _WITH_RATIO and value is not None and other:
                cell += f" ({value / other:.2f}×)"
            elif attribute == "score" and value is None:
                cell = "failed"
            column.append(cell)
    columns[1][0] = f"test {MEASURES[measure][0]}"
    columns = [
        column
        for column in columns
        if any(cell != EMPTY for cell in column[1:])
        and (column[0] != "test loss" or measure == "accuracy")  # an MSE is the loss
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def as_csv(rows: Sequence[Row]) -> str:
    """Every number in full: seconds, bytes, shares (an accuracy of 1 is 100 %)."""
    first = reference(rows)

    def full(row: Row, name: str, attribute: str) -> object:
        value, other = _value(row, attribute), _value(first, attribute)
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        if value is None:
            return ""
        if name == "difference":
            return value - other
        if name.endswith("_ratio"):
            return value / other if other else ""
        return value

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    writer.writerows([full(row, *column) for column in _CSV.items()] for row in rows)
    return file.getvalue()


def markdown(table: Cells) -> str:
    """The table in Markdown, a line for each recipe.

    >>> print(markdown([["recipe", "time"], ["a|b", "3 s"]]))
    | recipe | time |
    |:-------|-----:|
    | a\\|b   |  3 s |
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = _widths(escaped)
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines = [f"| {' | '.join(_aligned(row, widths))} |" for row in escaped]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def text(table: Cells, width: int) -> str:
    """The table for a terminal: a line for each recipe, or if that is too wide, for each quantity.

    >>> print(text([["recipe", "time"], ["a", "3 s"]], 80))
    recipe  time
    a        3 s
    >>> print(text([["recipe", "time"], ["a", "3 s"]], 10))
    recipe    a
    time    3 s
    """
    upright = _plain(table)
    if max(map(len, upright)) <= width:
        return "\n".join(upright)
    turned = [list(column) for column in zip(*table, strict=True)]
    blocks: list[str] = []
    while len(turned[0]) > 1:
        count = 2
        while count < len(turned[0]) and _fits([row[: count + 1] for row in turned], width):
            count += 1
        blocks.append("\n".join(_plain([row[:count] for row in turned])))
        turned = [[row[0], *row[count:]] for row in turned]
    return "\n\n".join(blocks)


def _value(row: Row, attribute: str) -> Any:
    """The attribute of a row, `score.mean` for that of its score; None if there is none."""
    value: Any = row
    for name in attribute.split("."):
        value = getattr(value, name, None)
    return value


def _beside(value: float, first: float, measure: str) -> str:
    if measure == "accuracy":
        return gap_text(value - first, measure, sign="+")
    return f"{value / first:.2f}×" if first else EMPTY


def _widths(table: Cells) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = list(zip(row, widths, strict=True))
    return [f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(pairs)]


def _plain(table: Cells) -> list[str]:
    widths = _widths(table)
    return ["  ".join(_aligned(row, widths)).rstrip() for row in table]


def _fits(table: Cells, width: int) -> bool:
    return max(map(len, _plain(table))) <= width
