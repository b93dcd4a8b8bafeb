"""The commands `run` and `eval`: a recipe, or the directory of a run, to numbers that people read."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metablocks.errors import BlockError, RecipeError, RunError
from metablocks.memory import keep_freed_memory
from metablocks.recipe import Experiment, Recipe, build, load
from metablocks.run import checkpoint, plots
from metablocks.run.deployment import Deployment, deployment
from metablocks.run.directory import RunDirectory, create, environment, write_text
from metablocks.run.ensemble import EnsembleScores, ensemble_scores
from metablocks.run.scores import Scores, summarise
from metablocks.run.state import TrainingState
from metablocks.run.tables import deployment_text, tables, transductive
from metablocks.run.train import Stopped, final_task_scores, train
from metablocks.tasks.base import Split


def train_recipe(
    recipe: Recipe,
    *,
    out: Path,
    data: Path | None = None,
    device: str | None = None,
    resume: Path | None = None,
    quiet: bool = False,
    argv: list[str] | None = None,
) -> int:
    """Train a recipe in a new directory below `out`, or go on with the run in `resume`.

    The process keeps freed memory from then on (see `keep_freed_memory`), for speed. Returns the exit
    status: 0 when trained and tested, 130 when stopped by a signal.
    """
    keep_freed_memory()
    experiment = build(recipe, device=device, data=data)
    torch.manual_seed(recipe.values["seed"])
    directory, state = _open(experiment, out, resume, argv or [])
    print(f"{recipe.name}\n{_facts(experiment)}\nrun directory: {directory.path}")
    if resume:
        print(f"going on after meta-step {state.step} of epoch {state.epochs + 1}")
    sys.stdout.flush()
    try:
        train(experiment, directory, state, quiet=quiet)
        scores, deployed, ensemble = _test(experiment, directory, state)
    except (Stopped, KeyboardInterrupt) as stop:
        trained = state.epochs == experiment.epochs
        if not trained and not isinstance(stop, Stopped):
            raise
        words = ["metablocks", "run", "--resume", str(directory.path)]
        print(
            f"stopped {'before the test' if trained else f'after meta-step {state.step}'}; "
            "everything is saved. To go on: "
            f"{shlex.join([*words, *place_arguments(recipe.allow, data, device)])}"
        )
        return 130
    for note in plots.draw(directory):
        print(note)
    report = _report(experiment, scores, deployed, ensemble)
    print(_summary(experiment, directory, state, report, data, device))
    return 0


def evaluate_run(
    run_dir: Path,
    *,
    allow: Sequence[str] = (),
    checkpoint: str = "best",
    tasks: int | None = None,
    steps: int | None = None,
    split: Split = "test",
    data: Path | None = None,
    device: str | None = None,
) -> int:
    """Evaluate a checkpoint of a run on the fixed tasks of a split, and print the scores.

    `checkpoint` is `best`, `last`, or `ensemble`: the best ones together, where the run kept them.
    Nothing is written. Raises `RecipeError` as `load_recipe` does, and `RunError` for a record or a
    checkpoint that cannot be read.
    """
    directory = RunDirectory(run_dir)
    record = _read_record(directory)
    recipe = load_recipe(run_dir, allow=allow)
    experiment = build(recipe, device=device, data=data or _data_of(record))
    try:
        if checkpoint == "ensemble":
            members = _members(directory, experiment)
            ensemble = ensemble_scores(
                experiment, directory, members, split, tasks=tasks, steps=steps
            )
            print(f"{recipe.name}\n{tables(experiment, ensemble)}")
            return 0
        state = _restore(directory, checkpoint, experiment)
        each = final_task_scores(experiment, split, tasks=tasks, steps=steps)
    except BlockError as error:
        if steps is None:
            raise
        raise RecipeError(f"--steps {steps}: {error}") from error
    print(f"{recipe.name}, {checkpoint} checkpoint (epoch {state.epochs})")
    print(_report(experiment, summarise(split, *each), deployment(experiment, split, each)))
    return 0


def load_recipe(run_dir: Path, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, with outside blocks from the packages in `allow` alone.

    Raises `RecipeError` as `load` does. Where `run.json` names packages that `allow` does not, the
    message says so.

    Law: `run.json` allows nothing; who writes a run's files decides nothing about what code runs.
    """
    directory = RunDirectory(run_dir)
    try:
        return load(directory.recipe, overrides, allow)
    except RecipeError as error:
        options = [f"--allow {name}" for name in _recorded_packages(directory) if name not in allow]
        if not options:
            raise
        words = " ".join(options)
        hint = f"{run_dir}: this run was made with {words}; if you trust that code, add {words}"
        raise RecipeError(f"{error}\n{hint}") from None


def _recorded_packages(directory: RunDirectory) -> list[str]:
    """What `run.json` says was allowed, for a message: only what can be the name of a package."""
    try:
        names = _read_record(directory).get("allow")
    except RunError:
        return []
    return [
        name
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
    ]


def place_arguments(allow: Sequence[str], data: Path | None, device: str | None) -> tuple[str, ...]:
    """The arguments of the command that say where to find things, and where to compute."""
    named = [("--data", data), ("--device", device), *(("--allow", package) for package in allow)]
    return tuple(word for name, value in named if value for word in (name, str(value)))


