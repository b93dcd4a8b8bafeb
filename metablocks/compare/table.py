"""The table of a comparison: for people (Markdown, text) rounded, for machines (CSV) in full.

Ratios and differences are to the first row that has results. A column that has nothing to tell is
left out, but for the CSV, whose columns are always the same.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence

from metablocks.compare.summary import Row, Score, ratio

Cells = list[list[str]]
"""A header, then one list of equal length for each row."""

NONE = "–"
NAMES = {"accuracy": "accuracy", "mse": "MSE"}


def cells(rows: Sequence[Row]) -> Cells:
    """The table that people read."""
    measure = measure_of(rows)
    first = reference(rows)
    columns = [
        [heading, *(_cell(tell, row, first) for row in rows)] for heading, tell in _columns(measure)
    ]
    told = [column for column in columns if any(cell != NONE for cell in column[1:])]
    for index, row in enumerate(rows):
        if row.score is None:
            told[1][index + 1] = "failed"
    return [list(row) for row in zip(*told, strict=True)]


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
    """The table for a terminal: a line for each recipe, or where that is too wide for each quantity.

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


def as_csv(rows: Sequence[Row]) -> str:
    """Every number in full: seconds, bytes, shares (an accuracy of 1 is 100 %)."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([name for name, _ in _CSV])
    for row in rows:
        values = [tell(row, reference(rows)) for _, tell in _CSV]
        writer.writerow("" if value is None else value for value in values)
    return file.getvalue()


def reference(rows: Sequence[Row]) -> Row:
    """The row that ratios and differences are to: the first, or if it failed, the first that did not."""
    return next((row for row in rows if row.score), rows[0])


def measure_of(rows: Sequence[Row]) -> str:
    """`accuracy` or `mse`: one for all, since the tasks are."""
    return next((row.measure for row in rows if row.measure), "accuracy")


def score_text(score: Score, measure: str) -> str:
    """A mean with its interval.

    >>> score_text(Score(600, 0.951, 0.004, 0.05, 0.8, 0.2, None), "accuracy")
    '95.10 ± 0.40 %'
    """
    if measure == "accuracy":
        return f"{100 * score.mean:.2f} ± {100 * score.interval:.2f} %"
    return f"{_number(score.mean)} ± {_number(score.interval)}"


def share_text(value: float, measure: str) -> str:
    """A score, or a spread of scores, without an interval."""
    return f"{100 * value:.2f} %" if measure == "accuracy" else _number(value)


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


def memory_text(value: int) -> str:
    """Bytes as people read them.

    >>> memory_text(644 * 2**20), memory_text(3 * 2**30)
    ('644 MiB', '3.00 GiB')
    """
    mebibytes = value / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f} GiB"


def difference(row: Row, first: Row) -> float | None:
    """By how much the mean score lies above the first row's."""
    return row.score.mean - first.score.mean if row.score and first.score else None


_Teller = Callable[[Row, Row], str | None]


def _columns(measure: str) -> list[tuple[str, _Teller]]:
    """Headings, and what stands below them for a row beside the first."""
    accuracy = measure == "accuracy"

    def score(tell: Callable[[Score], float | None]) -> _Teller:
        def teller(row: Row, first: Row) -> str | None:
            value = tell(row.score) if row.score else None
            return None if value is None else share_text(value, measure)

        return teller

    def beside(row: Row, first: Row) -> str | None:
        change = difference(row, first)
        if change is None or row is first or not first.score or not row.score:
            return None
        if accuracy:
            return f"{100 * change:+.2f} points"
        return _times(ratio(row.score.mean, first.score.mean))

    def compared(tell: Callable[[Row], float | None], say: Callable[[float], str]) -> _Teller:
        def teller(row: Row, first: Row) -> str | None:
            value = tell(row)
            if value is None:
                return None
            times = ratio(value, tell(first))
            return say(value) + (f" ({_times(times)})" if times is not None else "")

        return teller

    def ensemble(row: Row, first: Row) -> str | None:
        if row.ensemble is None:
            return None
        return f"{score_text(row.ensemble, measure)} ({row.ensemble.members} checkpoints)"

    def memory(value: float) -> str:
        return memory_text(round(value))

    return [
        ("recipe", lambda row, _: row.recipe),
        (
            f"test {NAMES[measure]}",
            lambda row, _: score_text(row.score, measure) if row.score else None,
        ),
        ("beside the first", beside),
        ("std over tasks", score(lambda s: s.std)),
        ("worst decile", score(lambda s: s.worst_decile)),
        ("SD over seeds", score(lambda s: s.seed_std)),
        ("ensemble", ensemble),
        ("inner steps", lambda row, _: _count(row.inner_steps)),
        ("meta-steps", lambda row, _: _count(row.meta_steps)),
        ("time a step", compared(lambda row: row.seconds_per_step, seconds_text)),
        ("time in all", compared(lambda row: row.seconds, seconds_text)),
        ("peak memory", compared(lambda row: row.peak_memory, memory)),
        ("beyond start", compared(lambda row: row.memory_beyond_start, memory)),
        (
            "training loss",
            lambda row, _: None if row.train_loss is None else _number(row.train_loss),
        ),
        (
            "test loss",
            lambda row, _: _number(row.score.loss) if row.score and accuracy else None,
        ),
        ("seeds", lambda row, _: ", ".join(map(str, row.seeds)) or None),
        ("failed runs", lambda row, _: str(row.failed) if row.failed else None),
    ]


_CSV: list[tuple[str, Callable[[Row, Row], object]]] = [
    ("recipe", lambda row, _: row.recipe),
    ("title", lambda row, _: row.title),
    ("seeds", lambda row, _: " ".join(map(str, row.seeds))),
    ("failed_runs", lambda row, _: row.failed),
    ("measure", lambda row, _: row.measure),
    ("inner_steps", lambda row, _: row.inner_steps),
    ("tasks", lambda row, _: row.score and row.score.tasks),
    ("mean", lambda row, _: row.score and row.score.mean),
    ("interval_95", lambda row, _: row.score and row.score.interval),
    ("difference", difference),
    ("std_over_tasks", lambda row, _: row.score and row.score.std),
    ("worst_decile", lambda row, _: row.score and row.score.worst_decile),
    ("std_over_seeds", lambda row, _: row.score and row.score.seed_std),
    ("test_loss", lambda row, _: row.score and row.score.loss),
    ("train_loss", lambda row, _: row.train_loss),
    ("ensemble_mean", lambda row, _: row.ensemble and row.ensemble.mean),
    ("ensemble_interval_95", lambda row, _: row.ensemble and row.ensemble.interval),
    ("ensemble_members", lambda row, _: row.ensemble and row.ensemble.members),
    ("meta_steps", lambda row, _: row.meta_steps),
    ("tasks_per_step", lambda row, _: row.tasks_per_step),
    ("seconds_per_step", lambda row, _: row.seconds_per_step),
    ("seconds_per_step_ratio", lambda r, first: ratio(r.seconds_per_step, first.seconds_per_step)),
    ("seconds", lambda row, _: row.seconds),
    ("peak_memory_bytes", lambda row, _: row.peak_memory),
    ("peak_memory_ratio", lambda row, first: ratio(row.peak_memory, first.peak_memory)),
    ("memory_beyond_start_bytes", lambda row, _: row.memory_beyond_start),
]


def _cell(tell: _Teller, row: Row, first: Row) -> str:
    return tell(row, first) or NONE


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isnan(value) or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}×"


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


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
