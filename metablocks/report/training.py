"""The runs of a comparison: budgets measured and applied, one job for each recipe and seed."""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metablocks.errors import RecipeError, RunError
from metablocks.recipe import Recipe
from metablocks.recipe.load import from_text
from metablocks.report import budgets
from metablocks.report.budgets import Pace
from metablocks.report.contenders import Contender, at
from metablocks.report.probe import Timing, combine
from metablocks.report.processes import Job, run_jobs
from metablocks.report.progress import Display
from metablocks.report.request import Request
from metablocks.report.results import is_run
from metablocks.report.table import seconds_text
from metablocks.runs.tables import place_arguments

_ROUNDS = 2  # of timing

Told = tuple[list[Contender], list[str]]
"""Contenders, and what there is to tell about them."""


@dataclass(frozen=True)
class PlannedRun:
    """A recipe with a seed, to be trained."""

    label: str
    seed: int
    steps: int
    recipe_hash: str
    recipe_file: Path
    runs: Path
    """The folder its own folder will be in."""
    job: Job

    @property
    def folder(self) -> Path | None:
        """Where it has gone, once it has begun."""
        for record in sorted(self.runs.glob("*/run.json")):
            if json.loads(record.read_text())["recipe"] == self.recipe_hash and is_run(
                record.parent
            ):
                return record.parent
        return None

    def command(self, *place: str) -> str:
        """The command that trains it by hand."""
        words = ["metablocks", "run", str(self.recipe_file), "--set", f"seed={self.seed}"]
        return shlex.join([*words, "--out", str(self.runs), *place])


class Interrupted(Exception):  # noqa: N818  (no error: what was asked for)
    """Ctrl-C before the first run."""


def with_budget(contenders: Sequence[Contender], request: Request) -> Told:
    """The contenders with one budget for all that are trained. Raises `RecipeError`."""
    trained = [contender for contender in contenders if contender.recipe]
    if not trained or (request.steps is None and request.minutes is None):
        budgets.check_same_budget(trained)
        return list(contenders), []
    if request.steps is not None:
        lengths = budgets.by_steps(request.steps, trained)
        odd = any(length.steps != request.steps for length in lengths)
        told = [
            f"{contender.label}: {length}" + (f", nearest to {request.steps:,}" if odd else "")
            for contender, length in zip(trained, lengths, strict=True)
        ]
    else:
        minutes = request.minutes or 0.0
        paces = measure_paces(trained, request)
        pairs = list(zip(trained, paces, strict=True))
        lengths = [budgets.by_minutes(minutes, contender, pace) for contender, pace in pairs]
        told = [
            f"{contender.label}: {seconds_text(pace.step)} a meta-step and "
            f"{seconds_text(pace.validation)} a validation measured; {length} take about "
            f"{minutes:g} min"
            for (contender, pace), length in zip(pairs, lengths, strict=True)
        ]
    chosen = {each.label: length for each, length in zip(trained, lengths, strict=True)}
    result = []
    for contender in contenders:
        if contender.recipe:
            recipe = _override(contender.recipe, chosen[contender.label].override)
            contender = replace(contender, recipe=recipe, values=recipe.values)
        result.append(contender)
    _check_different(result)
    return result, told


def _check_different(contenders: Sequence[Contender]) -> None:
    """Raise `RecipeError` for recipes that differed in nothing but the budget."""
    seen: dict[str, str] = {}
    for contender in contenders:
        if contender.recipe:
            twin = seen.setdefault(contender.recipe.hash, contender.label)
            if twin != contender.label:
                raise RecipeError(
                    f"{twin} and {contender.label} differ in nothing but the budget, which is one "
                    "for all here; give one of them"
                )


