"""The commands `run` and `eval`: from a recipe, or the directory of a run, to printed scores."""

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metablocks.errors import (
    BlockError,
    DamagedError,
    NonfiniteError,
    RecipeError,
    RunError,
    TaskError,
    command,
)
from metablocks.executors import Distributed, Share, Vmap, executor_of, share_of
from metablocks.memory import keep_freed_memory
from metablocks.processes import check_device, joined, launch, launched, leads
from metablocks.recipe import Experiment, Recipe, build, from_text, load
from metablocks.recipe.record import changes_text, leaves
from metablocks.runs import checkpoint, plots
from metablocks.runs.checkpoint import from_first, restore_learner, restore_newest, start_from
from metablocks.runs.deployment import Deployment, deployment
from metablocks.runs.directory import RunDirectory, create, environment
from metablocks.runs.ensemble import ensemble_scores
from metablocks.runs.examples import write_test
from metablocks.runs.files import write_text, writing
from metablocks.runs.log import kept_lines
from metablocks.runs.scores import Scores
from metablocks.runs.state import TrainingState
from metablocks.runs.tables import facts, place_arguments, report, summary, transductive
from metablocks.runs.tensorboard import curves, summary_writer
from metablocks.runs.train import Stopped, final_scores, train, training_tasks
from metablocks.tasks.base import Split
from metablocks.tuning import AutoExecutor
from metablocks.types import TaskList, Tasks

_log = logging.getLogger(__name__)


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
    where = place_arguments(recipe.allow, data, device)
    finish = partial(
        _train, where=where, save_every=save_every, quiet=quiet, tensorboard=tensorboard
    )
    share = Distributed() if launched() else Share()
    if resume is None:  # torchrun may have started this again
        resume = share.from_first(partial(_begun_before, out))
        recipe = recipe if resume is None else load_recipe(resume, (), recipe.allow)
    if resume is not None:
        directory = RunDirectory(resume)
        if leads():
            directory.read_record()
            directory.check_resumable()
        with _held(directory):
            experiment = build_seeded(recipe, data, device)
            going_on = partial(_go_on, experiment, directory)
            state = checkpoint.from_first(experiment, going_on, training=True)
            return finish(experiment, directory, state)
    experiment = build_seeded(recipe, data, device)
    executor: str | None = None
    if isinstance(executor_of(experiment.learner), AutoExecutor):
        overrides, executor = share.from_first(partial(_chosen_executor, experiment))
        recipe = from_text(recipe.to_yaml(), recipe.source, overrides, recipe.allow)
        experiment = build_seeded(recipe, data, device)
    origin = None
    if start:
        starting = partial(start_from, RunDirectory(start), experiment)
        origin = checkpoint.from_first(experiment, starting)
    tasks = training_tasks(experiment, 0)  # data that fails leaves no directory behind
    data_record = share.from_first(partial(_checked_data, experiment, tasks))
    name = Path(recipe.source).stem
    directory = RunDirectory(share.from_first(lambda: create(out, name).path))
    with _held(directory):
        beginning = partial(
            _begin, experiment, directory, argv or [], executor, origin, data_record
        )
        state = checkpoint.from_first(experiment, beginning, training=True)
        return finish(experiment, directory, state)


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
    directory = RunDirectory(run_dir)
    record = directory.read_record()
    recipe = load_recipe(run_dir, allow=allow)
    own = recipe.values["seed"]
    seed = own if seed is None else seed
    data, deployed = data or data_of(record), None
    experiment = _over_processes(build(recipe, device=device, data=data, task_seed=seed))
    try:
        if checkpoint == "ensemble":
            members = from_first(experiment, partial(_members, directory, experiment))
            scores = ensemble_scores(
                experiment, directory, members, split, tasks=tasks, steps=steps
            )
            print(recipe.name)
        else:
            restore = partial(_restore_chosen, directory, checkpoint, experiment)
            state = from_first(experiment, restore)
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


def _restore_chosen(directory: RunDirectory, which: str, experiment: Experiment) -> TrainingState:
    if which == "last":
        return restore_newest(directory, experiment, restore_learner)[0]
    return restore_learner(directory.checkpoint(which), experiment)


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


def build_seeded(recipe: Recipe, data: Path | None, device: str | None) -> Experiment:
    """The experiment of a recipe, and the random state with which its training begins."""
    experiment = _over_processes(build(recipe, device=device, data=data))
    torch.manual_seed(recipe.values["seed"])
    return experiment


