"""The beginning of a run, and its going on: choices, checks and files before it trains."""

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from metablocks.errors import DamagedError, RecipeError, RunError, TaskError
from metablocks.executors import Distributed, Share, Vmap, executor_of, share_of
from metablocks.processes import launch, launched, leads
from metablocks.recipe import Experiment, Recipe, from_text
from metablocks.recipe.record import changes_text, leaves
from metablocks.runs import checkpoint
from metablocks.runs.checkpoint import from_first, start_from
from metablocks.runs.directory import RunDirectory, create, environment
from metablocks.runs.files import write_text, writing
from metablocks.runs.loading import build_seeded, load_recipe
from metablocks.runs.state import TrainingState
from metablocks.runs.tables import facts, transductive
from metablocks.runs.train import training_tasks
from metablocks.tuning import AutoExecutor
from metablocks.types import TaskList, Tasks

_log = logging.getLogger(__name__)


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    data: Path | None,
    device: str | None,
    resume: Path | None,
    start: Path | None,
    argv: Sequence[str],
) -> tuple[Experiment, RunDirectory, Callable[[], TrainingState]]:
    """The experiment of a run, its directory, and what is to be done there before it trains.

    It is the run in `resume`, or one that this `torchrun` has begun before, or a new one below `out`.
    """
    share = Distributed() if launched() else Share()
    if resume is None:
        resume = share.from_first(partial(_begun_before, out))
        recipe = recipe if resume is None else load_recipe(resume, (), recipe.allow)
    if resume is not None:
        directory = RunDirectory(resume)
        if leads():
            directory.check_resumable()
        experiment = build_seeded(recipe, data, device)
        return experiment, directory, partial(_go_on, experiment, directory)
    experiment, known = _new(recipe, start, data, device)
    name = Path(recipe.source).stem
    directory = RunDirectory(share.from_first(lambda: create(out, name).path))
    return experiment, directory, partial(_begin, experiment, directory, known, argv)


def _new(
    recipe: Recipe, start: Path | None, data: Path | None, device: str | None
) -> tuple[Experiment, dict[str, Any]]:
    """The experiment of a new run, and what its record says of it; nothing is written yet.

    That is the reason of the executor, if one was to be chosen by measuring; the weights of the run
    in `start`, which are taken; and the data, which is looked at.
    """
    experiment, known = build_seeded(recipe, data, device), dict[str, Any](executor=None)
    share = share_of(experiment.learner.executor)
    if isinstance(executor_of(experiment.learner), AutoExecutor):
        overrides, known["executor"] = share.from_first(partial(_chosen_executor, experiment))
        recipe = from_text(recipe.to_yaml(), recipe.source, overrides, recipe.allow)
        experiment = build_seeded(recipe, data, device)
    if start:
        known["from"] = from_first(experiment, start_from, RunDirectory(start), experiment)
    tasks = training_tasks(experiment, 0)
    known["data"] = share.from_first(partial(_checked_data, experiment, tasks))
    return experiment, known


def _begin(
    experiment: Experiment, directory: RunDirectory, known: dict[str, Any], argv: Sequence[str]
) -> TrainingState:
    """Write what is known before training, the checkpoint at meta-step 0 included.

    What fails leaves no directory behind.
    """
    recipe, origin = experiment.recipe, known.get("from")
    record = {
        "recipe": recipe.hash,
        "source": recipe.source,
        "origins": recipe.origins,
        "allow": list(recipe.allow),
        "code": _outside_code(recipe.values),
        "seed": recipe.values["seed"],
        "argv": argv,
        "executor": known["executor"],
        "started": _now(),
        "launch": launch()[0],
        "data": known["data"],
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
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(directory.path, ignore_errors=True)
        raise
    _print_head(experiment, directory)
    if origin:
        parts = " and ".join(origin["weights"])
        print(f"weights of {parts}: {origin['checkpoint']}, epoch {origin['epoch']}", flush=True)
    return state


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


def _outside_code(values: dict[str, Any]) -> dict[str, dict[str, str]]:
    """File and SHA-256 of the module of every block from outside, by the name of the module."""
    code: dict[str, dict[str, str]] = {}
    for path, name in leaves(values):
        module, outside, _ = str(name).partition(":")
        file = getattr(sys.modules.get(module), "__file__", None)
        if path.endswith("block") and outside and file and Path(file).is_file():
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            code[module] = {"file": str(Path(file).resolve()), "sha256": digest}
    return code


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
