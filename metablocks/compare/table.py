"""The table of a comparison: rounded for people (Markdown, text), in full for machines (CSV).

A row is an entry, its numbers pooled over the seeds of its runs. Ratios and differences are to the
first row that has results; differences of scores are taken task by task where both rows have met the
same tasks (`gap`). A column without values is left out, except in the CSV, whose columns are
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
from metablocks.memory import format_bytes
from metablocks.runs.finished import FinishedRun, largest
from metablocks.runs.scores import (
    MEASURES,
    Measure,
    Scores,
    difference,
    number_text,
    pool_seeds,
    score_text,
)
from metablocks.runs.tables import aligned

Cells = list[list[str]]
"""A header, then one list of equal length for each row."""

EMPTY = "–"
# 200 meta-steps in chunks of another size moved a score by 3e-8 of it, and chaos adds up.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Row:
    """One row of the table. Without finished runs there is no score, and every number is None."""

    recipe: str
    title: str
    seeds: tuple[int, ...]
    failed: int
    """Number of failed runs."""
    inner_steps: int | None = None
    score: Scores | None = None
    by_seed: tuple[Scores, ...] = ()
    """The scores that `score` pools, in the order of `seeds`."""
    ensemble: Scores | None = None
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
        inner_steps=runs[0].inner_steps,
        score=pool_seeds([run.test for run in runs]),
        by_seed=tuple(run.test for run in runs),
        ensemble=pool_seeds(ensembles) if len(ensembles) == len(runs) else None,
        meta_steps=runs[0].steps,
        tasks_per_step=entry.values["outer"]["tasks_per_step"],
        seconds_per_step=sum(run.training_seconds for run in runs) / sum(run.steps for run in runs),
        seconds=fmean(run.seconds for run in runs),
        peak_memory=largest([run.peak_memory for run in runs]),
        memory_beyond_start=largest([run.memory_beyond_start for run in runs]),
        train_loss=fmean(run.train_loss for run in runs),
    )


@dataclass(frozen=True)
class Gap:
    """A difference of two rows' final scores, in the mean over tasks."""

    mean: float
    interval: float
    """Half the width of its 95 % confidence interval over tasks; nan if there is one task alone."""
    paired: bool
    """True if it is taken task by task."""
    rounding: float
    """A difference that small is one of rounding: a ten-thousandth of the score."""
    seed_std: float | None = None
    """Its standard deviation over seeds of training, if it is paired and there are several."""

    @property
    def limit(self) -> float:
        """Size that it takes to be clear; nan if there is one task alone."""
        return max(self.interval, self.rounding)

    @property
    def clear(self) -> bool:
        """True if 0 is not in its interval, and it is not one of rounding."""
        return abs(self.mean) > self.limit


def gap(row: Row, other: Row) -> Gap:
    """The score of `row` less that of `other`: task by task, or else by their means.

    Both have met the same tasks if the seeds are the same; with other seeds, and in runs that did not
    record the scores of their tasks, the interval is √(c₁² + c₂²), c being those of the two scores.
    """
    assert row.score is not None
    assert other.score is not None
    pairs = list(zip(row.by_seed, other.by_seed, strict=False))
    known = all(one.by_task is not None and two.by_task is not None for one, two in pairs)
    alike = row.seeds == other.seeds and all(one.tasks == two.tasks for one, two in pairs)
    rounding = _ROUNDING * abs(row.score.final)
    if not (pairs and known and alike):
        interval = math.hypot(row.score.interval[-1], other.score.interval[-1])
        return Gap(row.score.final - other.score.final, interval, False, rounding)
    pooled = pool_seeds([difference(one, two) for one, two in pairs])
    seed_std = pooled.seed_std[-1] if pooled.seed_std else None
    return Gap(pooled.final, pooled.interval[-1], True, rounding, seed_std)


def reference(rows: Sequence[Row]) -> Row:
    """The row that ratios and differences are to: the first that has results."""
    return next((row for row in rows if row.score), rows[0])


def measure_of(rows: Sequence[Row]) -> Measure:
    """`accuracy` or `mse`: one for all, since the tasks are."""
    return next((row.score.measure for row in rows if row.score), "accuracy")


def legend(rows: Sequence[Row]) -> str:
    """Meaning of the scores."""
    name, better = MEASURES[measure_of(rows)]
    several = any(len(row.seeds) > 1 for row in rows)
    first = reference(rows)
    others = [row for row in rows if row.score and row is not first]
    paired = any(gap(row, first).paired for row in others)
    return (
        f"test {name}: mean ± 95 % confidence interval over the tasks of all seeds; {better}"
        + "; beside the first: the difference, task by task" * paired
        + "; worst decile: the mean of the seeds' own" * several
    )


def gap_text(value: float, measure: Measure, sign: str = "") -> str:
    """A difference of two scores; `sign` is a format's, such as "+"."""
    return f"{100 * value:{sign}.2f} points" if measure == "accuracy" else number_text(value)


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


