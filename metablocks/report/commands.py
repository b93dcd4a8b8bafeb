"""The command `report`: folders of finished runs in, a page and pictures out.

The folder of a report, `reports/<names>-<time>/`:

    report.html     one page, which opens from disk and loads nothing
    *.png, *.svg    its figures
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from metablocks.compare import table
from metablocks.compare.entries import Entry, check_same_problem, read_entries, stems
from metablocks.compare.notes import notes_on
from metablocks.compare.recommend import recommend
from metablocks.errors import RecipeError, RunError, first_line
from metablocks.memory import format_bytes
from metablocks.recipe.record import leaves
from metablocks.report.figures import figures_of
from metablocks.report.interactive import library
from metablocks.report.page import Page
from metablocks.runs import drawing
from metablocks.runs.directory import RunDirectory, create
from metablocks.runs.drawing import Figure
from metablocks.runs.examples import read_test
from metablocks.runs.files import write_text
from metablocks.runs.plots import training
from metablocks.runs.scores import MEASURES

LARGEST = 6_000_000
"""Bytes of a page that still opens at once."""


def report(paths: Sequence[Path], out: Path) -> int:
    """Write a report on finished runs in a new folder below `out`; returns the exit status.

    Runs that differ in the seed alone are shown together. Nothing of a run is changed, and no code of
    its packages is run. Raises `RecipeError` for a run that is not finished, and without Plotly or
    matplotlib.
    """
    code = library()
    if notes := drawing.missing():
        raise RecipeError(notes[0])
    entries = read_entries([str(path) for path in paths])
    folder = create(out, stems(entries)).path
    page = Page(f"Report: {', '.join(entry.label for entry in entries)}")
    page.table(_overview(entries))
    _compare(page, entries)
    figures = list[Figure]()

    def add(figure: Figure, prefix: str = "") -> None:
        page.figure(figure)
        figures.append(replace(figure, name=prefix + figure.name))

    for measure in dict.fromkeys(entry.finished[0].test.measure for entry in entries):
        alike = [entry for entry in entries if entry.finished[0].test.measure == measure]
        prefix = f"{measure}-" if len(alike) < len(entries) else ""
        add(training({entry.label: entry.finished for entry in alike}), prefix)
    for number, entry in enumerate(entries, 1):
        page.heading(entry.label)
        tests = [read_test(RunDirectory(run.path).test) for run in entry.finished]
        with _drawn(entry):
            for figure in figures_of(entry.finished, tests):
                add(figure, f"{number}-" if len(entries) > 1 else "")
        for run, test in zip(entry.finished, tests, strict=True):
            if not test:
                page.text(
                    f"{run.path} is older: tasks, examples and spectra are not recorded", "note"
                )
        _provenance(page, entry)
    html = page.html(code)
    write_text(folder / "report.html", html)
    for figure in figures:
        drawing.save(figure, folder, ("png", "svg"))
    size = len(html.encode())
    print(f"{folder / 'report.html'} ({format_bytes(size)}); {len(figures)} figures beside it")
    if size > LARGEST:
        print("note: so large a page opens slowly; give fewer runs")
    return 0


@contextmanager
def _drawn(entry: Entry) -> Iterator[None]:
    """Raise `RunError` for logs and arrays that are not as a run records them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        paths = ", ".join(str(run.path) for run in entry.finished)
        raise RunError(
            f"{paths}: lacks numbers that are drawn ({type(error).__name__}: {first_line(error)}); an "
            "older or damaged run, to be trained again"
        ) from error


def _overview(entries: Sequence[Entry]) -> list[list[str]]:
    """A row for each run."""
    rows = [["recipe", "seed", "test", "meta-steps", "time", "peak memory", "device", "folder"]]
    for entry in entries:
        for run in entry.finished:
            memory = format_bytes(run.peak_memory) if run.peak_memory else table.EMPTY
            measure, _ = MEASURES[run.test.measure]
            test = f"{measure} {run.test.text(-1)} ({run.test.tasks} tasks)"
            time = table.seconds_text(run.seconds)
            device = str(run.record.get("device"))
            label, steps = str(run.values["name"]), f"{run.steps:,}"
            rows.append([label, str(run.seed), test, steps, time, memory, device, str(run.path)])
    return rows


def _compare(page: Page, entries: Sequence[Entry]) -> None:
    """The table of `metablocks compare`, of several runs, with its notes; or why there is none."""
    if sum(len(entry.finished) for entry in entries) < 2:
        return
    page.heading("Comparison")
    runs = {entry.label: entry.finished for entry in entries}
    try:
        check_same_problem(entries, {})
    except RecipeError as error:
        page.text(f"No table: {error}", "note")
        return
    rows = [table.summarise(entry, entry.finished) for entry in entries]
    page.table([*map(list, zip(*table.cells(rows), strict=True))])
    advice = recommend(rows, "")
    for line in str(advice).splitlines() if advice else ():
        page.text(line)
    for note in [table.legend(rows), *notes_on(runs, jobs=1)]:
        page.text(note, "note")


def _provenance(page: Page, entry: Entry) -> None:
    """The resolved recipe, where each value comes from, and the circumstances of every run."""
    first = entry.finished[0]
    origins = first.record.get("origins", {})
    rows = [["value", "", "from"]]
    for path, value in leaves(first.values):
        rows.append([path, json.dumps(value, ensure_ascii=False), origins.get(path, table.EMPTY)])
    page.table(rows, "the resolved recipe, and where each value comes from")
    for run in entry.finished:
        page.table([["", ""], *_record(run.record)], f"seed {run.seed}: code, versions and machine")


def _record(record: dict[str, Any]) -> list[list[str]]:
    """The leaves of a run's record, except for the origins."""
    return [
        [path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for path, value in leaves(record)
        if not path.startswith("origins")
    ]
