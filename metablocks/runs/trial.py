"""One meta-step and one evaluation of a recipe, on a task or two, as `metablocks check` takes them."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from metablocks.errors import DataError, MetablocksError, RecipeError, RunError, first_line
from metablocks.generators import kept_draws
from metablocks.gradcheck.shrink import made_up, shrink_steps
from metablocks.recipe import Experiment, Recipe, build
from metablocks.runs.train import final_scores, meta_step
from metablocks.tasks.base import TaskSource
from metablocks.tasks.image_sets import ImageSet
from metablocks.types import Progress

_TASKS = 2
_FEWER = {"shots": 2, "queries": 2}


def try_out(recipe: Recipe, *, device: str | None = None, data: Path | None = None) -> str:
    """Take the first meta-step and one evaluation, and say in a line what came of them.

    The model and everything else are as large as in a run, except for the number of tasks (2), of
    examples in the tasks of shipped sources, and of inner steps (at most 3). Nothing is compiled. Image
    sets are read if `data` is given; otherwise they are looked for, and made-up inputs of their shapes
    take their place, as for a source whose data is not here. A loss that is not finite is said, and is
    no error.

    >>> from metablocks.recipe import load
    >>> print(try_out(load("maml_sinusoid"), device="cpu"))  # doctest: +ELLIPSIS
    a meta-step on 2 tasks, loss ...; an evaluation of 2, mse ...

    Raises `RecipeError`, with its place, for what fails, and `DataError` for a `data` folder without
    the data.
    """
    experiment = _brief(recipe, device, data)
    count, words = experiment.tasks_per_step, ""
    if data is None and (reason := _without_data(experiment.source, recipe)):
        experiment = replace(experiment, source=made_up(experiment.source, shots=1, queries=1))
        words = f"; on made-up inputs: {reason}"
    what, loss = "the first meta-step", "not finite"
    try:
        with kept_draws():
            torch.manual_seed(recipe.at("seed"))
            try:
                loss = f"{float(meta_step(experiment, 0, Progress()).loss):.4g}"
            except RunError as error:
                words = f"; {error}{words}"
            what = "the test's first task"
            experiment.source.sample("test", [0])
            what = "the evaluation"
            scores = final_scores(experiment, "validation", tasks=count)
    except DataError:
        raise
    except Exception as error:
        raise _failed(recipe, "inner", what, error) from error
    tasks = f"{count} task{'' if count == 1 else 's'}"
    return (
        f"a meta-step on {tasks}, loss {loss}; an evaluation of {count}, {scores.measure} "
        f"{scores.mean[0]:.3g} → {scores.mean[-1]:.3g}{words}"
    )


def _brief(recipe: Recipe, device: str | None, data: Path | None) -> Experiment:
    """The recipe's experiment with fewer tasks, examples and inner steps, not compiled."""
    values = copy.deepcopy(recipe.values)
    shrink_steps(values)
    tasks, executor = values["tasks"], values["hardware"]["executor"]
    if ":" not in tasks["block"]:
        tasks.update(
            {
                name: min(most, tasks[name])
                for name, most in _FEWER.items()
                if isinstance(tasks.get(name), int)  # a range stays
            }
        )
    if ":" not in executor["block"]:
        executor["compile"] = False
    experiment = build(replace(recipe, values=values), device=device, data=data)
    return replace(experiment, tasks_per_step=min(_TASKS, experiment.tasks_per_step))


def _without_data(source: TaskSource, recipe: Recipe) -> str | None:
    """The reason why it gives no task here, if so; an image set is looked for, but not read."""
    if isinstance(source, ImageSet):
        return source.storage.whereabouts()
    try:
        source.sample("train", [0])
    except DataError as error:
        return first_line(error)
    except Exception as error:
        raise _failed(recipe, "tasks", "the task source", error) from error
    return None


def _failed(recipe: Recipe, path: str, what: str, error: Exception) -> RecipeError:
    own = isinstance(error, MetablocksError)
    words = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
    return RecipeError(str(recipe.problem(path, f"{what} fails: {words}")))
