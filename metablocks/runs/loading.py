"""A run in Python: its trained learner, its tasks and its recipe."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from metablocks.checks import checked
from metablocks.errors import RecipeError
from metablocks.learner import MetaLearner
from metablocks.recipe import Recipe, build
from metablocks.runs.commands import data_of, load_recipe, restore_chosen
from metablocks.runs.directory import RunDirectory
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
    directory = RunDirectory(run_dir)
    recipe = load_recipe(run_dir, allow=allow)
    data = data or data_of(directory.read_record())
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