def _over_processes(experiment: Experiment) -> Experiment:
    """The experiment with its tasks divided among the processes that torchrun has started, if any."""
    if launched():
        check_device(experiment.device)
        experiment.learner.executor = Distributed(experiment.learner.executor)
    return experiment


@contextmanager
def _held(directory: RunDirectory) -> Iterator[None]:
    """The directory locked, and what is printed kept there: by the process that writes in it."""
    if not leads():
        yield
        return
    with directory.locked(), kept_lines(directory.log):
        yield


def _begun_before(out: Path) -> Path | None:
    """The run that this `torchrun` began, in processes that it has restarted since."""
    name, restarted = launch()
    if name is None or not restarted:
        return None
    begun = []
    for path in out.glob("*/run.json"):
        with suppress(RunError):
            record = RunDirectory(path.parent).read_record()
            if record.get("launch") == name:
                begun.append((str(record.get("started")), path.parent))
    return max(begun)[1] if begun else None


def _chosen_executor(experiment: Experiment) -> tuple[list[str], str]:
    """Overrides that state the fastest executor on the first tasks in place of `auto`, and why."""
    recipe, learner = experiment.recipe, experiment.learner
    tasks, auto = training_tasks(experiment, 0), executor_of(learner)
    with experiment.precision():
        choice = auto.choose(learner, tasks)
    _log.info("executor: %s", choice.reason)
    blocks = {"hardware.executor": (type(choice.executor).__name__.lower(), choice.executor)}
    if choice.estimator != learner.estimator:
        blocks["outer.estimator"] = (recipe.at("outer.estimator.block"), choice.estimator)
    overrides = [
        f"{path}={json.dumps({'block': name} | asdict(block))}"
        for path, (name, block) in blocks.items()
    ]
    return overrides, choice.reason


def _begin(
    experiment: Experiment,
    directory: RunDirectory,
    argv: list[str],
    executor: str | None,
    origin: dict[str, Any] | None,
    data: dict[str, Any],
) -> TrainingState:
    """Write what is known before training, the checkpoint at meta-step 0 included.

    What fails leaves no directory behind.
    """
    recipe = experiment.recipe
    record = {
        "recipe": recipe.hash,
        "source": recipe.source,
        "origins": recipe.origins,
        "allow": list(recipe.allow),
        "code": _outside_code(recipe.values),
        "seed": recipe.values["seed"],
        "argv": argv,
        "executor": executor,
        "started": _now(),
        "launch": launch()[0],
        "data": data,
        "transductive": transductive(experiment),
        **_circumstances(experiment),
        **({"from": origin} if origin else {}),
        "resumed": [],
    }
    state = TrainingState()
    try:
        directory.write_record(record)
        write_text(directory.recipe, recipe.to_yaml())
        checkpoint.save(directory.checkpoint("last"), experiment, state)
    except RunError:
        shutil.rmtree(directory.path, ignore_errors=True)
        raise
    _print_head(experiment, directory)
    if origin:
        parts = " and ".join(origin["weights"])
        print(f"weights of {parts}: {origin['checkpoint']}, epoch {origin['epoch']}", flush=True)
    return state


