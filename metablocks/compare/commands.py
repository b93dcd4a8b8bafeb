"""The command `compare`: recipes or finished runs in, a table and a recommendation out.

    arguments → entries → one budget → jobs, one a run → rows → table, plots, recommendation

The directory of a comparison, `comparisons/<names>-<time>/`:

    table.md         the table with its notes and the recommendation
    table.csv        every number of the table in full
    comparison.json  all of it, with the logs of every run
    comparison.png   validation against time and meta-steps, if matplotlib is installed
    training.png     the training loss of every epoch
    runs/            the runs that were trained here; their recipes and output in recipes/, logs/
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from metablocks.compare import table
from metablocks.compare.budget import check_arguments, choose_seeds, with_budget
from metablocks.compare.entries import Entry, absorb, check_same_problem, read_entries, stems
from metablocks.compare.jobs import Display, Job, command_to_finish, plan_runs, run_jobs
from metablocks.compare.notes import machine_text, notes_on
from metablocks.compare.output import Comparison, print_lines, save, show
from metablocks.compare.recommend import recommend
from metablocks.compare.request import Request
from metablocks.errors import command, quoted
from metablocks.recipe import build
from metablocks.runs.directory import create
from metablocks.runs.finished import read_run
from metablocks.runs.plots import draw_comparison


def compare(request: Request) -> int:
    """Train recipes and read runs, save and print their comparison; returns the exit status.

    0: fine. 1: a run failed; the table has the others. 130: interrupted. A plan writes the recipes and
    prints the commands that train them. Raises `RecipeError` for entries that cannot be compared,
    before anything is trained.
    """
    entries = read_entries(request.names, request.recipe_overrides, request.allow)
    check_arguments(entries, request)
    check_same_problem(entries, _checksums(entries, request))
    try:
        entries, notes = with_budget(entries, request)
    except KeyboardInterrupt:
        print("interrupted while timing; nothing was trained", file=sys.stderr)
        return 130
    entries = absorb(entries)
    seeds, seed_notes = choose_seeds(entries, request)
    notes += seed_notes
    folder = create(request.out, stems(entries)).path
    jobs = plan_runs(entries, seeds, folder, request)
    if request.plan:
        return _print_plan(jobs, [*notes, _command_to_read(entries, folder, request)], request)
    if not request.quiet:
        print_lines([*notes, *[f"training in {folder / 'runs'}"] * bool(jobs)], sys.stderr)
    display = Display(jobs, quiet=request.quiet)
    if run_jobs(jobs, side_by_side=request.jobs, display=display):
        print(_how_to_go_on(jobs, entries, folder, request), file=sys.stderr)
        return 130
    comparison = _gather(entries, jobs, notes, folder, request)
    save(comparison, folder)
    show(comparison, folder)
    return int(any(job.status != 0 for job in jobs))


def _checksums(entries: Sequence[Entry], request: Request) -> dict[str, str | None]:
    """Checksums of the recipes' data by label. Builds all recipes, to find faults before training."""
    build_one = partial(build, device=request.device, data=request.data)
    return {
        entry.label: getattr(build_one(entry.recipe).source, "checksum", None)
        for entry in entries
        if entry.recipe
    }


def _gather(
    entries: Sequence[Entry],
    jobs: Sequence[Job],
    notes: Sequence[str],
    folder: Path,
    request: Request,
) -> Comparison:
    """Read the runs, draw the plots, and recommend a recipe."""
    runs = {entry.label: list(entry.finished) for entry in entries}
    failures: dict[str, list[Job]] = {entry.label: [] for entry in entries}
    trained_here = []
    for job in jobs:
        directory = job.directory
        if job.status == 0 and directory:
            trained_here.append(read_run(directory))
            runs[job.label].append(trained_here[-1])
        else:
            failures[job.label].append(job)
    for group in runs.values():
        group.sort(key=lambda run: run.seed)
    rows = [table.summarise(each, runs[each.label], len(failures[each.label])) for each in entries]
    finished = {label: group for label, group in runs.items() if group}
    every = trained_here or [run for group in finished.values() for run in group]
    facts = [
        machine_text(every, trained_here=bool(trained_here)),
        f"command: {' '.join(map(quoted, ('metablocks', *request.argv)))}",
    ]
    load = max((job.load for job in jobs if job.load is not None), default=None)
    all_notes = [
        *notes,
        *notes_on(runs, jobs=request.jobs if trained_here else 1, load=load),
        *(
            f"{job.title} failed: {job.error.splitlines()[-1]} (see {job.errors})"
            for group in failures.values()
            for job in group
        ),
        *(draw_comparison(folder, finished) if finished else []),
    ]
    limited = trained_here and request.minutes is not None
    budget = f"{request.minutes:g} min of training a run" if limited else ""
    return Comparison(rows, runs, failures, recommend(rows, budget), all_notes, facts, request)


def _how_to_go_on(
    jobs: Sequence[Job], entries: Sequence[Entry], folder: Path, request: Request
) -> str:
    """After an interruption: what is there, and the commands that finish the comparison."""
    unfinished = [job for job in jobs if job.status != 0]
    commands = [
        *(command_to_finish(job, request) for job in unfinished),
        _command_to_read(entries, folder, request),
    ]
    head = (
        f"interrupted: {len(jobs) - len(unfinished)} of {len(jobs)} runs are finished, in "
        f"{folder / 'runs'}. Nothing is lost; to go on:"
    )
    return "\n  ".join([head, *commands])


def _command_to_read(entries: Sequence[Entry], folder: Path, request: Request) -> str:
    """The command that compares all runs once they are trained."""
    words = [quoted(run.path) for entry in entries for run in entry.finished]
    words.append(f"{quoted(folder / 'runs')}/*")
    if request.out != Request(()).out:
        words += ["--out", quoted(request.out)]
    return f"{command('compare')} {' '.join(words)}"


def _print_plan(jobs: Sequence[Job], remarks: Sequence[str], request: Request) -> int:
    """Print a command for each training, a line each; on stderr what comes before and after."""
    *notes, reading = remarks
    if not request.quiet:
        print_lines(notes, sys.stderr)
    for job in jobs:
        print(command(*job.arguments))
    print(f"{len(jobs)} trainings, in any order; then: {reading}", file=sys.stderr)
    return 0
