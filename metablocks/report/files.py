"""The files of a comparison: `table.md`, `table.csv`, `comparison.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metablocks.report import table
from metablocks.report.advice import Advice
from metablocks.report.processes import Outcome
from metablocks.report.request import Request
from metablocks.report.results import FinishedRun
from metablocks.report.summary import Row
from metablocks.runs.directory import write_text

_LEGENDS = {
    "accuracy": "higher is better",
    "mse": "lower is better",
}


@dataclass(frozen=True)
class Comparison:
    """All that a comparison has found."""

    rows: Sequence[Row]
    runs: Mapping[str, Sequence[FinishedRun]]
    """By the label of the row, as are the failures."""
    failures: Mapping[str, Sequence[Outcome]]
    advice: Advice | None
    notes: Sequence[str]
    facts: Sequence[str]
    """Where and how it was measured."""
    request: Request

    @property
    def legend(self) -> str:
        """How to read the scores."""
        measure = table.measure_of(self.rows)
        several = any(len(row.seeds) > 1 for row in self.rows)
        return (
            f"test {table.NAMES[measure]}: mean ± 95 % confidence interval over the tasks of all seeds; "
            f"{_LEGENDS[measure]}" + "; worst decile: the mean of the seeds' own" * several
        )


def save(comparison: Comparison, folder: Path) -> None:
    """Write the three files."""
    write_text(folder / "table.csv", table.as_csv(comparison.rows))
    write_text(folder / "table.md", as_markdown(comparison))
    content = json.dumps(_finite(as_plain(comparison)), indent=1)
    write_text(folder / "comparison.json", f"{content}\n")


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
        "format": 1,
        "command": ["metablocks", *comparison.request.argv],
        "facts": list(comparison.facts),
        "notes": list(comparison.notes),
        "recommendation": asdict(comparison.advice) if comparison.advice else None,
        "rows": [
            {
                **asdict(row),
                "runs": [_plain_run(run) for run in comparison.runs[row.recipe]],
                "failures": [
                    {"run": each.job.title, "status": each.status, "error": each.error}
                    for each in comparison.failures[row.recipe]
                ],
            }
            for row in comparison.rows
        ],
    }


def _plain_run(run: FinishedRun) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "seed": run.seed,
        "recipe": run.values,
        "record": run.record,
        "metrics": run.metrics,
        "times": run.times,
    }


def _points(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _finite(value: Any) -> Any:
    """The value with null where JSON has no number."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