def _outside_code(values: Any) -> dict[str, dict[str, str]]:
    """File and SHA-256 of the module of every block from outside, by the name of the module."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {}
    code: dict[str, dict[str, str]] = {}
    name = values.get("block")
    if isinstance(name, str) and ":" in name:
        module = name.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None)
        if file and Path(file).is_file():
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            code[module] = {"file": str(Path(file).resolve()), "sha256": digest}
    for value in values.values():
        code |= _outside_code(value)
    return code


def _go_on(experiment: Experiment, directory: RunDirectory) -> TrainingState:
    """The state at the last checkpoint; deletes what does not count, of a run that is not finished.

    Raises `RunError`, with nothing deleted, where recipe, data, checkpoint or log do not fit.
    """
    path, last, record = directory.path, directory.checkpoint("last"), directory.read_record()
    known, now = record["data"].get("checksum"), _data_record(experiment).get("checksum")
    if known != now:
        raise RunError(f"{path} was trained on other data: checksum {known}, here {now}")
    state = TrainingState()
    try:
        state, used = checkpoint.restore_newest(directory, experiment)
        directory.check_log(state.epochs, used)
        if used != last and last.exists():
            with writing(last):
                last.replace(last.with_suffix(".damaged"))
    except DamagedError as error:
        if directory.finished or "from" in record:
            raise
        _log.warning("%s; nothing was finished, and the run begins again", error)
        checkpoint.check_recipe(directory.record, record["recipe"], experiment.recipe)
        checkpoint.save(last, experiment, state)
    directory.keep_epochs(directory.epochs_logged if directory.tested else state.epochs)
    directory.keep_members({*state.members, *state.kept})
    _print_head(experiment, directory)
    if state.epochs < experiment.epochs:
        _note_changes(experiment, directory, record, state)
        print(f"going on after meta-step {state.step} of epoch {state.epochs + 1}", flush=True)
    return state


def _note_changes(
    experiment: Experiment, directory: RunDirectory, record: dict[str, Any], state: TrainingState
) -> None:
    """Note in `run.json` and say once what is not as it was: epochs, code, versions, machine."""
    recipe, now = experiment.recipe, _circumstances(experiment)
    before = dict(leaves({key: record[key] for key in now if key in record}))
    for entry in record["resumed"]:
        before |= {path: new for path, (_, new) in entry["changed"].items()}
    changes = [(p, before[p], new) for p, new in leaves(now) if before.get(p, new) != new]
    if record["recipe"] not in (recipe.hash, recipe.written_hash):
        write_text(directory.recipe, recipe.to_yaml())
        record["recipe"] = recipe.hash
        directory.write_record(record)
    if changes:
        print(f"note: not as before: {changes_text(changes)}", flush=True)
        changed = {path: [old, new] for path, old, new in changes}
        entry = {"time": _now(), "step": state.step, "changed": changed}
        record["resumed"].append(entry)
        directory.write_record(record)


def _circumstances(experiment: Experiment) -> dict[str, Any]:
    """The length of a training, and its environment: what may change when it goes on."""
    count = share_of(experiment.learner.executor).processes
    return {"epochs": experiment.epochs, "processes": count, **environment(experiment.device)}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _print_head(experiment: Experiment, directory: RunDirectory) -> None:
    name, about = experiment.recipe.name, facts(experiment)
    print(f"{name}\n{about}\nrun directory: {directory.path}", flush=True)


def _train(
    experiment: Experiment,
    directory: RunDirectory,
    state: TrainingState,
    *,
    where: Sequence[str],
    save_every: float,
    quiet: bool,
    tensorboard: bool,
) -> int:
    """Train to the end, test, draw, print the summary; returns the exit status.

    `where`: the arguments of the commands that it prints.
    """
    folder = directory.path / "tensorboard"
    draws = tensorboard and leads()
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
    if not leads():
        return 0
    for note in plots.draw(directory):
        print(note)
    text = report(experiment, scores, ensemble, deployed)
    print(summary(experiment, directory, state, text, where))
    return 0


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
    best = partial(checkpoint.restore_best, directory, experiment, state)
    checkpoint.from_first(experiment, best)
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
    learner = experiment.learner
    executor, learner.executor = learner.executor, executor_of(learner)
    try:
        return deployment(experiment, scores)
    finally:
        learner.executor = executor


def _checked_data(experiment: Experiment, tasks: Tasks) -> dict[str, Any]:
    """The record of the data, after a look at its first training `tasks` and at one of each other split.

    Raises `RecipeError` for a source that cannot give them, and for tasks of unequal size that the
    executor does not take.
    """
    listed = isinstance(tasks, TaskList) and isinstance(TaskList.gather(tasks), TaskList)
    if listed and isinstance(executor_of(experiment.learner), Vmap):
        message = "vmap takes tasks of one size, and these are not; take the block loop"
        raise RecipeError(str(experiment.recipe.problem("hardware.executor", message)))
    try:
        for split in ("validation", "test"):
            experiment.source.sample(split, [0])
        return _data_record(experiment)
    except TaskError as error:
        raise RecipeError(str(experiment.recipe.problem("tasks", str(error)))) from error


def _data_record(experiment: Experiment) -> dict[str, Any]:
    """Checksum and folder of the data that tasks are made of; nothing if they are not of files."""
    checksum = getattr(experiment.source, "checksum", None)
    if checksum is None:
        return {}
    folder = getattr(experiment.source, "data", None)
    return {"checksum": checksum, "folder": str(Path(folder).resolve()) if folder else None}


def data_of(record: dict[str, Any]) -> Path | None:
    """The folder of the data that a run was trained on, if it is still there."""
    folder = record["data"].get("folder")
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None
