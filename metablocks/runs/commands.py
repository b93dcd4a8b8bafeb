"""The commands `run` and `eval`: from a recipe, or the directory of a run, to printed scores."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from metablocks.errors import BlockError, NonfiniteError, RecipeError, RunError, command
from metablocks.executors import executor_of
from metablocks.memory import keep_freed_memory
from metablocks.processes import joined, leads
from metablocks.recipe import Experiment, Recipe
from metablocks.runs import checkpoint, plots
from metablocks.runs.beginning import prepare
from metablocks.runs.checkpoint import from_first, restore_learner, restore_newest
from metablocks.runs.deployment import Deployment, deployment
from metablocks.runs.directory import RunDirectory
from metablocks.runs.ensemble import ensemble_scores
from metablocks.runs.examples import write_test
from metablocks.runs.loading import build_seeded, open_run, restore_chosen
from metablocks.runs.log import kept_lines
from metablocks.runs.scores import Scores
from metablocks.runs.state import TrainingState
from metablocks.runs.tables import place_arguments, report, summary
from metablocks.runs.tensorboard import curves, summary_writer
from metablocks.runs.train import Stopped, final_scores, train
from metablocks.tasks.base import Split


@joined()
def train_recipe(
    recipe: Recipe,
    *,
    out: Path,
    data: Path | None = None,
    device: str | None = None,
    resume: Path | None = None,
    start: Path | None = None,
    quiet: bool = False,
    save_every: float = 10.0,
    tensorboard: bool = False,
    argv: list[str] | None = None,
) -> int:
    """Train a recipe in a new directory below `out`, or go on with the run in `resume`.

    A new run begins with the weights of the run in `start`, if one is given (see `start_from`).
    `save_every`: minutes between checkpoints within an epoch. `tensorboard`: write the curves into its
    folder `tensorboard`, too.

    The process keeps freed memory from then on (see `keep_freed_memory`), for speed. Returns the exit
    status: 0 when trained and tested, 130 when stopped by a signal.

    Raises `RunError` for a run that another process trains, one whose checkpoint or log is lost, and
    where recipe or data are not those it began with; then every file is as it was.

    Law: nothing finished is written over. A finished run keeps its log as it is.
    """
    keep_freed_memory()
    if tensorboard:
        summary_writer()  # what is missing leaves no directory behind
    experiment, directory, first = prepare(
        recipe, out=out, data=data, device=device, resume=resume, start=start, argv=argv or []
    )
    where = place_arguments(recipe.allow, data, device)
    with _held(directory):
        state = from_first(experiment, first, training=True)
        draws = tensorboard and leads()
        folder = directory.path / "tensorboard"
        watched = curves(folder, state.step) if draws else nullcontext(lambda row: None)
        try:
            with watched as watch:
                train(experiment, directory, state, quiet=quiet, save_every=save_every, watch=watch)
            scores, deployed, ensemble = _test(experiment, directory, state)
        except (Stopped, KeyboardInterrupt) as stop:
            trained = state.epochs == experiment.epochs
            if not trained and not isinstance(stop, Stopped):
                raise
            words = command("run", "--resume", directory.path, *where)
            print(
                f"stopped {'before the test' if trained else f'after meta-step {state.step}'}; "
                f"everything is saved. To go on: {words}"
            )
            return 130
        except NonfiniteError as error:
            words = command("replay", directory.path, "--step", error.step, *where)
            raise RunError(f"{error}. To see where it begins: {words}") from error
        if leads():
            for note in plots.draw(directory):
                print(note)
            text = report(experiment, scores, ensemble, deployed)
            print(summary(experiment, directory, state, text, where))
        return 0


@joined()
def evaluate_run(
    run_dir: Path,
    *,
    allow: Sequence[str] = (),
    checkpoint: str = "best",
    tasks: int | None = None,
    steps: int | None = None,
    split: Split = "test",
    seed: int | None = None,
    data: Path | None = None,
    device: str | None = None,
) -> int:
    """Evaluate a checkpoint of a run on the fixed tasks of a split; print and save the scores.

    `checkpoint` is `best`, `last`, or `ensemble`: the best ones together, where the run kept them.
    `seed`: that of the tasks, the run's own unless given; with another one they are other tasks. The
    scores are a line of `evaluations.jsonl` in the run's folder, if that can be written.

    Raises `RecipeError` as `load_recipe` does, and `RunError` for a record or a checkpoint that cannot
    be read.
    """
    directory, recipe, folder = open_run(run_dir, allow, data)
    own, deployed = recipe.values["seed"], None
    seed = own if seed is None else seed
    experiment = build_seeded(recipe, folder, device, seed)
    try:
        if checkpoint == "ensemble":
            members = from_first(experiment, _members, directory, experiment)
            scores = ensemble_scores(
                experiment, directory, members, split, tasks=tasks, steps=steps
            )
            print(recipe.name)
        else:
            state = from_first(experiment, restore_chosen, directory, checkpoint, experiment)
            scores = final_scores(experiment, split, tasks=tasks, steps=steps)
            deployed = _deployment(experiment, scores)
            print(f"{recipe.name}, {checkpoint} checkpoint (epoch {state.epochs})")
    except BlockError as error:
        if steps is None:
            raise
        raise RecipeError(f"--steps {steps}: {error}") from error
    if seed != own:
        print(
            f"the {split} tasks of seed {seed}; the run was trained and tested on those of seed {own}"
        )
    if not leads():
        return 0
    print(report(experiment, scores, deployed=deployed))
    row = {"checkpoint": checkpoint, "seed": seed, "scores": scores.as_dict(by_task=True)}
    try:
        directory.append(directory.evaluations, row)
        print(f"saved in {directory.evaluations}")
    except RunError as error:
        print(f"not saved: {error}")
    return 0


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    """The directory locked, and what is printed kept there: by the process that writes in it."""
    if not leads():
        yield
        return
    with directory.locked(), kept_lines(directory.log):
        yield


def _members(directory: RunDirectory, experiment: Experiment) -> list[int]:
    """The epochs of the ensemble, as the last checkpoint has them."""
    if experiment.evaluation.ensemble == 1:
        raise RecipeError(
            f"--checkpoint ensemble: {directory.path} kept one checkpoint, the best; to keep more, "
            "train with evaluation.ensemble above 1"
        )
    members = restore_newest(directory, experiment, restore_learner)[0].members
    if not members:
        raise RunError(f"{directory.path}: no epoch was validated yet; take --checkpoint last")
    return members


def _test(
    experiment: Experiment, directory: RunDirectory, state: TrainingState
) -> tuple[Scores, Deployment | None, Scores | None]:
    """Test the best checkpoint, and the best ones together; the last line of the log, once."""
    from_first(experiment, checkpoint.restore_best, directory, experiment, state)
    scores, ensemble = final_scores(experiment, "test"), None
    row = {"test": scores.as_dict(by_task=True)}
    deployed = _deployment(experiment, scores)  # of the best one: the ensemble restores others
    if deployed and deployed.reductions:
        row["deployment"] = deployed.as_dict()
    tested = not leads() or directory.tested  # the same, unless versions or devices have changed
    if not tested:
        write_test(directory.test, experiment, scores)
    if experiment.evaluation.ensemble > 1:
        ensemble = ensemble_scores(experiment, directory, state.members, "test")
        row["ensemble"] = ensemble.as_dict()
    if not tested:
        directory.append(directory.metrics, row)
    return scores, deployed, ensemble


def _deployment(experiment: Experiment, scores: Scores) -> Deployment | None:
    """The deployable model's figures, in the process that writes them: it judges all tasks itself."""
    if not leads():
        return None
    learner = copy.copy(experiment.learner)  # the same parameters
    learner.executor = executor_of(learner)
    return deployment(replace(experiment, learner=learner), scores)