def _open(
    experiment: Experiment, out: Path, resume: Path | None, argv: list[str]
) -> tuple[RunDirectory, TrainingState]:
    recipe = experiment.recipe
    data = _data_record(experiment)
    if resume is None:
        record = {
            "recipe": recipe.hash,
            "source": recipe.source,
            "allow": list(recipe.allow),
            "seed": recipe.values["seed"],
            "argv": argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": data,
            "transductive": transductive(experiment),
            **environment(experiment.device),
        }
        directory = create(out, Path(recipe.source).stem)
        write_text(directory.recipe, recipe.to_yaml())
        write_text(directory.record, f"{json.dumps(record, indent=1)}\n")
        return directory, TrainingState()
    directory = RunDirectory(resume)
    record = _read_record(directory)
    last = directory.checkpoint("last")
    state = checkpoint.restore(last, experiment) if last.is_file() else TrainingState()
    if record["recipe"] != recipe.hash:
        raise RunError(checkpoint.other_recipe(resume, record["recipe"], recipe.hash))
    known, now = record["data"].get("checksum"), data.get("checksum")
    if known != now:
        raise RunError(f"{resume} was trained on other data: checksum {known}, here {now}")
    directory.keep_epochs(state.epochs)
    directory.keep_members(state.members)
    return directory, state


def _restore(directory: RunDirectory, which: str, experiment: Experiment) -> TrainingState:
    return checkpoint.restore_learner(directory.checkpoint(which), experiment)


def _members(directory: RunDirectory, experiment: Experiment) -> list[int]:
    """The epochs of the ensemble, as the last checkpoint has them."""
    if experiment.evaluation.ensemble == 1:
        raise RecipeError(
            f"--checkpoint ensemble: {directory.path} kept one checkpoint, the best; to keep more, "
            "train with evaluation.ensemble above 1"
        )
    members = _restore(directory, "last", experiment).members
    if not members:
        raise RunError(f"{directory.path}: no epoch was validated yet; take --checkpoint last")
    return members


def _test(
    experiment: Experiment, directory: RunDirectory, state: TrainingState
) -> tuple[Scores, Deployment | None, EnsembleScores | None]:
    """Test the best checkpoint, and the best ones together; this is the last line of the log."""
    _restore(directory, "best", experiment)
    each = final_task_scores(experiment, "test")
    scores, ensemble = summarise("test", *each), None
    row = {"test": scores.as_dict()}
    deployed = deployment(experiment, "test", each)  # of the best one: the ensemble restores others
    if deployed and deployed.reductions:
        row["deployment"] = deployed.as_dict()
    if experiment.evaluation.ensemble > 1:
        ensemble = ensemble_scores(experiment, directory, state.members, "test")
        row["ensemble"] = ensemble.as_dict()
    directory.append(directory.metrics, row)
    return scores, deployed, ensemble


def _read_record(directory: RunDirectory) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(directory.record.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{directory.record}: not readable as the record of a run: {error}"
        ) from error
    if not isinstance(record, dict) or not (
        isinstance(record.get("recipe"), str) and isinstance(record.get("data"), dict)
    ):
        raise RunError(f"{directory.record}: not the record of a run; metablocks run writes one")
    return record


def _data_record(experiment: Experiment) -> dict[str, Any]:
    """Which data the tasks are made of: a checksum where there are files behind them."""
    checksum = getattr(experiment.source, "checksum", None)
    if checksum is None:
        return {}
    folder = getattr(experiment.source, "data", None)
    return {"checksum": checksum, "folder": str(Path(folder).resolve()) if folder else None}


def _data_of(record: dict[str, Any]) -> Path | None:
    folder = record["data"].get("folder")
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None


def _facts(experiment: Experiment) -> str:
    meta = sum(p.numel() for p in experiment.learner.parameters() if p.requires_grad)
    steps = experiment.epochs * experiment.steps_per_epoch
    inner = experiment.learner.steps
    return (
        f"{meta:,} meta-parameters, {steps:,} meta-steps of {experiment.tasks_per_step} tasks, "
        f"{inner} inner step{'s' * (inner != 1)}, on {experiment.device}"
    )


def _report(
    experiment: Experiment,
    scores: Scores,
    deployed: Deployment | None,
    ensemble: EnsembleScores | None = None,
) -> str:
    lines = [tables(experiment, scores, ensemble)]
    return "\n".join([*lines, deployment_text(deployed, scores)] if deployed else lines)


def _summary(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    report: str,
    data: Path | None,
    device: str | None,
) -> str:
    def command(what: str, *words: object) -> str:
        where = place_arguments(recipe.allow, data, device)
        return f"  {shlex.join(['metablocks', *map(str, words), *where])}    {what}"

    recipe, path = experiment.recipe, directory.path
    if experiment.learner.max_steps is None:
        longer = 2 * experiment.evaluation.inner_steps
        evaluate = command("more inner steps", "eval", path, "--steps", longer)
    else:
        evaluate = command("more tasks", "eval", path, "--tasks", 2000)
    first = recipe.at("inner.order.block") == "first_order"
    order = "second_order" if first else "first_order"
    words = ("run", directory.recipe, "--set", f"inner.order.block={order}")
    looks_through = recipe.at("outer.estimator.block") not in ("reptile", "implicit")
    orders = [command(f"{order.replace('_', '-')} gradients", *words)]
    return "\n".join(
        [
            "",
            f"best of {state.epochs} epochs by validation: epoch {state.best_epoch}",
            report,
            f"run directory: {path}",
            "to try next:",
            evaluate,
            *(orders if looks_through else []),
            "  metablocks recipes    what else there is",
        ]
    )
