"""The command `compare`: which algorithm to use on a problem, with measured numbers.

    arguments → contenders → one budget → runs, a process each → rows → table, picture, advice

The directory of a comparison, `comparisons/<names>-<time>/`:

    table.md         the table with its notes and the recommendation
    table.csv        every number of the table in full
    comparison.json  all of it, with the logs of every run
    comparison.png   validation against time and meta-steps, where matplotlib is installed
    training.png     the training loss of every epoch
    runs/            the runs that were trained here; recipes/, logs/: what they were, what they said
"""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from metablocks.recipe import build
from metablocks.report import advice, picture, table
from metablocks.report.caveats import caveats
from metablocks.report.contenders import Contender, absorb, check_same_problem, read_contenders
from metablocks.report.files import Comparison, save
from metablocks.report.machine import machine_line, recorded_line
from metablocks.report.processes import Job, Outcome, run_jobs
from metablocks.report.progress import Display
from metablocks.report.request import Request
from metablocks.report.results import FinishedRun, read_run
from metablocks.report.summary import summarise
from metablocks.report.training import (
    Interrupted,
    PlannedRun,
    budget_text,
    check_arguments,
    place,
    plan_runs,
    seeds_for,
    with_budget,
)
from metablocks.runs.directory import RunDirectory, create

_LONGEST_NAME = 80
_WIDEST = 100


def compare(request: Request) -> int:
    """Train and read what is asked for, save and print the comparison; returns the exit status.

    0: fine. 1: a run failed; the table has the others. 130: interrupted. Raises `RecipeError` for
    what cannot be compared, before anything is trained.
    """
    contenders = read_contenders(request.names, request.recipe_overrides, request.allow)
    check_arguments(contenders, request)
    check_same_problem(contenders, _checksums(contenders, request))
    try:
        contenders, told = with_budget(contenders, request)
    except Interrupted:
        print("interrupted while timing; nothing was trained", file=sys.stderr)
        return 130
    contenders = absorb(contenders)
    seeds, notes = seeds_for(contenders, request)
    folder = create(request.out, _name(contenders)).path
    planned = plan_runs(contenders, seeds, folder, request)
    if not request.quiet:
        _print_lines(
            [*told, *notes, *[f"training in {folder / 'runs'}"][: len(planned)]], sys.stderr
        )
    display = _display(planned, request.quiet)
    result = run_jobs([run.job for run in planned], side_by_side=request.jobs, watcher=display)
    display.close()
    outcomes = dict(zip(planned, result.outcomes, strict=True))
    if result.interrupted:
        print(_how_to_go_on(outcomes, contenders, folder, request), file=sys.stderr)
        return 130
    comparison = _gather(contenders, outcomes, [*told, *notes], folder, request)
    save(comparison, folder)
    _show(comparison, contenders, folder)
    return 1 if any(outcome.status != 0 for outcome in outcomes.values()) else 0


def _checksums(contenders: Sequence[Contender], request: Request) -> dict[str, str]:
    """Build every recipe, so that what is wrong is said before anything is trained."""
    sums: dict[str, str] = {}
    for contender in contenders:
        checksum = None
        if contender.recipe:
            source = build(contender.recipe, device=request.device, data=request.data).source
            checksum = getattr(source, "checksum", None)
        elif contender.finished:
            checksum = contender.finished[0].record.get("data", {}).get("checksum")
        if checksum:
            sums[contender.label] = checksum
    return sums


def _name(contenders: Sequence[Contender]) -> str:
    """Of the directory: the recipes, in short."""
    stems = list(dict.fromkeys(contender.stem for contender in contenders))
    kept = stems
    while len(kept) > 1 and len("-".join(kept)) > _LONGEST_NAME:
        kept = kept[:-1]
    more = [f"and-{len(stems) - len(kept)}-more"] if len(kept) < len(stems) else []
    return "-".join([*(stem[:_LONGEST_NAME] for stem in kept), *more])


def _display(planned: Sequence[PlannedRun], quiet: bool) -> Display:
    runs = {run.job: run for run in planned}

    def reached(job: Job) -> int:
        folder = runs[job].folder
        rows = RunDirectory(folder).read_metrics() if folder else []
        return max((row["step"] for row in rows if "step" in row), default=0)

    def result(job: Job) -> str:
        folder = runs[job].folder
        if folder is None:
            return ""
        test = read_run(folder).test
        return f"test {table.NAMES[test.measure]} {table.share_text(test.mean, test.measure)}"

    return Display(
        list(runs),
        quiet=quiet,
        steps=lambda job: runs[job].steps,
        reached=reached,
        result=result,
    )


