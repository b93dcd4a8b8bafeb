"""Output of a comparison: `table.md`, `table.csv`, `comparison.json`, and the same on the terminal."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic_core import to_json

from metablocks.compare import table
from metablocks.compare.jobs import Job
from metablocks.compare.recommend import Advice
from metablocks.compare.request import Request
from metablocks.runs.directory import write_text
from metablocks.runs.finished import FinishedRun
from metablocks.runs.scores import plain

_WIDEST = 100  # characters of a line of text


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison."""

    rows: Sequence[table.Row]
    runs: Mapping[str, Sequence[FinishedRun]]
    """By the label of the row, as are the failures."""
    failures: Mapping[str, Sequence[Job]]
    advice: Advice | None
    notes: Sequence[str]
    facts: Sequence[str]
    """The machine and the command."""
    request: Request

    @property
    def legend(self) -> str:
        """Meaning of the scores."""
        name, better = table.MEASURES[table.measure_of(self.rows)]
        several = any(len(row.seeds) > 1 for row in self.rows)
        first = table.reference(self.rows)
        others = [row for row in self.rows if row.score and row is not first]
        paired = any(table.gap(row, first).paired for row in others)
        return (
            f"test {name}: mean ± 95 % confidence interval over the tasks of all seeds; {better}"
            + "; beside the first: the difference, task by task" * paired
            + "; worst decile: the mean of the seeds' own" * several
        )


def save(comparison: Comparison, folder: Path) -> None:
    """Write the three files."""
    write_text(folder / "table.csv", table.as_csv(comparison.rows))
    write_text(folder / "table.md", as_markdown(comparison))
    content = to_json(as_plain(comparison), indent=1, inf_nan_mode="null")
    write_text(folder / "comparison.json", f"{content.decode()}\n")


def show(comparison: Comparison, folder: Path) -> None:
    """Print the table, the recommendation, the notes, and the names of the files."""
    cells = table.cells(comparison.rows)
    print(f"\n{table.text(cells)}\n")
    advice = "no recommendation: fewer than two rows have scores"
    if comparison.advice:
        advice = str(comparison.advice)
    notes = [f"note: {note}" for note in comparison.notes]
    print_lines([comparison.legend, "", *advice.splitlines(), "", comparison.facts[0], *notes])
    files = ", ".join(sorted(file.name for file in folder.glob("*.*")))
    print(f"saved in {folder}: {files}")


def print_lines(lines: Sequence[str], file: TextIO | None = None) -> None:
    """Print lines of text, wrapped for reading, never between a number and its sign."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for line in lines:
        tied = line.replace(" %", "\N{NO-BREAK SPACE}%").replace("± ", "±\N{NO-BREAK SPACE}")
        text = textwrap.fill(tied, width, subsequent_indent="  ", break_on_hyphens=False)
        print(text.replace("\N{NO-BREAK SPACE}", " "), file=file)


def as_markdown(comparison: Comparison) -> str:
    """The table with its legend, the recommendation, and the circumstances."""
    names = ", ".join(row.recipe for row in comparison.rows)
    legend = comparison.legend
    parts = [
        f"# Comparison: {names}",
        table.markdown(table.cells(comparison.rows)),
        f"{legend[0].upper()}{legend[1:]}.",
    ]
    if comparison.advice:
        parts += ["## Recommendation", _points(str(comparison.advice).splitlines())]
    runs = [f"{name}: {run.path}" for name, group in comparison.runs.items() for run in group]
    parts += ["## Circumstances", _points([*comparison.facts, *comparison.notes, *runs])]
    return "\n\n".join(parts) + "\n"


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """All of it in plain values, the logs of every run included."""
    return {
        "format": 2,
        "command": ["metablocks", *comparison.request.argv],
        "facts": comparison.facts,
        "notes": comparison.notes,
        "recommendation": plain(comparison.advice) if comparison.advice else None,
        "rows": [
            {
                **plain(row),
                "runs": [
                    {
                        "path": run.path,
                        "seed": run.seed,
                        "recipe": run.values,
                        "record": run.record,
                        "metrics": run.metrics,
                        "times": run.times,
                    }
                    for run in comparison.runs[row.recipe]
                ],
                "failures": [
                    {"run": each.title, "status": each.status, "error": each.error}
                    for each in comparison.failures[row.recipe]
                ],
            }
            for row in comparison.rows
        ],
    }


def _points(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