_COLUMNS: list[tuple[str, str, Callable[[Any, Measure], str]]] = [
    # heading, attribute of a row, text of its value by the measure
    ("recipe", "recipe", lambda value, _: str(value)),
    ("test", "score", lambda score, _: score.text(-1)),
    ("beside the first", "score", lambda score, _: score.text(-1)),
    ("std over tasks", "score.std", score_text),
    ("worst decile", "score.worst_decile", score_text),
    ("SD over seeds", "score.seed_std", score_text),
    ("ensemble", "ensemble", lambda e, _: f"{e.text(-1)} ({e.checkpoints} checkpoints)"),
    ("inner steps", "inner_steps", lambda value, _: f"{value:,}"),
    ("meta-steps", "meta_steps", lambda value, _: f"{value:,}"),
    ("time a step", "seconds_per_step", lambda value, _: seconds_text(value)),
    ("time in all", "seconds", lambda value, _: seconds_text(value)),
    ("peak memory", "peak_memory", lambda value, _: format_bytes(value)),
    ("beyond start", "memory_beyond_start", lambda value, _: format_bytes(value)),
    ("training loss", "train_loss", lambda value, _: number_text(value)),
    ("test loss", "score.loss", lambda value, _: number_text(value)),
    ("seeds", "seeds", lambda value, _: ", ".join(map(str, value)) or EMPTY),
    ("failed runs", "failed", lambda value, _: str(value or EMPTY)),
]
_WITH_RATIO = {"time a step", "time in all", "peak memory", "beyond start"}

_CSV = {
    "recipe": "recipe",
    "title": "title",
    "seeds": "seeds",
    "failed_runs": "failed",
    "measure": "score.measure",
    "inner_steps": "inner_steps",
    "tasks": "score.tasks",
    "mean": "score.mean",
    "interval_95": "score.interval",
    "difference": "mean",
    "difference_interval_95": "interval",
    "difference_paired": "paired",
    "difference_std_over_seeds": "seed_std",
    "std_over_tasks": "score.std",
    "worst_decile": "score.worst_decile",
    "std_over_seeds": "score.seed_std",
    "test_loss": "score.loss",
    "train_loss": "train_loss",
    "ensemble_mean": "ensemble.mean",
    "ensemble_interval_95": "ensemble.interval",
    "ensemble_members": "ensemble.checkpoints",
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
                cell = EMPTY if row is first else _beside(row, first, measure)
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
    first, file = reference(rows), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for row in rows:
        apart = gap(row, first) if row.score and row is not first else None
        values = {n: _value(apart if "difference" in n else row, a) for n, a in _CSV.items()}
        values["seeds"] = " ".join(map(str, row.seeds))
        if row is first:
            values["difference"] = 0.0
        for name in (name for name in _CSV if name.endswith("_ratio")):
            other = _value(first, _CSV[name])
            values[name] = values[name] / other if values[name] is not None and other else None
        writer.writerow(values.values())  # nothing for None
    return file.getvalue()


def markdown(table: Cells) -> str:
    """The table in Markdown, a line for each recipe.

    >>> print(markdown([["recipe", "time"], ["a|b", "3 s"]]))
    | recipe | time |
    |:-------|-----:|
    | a\\|b   |  3 s |
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    head, *body = aligned(escaped, between=" | ")
    first, *others = (max(map(len, column)) for column in zip(*escaped, strict=True))
    rule = "|".join([f":{'-' * (first + 1)}", *(f"{'-' * (width + 1)}:" for width in others)])
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in body)])


def text(table: Cells) -> str:
    """The table for a terminal: a line for each quantity, a column for each recipe.

    >>> print(text([["recipe", "time"], ["a", "3 s"]]))
    recipe    a
    time    3 s
    """
    return "\n".join(aligned([list(column) for column in zip(*table, strict=True)]))


def _value(row: Row | Gap | None, attribute: str) -> Any:
    """The attribute of a row, `score.mean` for the final one of its score; None if there is none."""
    value: Any = row
    for name in attribute.split("."):
        value = getattr(value, name, None)
    return value[-1] if isinstance(value, list) else value


def _beside(row: Row, first: Row, measure: Measure) -> str:
    """The difference to the first row, with its interval if it is paired; of errors the ratio, too."""
    apart = gap(row, first)
    text = gap_text(apart.mean, measure, sign="+")
    if apart.paired:
        half = "–" if math.isnan(apart.interval) else gap_text(apart.interval, measure)
        text = f"{text.removesuffix(' points')} ± {half}"
    if measure == "accuracy":
        return text
    assert row.score is not None
    assert first.score is not None
    ratio = f"{row.score.final / first.score.final:.2f}×" if first.score.final else EMPTY
    return f"{text} ({ratio})" if apart.paired else ratio