def measure_paces(trained: Sequence[Contender], request: Request) -> list[Pace]:
    """Time every recipe in processes of its own, as many side by side as runs will be.

    In rounds, so that whatever else the machine does meanwhile falls on all recipes.
    Raises `RunError` where one fails, `Interrupted` on Ctrl-C.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for turn in range(_ROUNDS):
            for index, contender in enumerate(trained):
                assert contender.recipe is not None
                file = Path(folder) / f"{index}.yaml"
                file.write_text(contender.recipe.to_yaml(), encoding="utf-8")
                probe = ("-m", "metablocks.report.probe", str(file), *place(request))
                log = Path(folder) / f"{index}-{turn}"
                jobs.append(Job(f"timing {contender.label}", (sys.executable, *probe), log))
        display = Display(jobs, quiet=request.quiet)
        result = run_jobs(jobs, side_by_side=request.jobs, watcher=display)
        if result.interrupted:
            raise Interrupted
        for outcome in result.outcomes:
            if outcome.status != 0:
                raise RunError(f"{outcome.job.title} failed: {outcome.error}")
        timings = [Timing(**json.loads(job.printed.read_text().splitlines()[-1])) for job in jobs]
        return [combine(timings[index :: len(trained)]) for index in range(len(trained))]


def place(request: Request) -> tuple[str, ...]:
    """The arguments that say where to compute, for a child process."""
    return place_arguments(request.allow, request.data, request.device)


def seeds_for(
    contenders: Sequence[Contender], request: Request
) -> tuple[tuple[int, ...], list[str]]:
    """The seeds of all runs, and a note where a recipe's own seed is not the one it starts from."""
    trained = [contender for contender in contenders if contender.recipe]
    if not isinstance(request.seeds, int):
        return request.seeds, []
    own = {contender.label: int(contender.values["seed"]) for contender in trained}
    first = next(iter(own.values()), 0)
    notes = []
    if len(set(own.values())) > 1:
        others = ", ".join(f"{label} {seed}" for label, seed in own.items() if seed != first)
        notes.append(f"all are trained from seed {first} on, in place of their own ({others})")
    return tuple(range(first, first + request.seeds)), notes


def plan_runs(
    contenders: Sequence[Contender], seeds: Sequence[int], folder: Path, request: Request
) -> list[PlannedRun]:
    """One run for each recipe and seed that is not finished yet: all recipes with the first seed,
    then with the next. Writes the recipes to `folder/recipes/`.
    """
    files = dict(_write_recipes(contenders, folder / "recipes"))
    planned = []
    for seed in seeds:
        for contender in contenders:
            if contender.recipe is None or seed in {run.seed for run in contender.finished}:
                continue
            planned.append(_plan(contender, seed, files[contender.label], folder, request))
    return planned


def _plan(
    contender: Contender, seed: int, file: Path, folder: Path, request: Request
) -> PlannedRun:
    assert contender.recipe is not None
    set_seed = f"seed={seed}"
    recipe = _override(contender.recipe, set_seed)
    where = ("--out", str(folder / "runs"), *place(request))
    command = (sys.executable, "-m", "metablocks", "run", str(file), "--set", set_seed, *where)
    return PlannedRun(
        label=contender.label,
        seed=seed,
        steps=budgets.own_length(recipe.values).steps,
        recipe_hash=recipe.hash,
        recipe_file=file,
        runs=folder / "runs",
        job=Job(
            f"{contender.label}, seed {seed}",
            (*command, "--quiet"),
            folder / "logs" / f"{file.stem}-seed-{seed}",
        ),
    )


def _write_recipes(contenders: Sequence[Contender], folder: Path) -> Iterator[tuple[str, Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    for contender in contenders:
        if contender.recipe is None:
            continue
        file, number = folder / f"{contender.stem}.yaml", 1
        while file.exists():
            number += 1
            file = folder / f"{contender.stem}-{number}.yaml"
        file.write_text(contender.recipe.to_yaml(), encoding="utf-8")
        yield contender.label, file


def _override(recipe: Recipe, override: str) -> Recipe:
    """The same recipe with one value changed. Raises `RecipeError` where it does not take it."""
    return from_text(recipe.to_yaml(), recipe.source, [override], recipe.allow)


def budget_text(request: Request) -> str:
    """What was asked of runs beside what the table tells."""
    if request.minutes is not None:
        return f"{request.minutes:g} min of training a run"
    return ""


def check_arguments(contenders: Sequence[Contender], request: Request) -> None:
    """Raise `RecipeError` for what makes no sense together."""
    trained = [contender for contender in contenders if contender.recipe]
    several = not isinstance(request.seeds, int) or request.seeds > 1
    runs = sum(len(contender.finished) for contender in contenders)
    if len(trained) + runs < 2 and not several:
        raise RecipeError(
            f"only {contenders[0].label} is given; compare takes two or more recipes or runs, or "
            "one recipe with several --seeds"
        )
    given = [
        name
        for name, asked in (
            ("--steps", request.steps is not None),
            ("--minutes", request.minutes is not None),
            ("--seeds", several),
            ("--set", request.overrides),
        )
        if asked
    ]
    if not trained and given:
        raise RecipeError(
            f"{given[0]}: all that is given is trained already; there is nothing to set"
        )
    for contender in contenders:
        tasks = at(contender.values, "evaluation.tasks")
        if not contender.recipe and request.tasks not in (None, tasks):
            raise RecipeError(
                f"--tasks {request.tasks}: {contender.label} is finished, tested on {tasks} tasks"
            )