def _gather(
    contenders: Sequence[Contender],
    outcomes: dict[PlannedRun, Outcome],
    notes: Sequence[str],
    folder: Path,
    request: Request,
) -> Comparison:
    """Read the runs, draw the picture, and bring all of it together."""
    runs: dict[str, list[FinishedRun]] = {each.label: list(each.finished) for each in contenders}
    failures: dict[str, list[Outcome]] = {each.label: [] for each in contenders}
    here: list[FinishedRun] = []
    for planned, outcome in outcomes.items():
        if outcome.status == 0 and planned.folder:
            here.append(read_run(planned.folder))
            runs[planned.label].append(here[-1])
        else:
            failures[planned.label].append(outcome)
    for group in runs.values():
        group.sort(key=lambda run: run.seed)
    rows = [summarise(each, runs[each.label], len(failures[each.label])) for each in contenders]
    finished = {label: group for label, group in runs.items() if group}
    every = [run for group in finished.values() for run in group]
    facts = [
        machine_line(here[0].record) if here else recorded_line(every),
        f"command: {shlex.join(['metablocks', *request.argv])}",
    ]
    loads = [outcome.load for outcome in outcomes.values() if outcome.load is not None]
    said = [
        *notes,
        *caveats(runs, jobs=request.jobs if here else 1, load=max(loads, default=None)),
        *_failure_notes(failures),
        *(picture.draw(folder, finished) if finished else []),
    ]
    advised = advice.recommend(rows, budget_text(request) if here else "")
    return Comparison(rows, runs, failures, advised, said, facts, request)


def _show(comparison: Comparison, contenders: Sequence[Contender], folder: Path) -> None:
    """Print the table, what follows from it, and what to know about it."""
    cells = table.cells(comparison.rows)
    print(f"\n{table.text(cells, shutil.get_terminal_size().columns)}\n")
    none = "no recommendation: fewer than two rows have scores"
    advised = str(comparison.advice).splitlines() if comparison.advice else [none]
    notes = [f"note: {note}" for note in comparison.notes]
    _print_lines([comparison.legend, "", *advised, "", comparison.facts[0], *notes])
    files = ", ".join(sorted(file.name for file in folder.glob("*.*")))
    print(f"saved in {folder}: {files}")
    failed = any(comparison.failures.values())
    if not failed and any(contender.recipe for contender in contenders):
        more = shlex.join(["RECIPE", *_same_terms(comparison.request)])
        print(f"to add one: metablocks compare {_run_arguments(contenders, folder)} {more}")


def _failure_notes(failures: dict[str, list[Outcome]]) -> list[str]:
    return [
        f"{outcome.job.title} failed: {outcome.error.splitlines()[-1]} (see {outcome.job.errors})"
        for group in failures.values()
        for outcome in group
    ]


def _how_to_go_on(
    outcomes: dict[PlannedRun, Outcome],
    contenders: Sequence[Contender],
    folder: Path,
    request: Request,
) -> str:
    """After an interruption: what is there, and the commands that finish the comparison."""
    lines, done = [], 0
    for planned, outcome in outcomes.items():
        started = planned.folder
        if outcome.status == 0 and started:
            done += 1
        elif started:
            resume = ["metablocks", "run", "--resume", str(started), *place(request)]
            lines.append(f"  {shlex.join(resume)}    # stopped")
        else:
            lines.append(f"  {planned.command(*place(request))}    # not begun")
    again = [_run_arguments(contenders, folder), *map(shlex.quote, _out(request))]
    lines.append(f"  metablocks compare {' '.join(again)}")
    head = f"interrupted: {done} of {len(outcomes)} runs are finished, in {folder / 'runs'}"
    return "\n".join([f"{head}. Nothing is lost; to go on:", *lines])


def _run_arguments(contenders: Sequence[Contender], folder: Path) -> str:
    """The runs of a comparison as arguments: those it was given, and its own."""
    given = [shlex.quote(str(run.path)) for each in contenders for run in each.finished]
    trained = any(contender.recipe for contender in contenders)
    own = [f"{shlex.quote(str(folder / 'runs'))}/*"] if trained else []
    return " ".join([*given, *own])


def _same_terms(request: Request) -> list[str]:
    """The options that give a further recipe the same budget."""
    words = [word for override in request.overrides for word in ("--set", override)]
    for name, value in (
        ("--steps", request.steps),
        ("--minutes", request.minutes),
        ("--tasks", request.tasks),
    ):
        words += [] if value is None else [name, f"{value:.15g}"]
    seeds = request.seeds
    if seeds != 1:
        words += [
            "--seeds",
            str(seeds) if isinstance(seeds, int) else f"{','.join(map(str, seeds))},",
        ]
    return [*words, *place(request), *_out(request)]


def _out(request: Request) -> list[str]:
    default = Request(()).out
    return [] if request.out == default else ["--out", str(request.out)]


def _print_lines(lines: Sequence[str], file: TextIO | None = None) -> None:
    """Lines of text, wrapped for reading, never between a number and its sign."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for line in lines:
        kept = line.replace(" %", "\N{NO-BREAK SPACE}%").replace("± ", "±\N{NO-BREAK SPACE}")
        text = textwrap.fill(kept, width, subsequent_indent="  ", break_on_hyphens=False)
        print(text.replace("\N{NO-BREAK SPACE}", " "), file=file)
