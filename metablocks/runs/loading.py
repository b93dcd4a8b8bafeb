"""A run, opened again: its recipe, its data, its learner; `load_run` is that in Python."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from metablocks.checks import checked
from metablocks.errors import RecipeError, RunError, command
from metablocks.executors import Distributed
from metablocks.learner import MetaLearner
from metablocks.processes import check_device, launched
from metablocks.recipe import Experiment, Recipe, build, load
from metablocks.runs.checkpoint import restore_learner, restore_newest
from metablocks.runs.directory import RunDirectory
from metablocks.runs.state import TrainingState
from metablocks.tasks.base import TaskSource


class LoadedRun(NamedTuple):
    """The result of `load_run`.

    >>> import metablocks as mb
    >>> mb.LoadedRun._fields
    ('learner', 'source', 'recipe')
    """

    learner: MetaLearner
    source: TaskSource
    recipe: Recipe


@checked()
def load_run(
    folder: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    allow: Sequence[str] = (),
    data: str | Path | None = None,
    device: torch.device | str | None = None,
) -> LoadedRun:
    """The learner of a run as its checkpoint has it, the source of its tasks, and its recipe.

    `checkpoint`: `"best"` by validation, or the `"last"`. `allow` names the packages that outside
    blocks may come from (this runs their code). `data` is the folder of the data set, that of the run
    unless given, and `device` stands in for the recipe's.

    Law: `learner.evaluate` on `source.sample("test", …)` scores what the run's own test did.

    >>> import contextlib, io, pathlib, tempfile
    >>> import metablocks as mb
    >>> from metablocks.cli import main            # or in a shell: metablocks run maml_sinusoid
    >>> few = "outer.epochs=1", "outer.steps_per_epoch=1", "evaluation.tasks=2"
    >>> options = [word for change in few for word in ("--set", change)]
    >>> with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
    ...     status = main(["run", "maml_sinusoid", "--quiet", "--out", out, *options])
    ...     learner, source, recipe = mb.load_run(*pathlib.Path(out).iterdir())
    >>> task = source.sample("test", [0])[0]
    >>> learner.adapt(task.support)(task.query[0]).shape
    torch.Size([5, 1])

    Raises `RecipeError` for what is not the folder of a run, and for a recipe that cannot be built here,
    `RunError` for a record or checkpoint that cannot be read, and `DataError` for a `data` without the
    data.
    """
    run_dir = Path(os.path.expanduser(folder))
    check_run(run_dir)
    directory, recipe, data = open_run(run_dir, allow, data)
    experiment = build(recipe, device=device, data=data)
    restore_chosen(directory, checkpoint, experiment)
    return LoadedRun(experiment.learner, experiment.source, recipe)


def check_run(run_dir: Path) -> None:
    """Raise `RecipeError` for a path that is not the folder of a run."""
    if not run_dir.is_dir():
        raise RecipeError(
            f"{run_dir}: no such folder; give one that metablocks run has written, such as "
            "runs/<name>-<time>"
        )
    if not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir}: has no recipe.yaml; it is not the folder of a run")


def open_run(
    run_dir: Path, allow: Sequence[str], data: str | Path | None
) -> tuple[RunDirectory, Recipe, str | Path | None]:
    """A run's directory, its recipe, and the folder of its data: `data`, or where that was.

    Raises `RecipeError` as `load_recipe` does, and `RunError` for a record that cannot be read.
    """
    directory = RunDirectory(run_dir)
    folder = directory.read_record()["data"].get("folder")
    recipe = load_recipe(run_dir, allow=allow)
    there = isinstance(folder, str) and Path(folder).is_dir()
    return directory, recipe, data or (folder if there else None)


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
    """The packages that `run.json` lists as allowed, for a message: only possible names of packages."""
    try:
        names = directory.read_record().get("allow")
    except RunError:
        return []
    return [
        name
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
    ]


def build_seeded(
    recipe: Recipe, data: str | Path | None, device: str | None, task_seed: int | None = None
) -> Experiment:
    """The experiment of a recipe, and the random state with which its training begins.

    Its tasks are divided among the processes that torchrun has started, if any.
    """
    experiment = build(recipe, device=device, data=data, task_seed=task_seed)
    if launched():
        check_device(experiment.device)
        experiment.learner.executor = Distributed(experiment.learner.executor)
    torch.manual_seed(recipe.values["seed"])
    return experiment


def restore_chosen(directory: RunDirectory, which: str, experiment: Experiment) -> TrainingState:
    """The learner as the `best` or the `last` checkpoint of a run has it.

    Raises `RunError` for a checkpoint that cannot be read, or is not there.
    """
    if which == "last":
        return restore_newest(directory, experiment, restore_learner)[0]
    path = directory.checkpoint(which)
    if not path.is_file() and directory.checkpoint("last").is_file():
        words = command("eval", directory.path, "--checkpoint", "last")
        raise RunError(
            f"{path}: no such checkpoint, as before a first validation; the last is there: {words}, "
            'or load_run(…, checkpoint="last")'
        )
    return restore_learner(path, experiment)
