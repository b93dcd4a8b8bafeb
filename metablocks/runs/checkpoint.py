"""Checkpoints: all that training needs to go on, bit for bit, as tensors and plain values.

A checkpoint is sealed by its checksum (`sealed`), and holds the values of its recipe. Format 2, which
older versions wrote, is not sealed, and holds the hash of the recipe.
"""

import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metablocks.errors import DamagedError, RunError, command, first_line
from metablocks.executors import share_of
from metablocks.recipe import Experiment, Recipe
from metablocks.recipe.record import changes_text, differing, shown_value
from metablocks.runs.directory import RunDirectory
from metablocks.runs.files import write_atomically
from metablocks.runs.sealed import read_sealed, write_sealed
from metablocks.runs.state import TrainingState

_log = logging.getLogger(__name__)

FORMAT = 3
_READ = (2, FORMAT)
_T = TypeVar("_T")


def save(
    path: Path, experiment: Experiment, state: TrainingState, *, before: Path | None = None
) -> None:
    """Write parameters, optimiser, schedule, random states, counters, choices, in one go.

    The file that is replaced is kept as `before`, if that is given.
    """

    def write(file: BinaryIO) -> None:
        content = {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "recipe": experiment.recipe.values,
            **_entries(experiment),
            "state": asdict(state),
        }
        write_sealed(file, content)

    write_atomically(path, write, before=before)


def restore(path: Path, experiment: Experiment) -> TrainingState:
    """Put a checkpoint into a freshly built experiment, and the random states back.

    An experiment of more epochs goes on with the rates of its own, longer schedule.

    Raises `DamagedError` for a file that is absent or not a whole checkpoint, and `RunError` for one
    of another format or recipe, and for entries that do not fit the experiment.
    """
    content = _read(path, experiment.recipe)
    _check_entries(path, content, experiment)
    state: TrainingState = content["state"]
    length = experiment.steps_per_epoch
    if state.epochs < 0 or not 0 <= state.step - state.epochs * length <= length:
        counters = f"{state.step} meta-steps after {state.epochs} epochs of {length} each"
        raise _unfit(path, f"state: {counters}")
    _set_random_states(path, content["random"], experiment.device)
    _restore_learner(path, content, experiment)
    recipe, scheduler = content["recipe"], experiment.scheduler
    epochs = recipe["outer"]["epochs"] if isinstance(recipe, dict) else experiment.epochs
    try:
        experiment.optimizer.load_state_dict(content["optimizer"])
        if scheduler and epochs != experiment.epochs:
            _step_schedule(experiment.optimizer, scheduler, state.epochs)
        elif scheduler:
            scheduler.load_state_dict(content["scheduler"])
    except Exception as error:
        raise _unfit(path, first_line(error)) from error
    return state


def from_first(
    experiment: Experiment, restore: Callable[..., _T], *args: Any, training: bool = False
) -> _T:
    """`restore(*args)` in the first process of a distributed learner, which alone has files to do with.

    All processes get what it returns, and the learner's state there; in `training`, too, that of
    optimiser, schedule and random generators. A process by itself restores, no more.
    """
    share = share_of(experiment.learner.executor)
    if share.processes == 1:
        return restore(*args)

    def states() -> tuple[_T, bytes]:
        value, file = restore(*args), io.BytesIO()
        entries = _entries(experiment)
        torch.save(entries if training else {"learner": entries["learner"]}, file)
        return value, file.getvalue()

    value, content = share.from_first(states)
    entries = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    experiment.learner.load_state_dict(entries["learner"])
    if training:
        experiment.optimizer.load_state_dict(entries["optimizer"])
        if experiment.scheduler:
            experiment.scheduler.load_state_dict(entries["scheduler"])
        _set_random_states(Path("rank 0"), entries["random"], experiment.device)
    return value


def restore_learner(path: Path, experiment: Experiment) -> TrainingState:
    """Put only the learner's parameters back, for evaluation. Raises as `restore` does."""
    return _restore_learner(path, _read(path, experiment.recipe), experiment)


def read_state(path: Path, recipe: Recipe) -> TrainingState:
    """The counters and scores of a checkpoint. Raises as `restore` does."""
    state: TrainingState = _read(path, recipe)["state"]
    return state


def restore_newest(
    directory: RunDirectory,
    experiment: Experiment,
    restore: Callable[[Path, Experiment], TrainingState] = restore,
) -> tuple[TrainingState, Path]:
    """Put back the last checkpoint, or if it is damaged the one before, with a message; and its path.

    Raises as `restore` does.
    """
    last, previous = directory.checkpoint("last"), directory.checkpoint("previous")
    try:
        return restore(last, experiment), last
    except DamagedError as error:
        if not previous.is_file():
            raise
        try:
            state = restore(previous, experiment)
        except DamagedError as other:
            raise DamagedError(f"{error}; and {other}") from None
        _log.warning("%s; the checkpoint before it is used: %s", error, previous)
        return state, previous


def restore_best(directory: RunDirectory, experiment: Experiment, state: TrainingState) -> None:
    """Put back the learner of the best epoch, from whichever whole checkpoint is of that epoch.

    Raises `DamagedError`, naming `best.pt`, if there is none.
    """
    best = directory.checkpoint("best")
    others = [directory.member(state.best_epoch or 0)]
    others += [directory.checkpoint(which) for which in ("last", "previous")]
    problem = None
    for path in (best, *others):
        try:
            if restore_learner(path, experiment).epochs == state.best_epoch:
                if problem:
                    _log.warning("%s; %s is of the same epoch and is used", problem, path)
                return
            problem = problem or f"{path}: not of epoch {state.best_epoch}, the best"
        except DamagedError as error:
            problem = problem or str(error)
    words = command("eval", directory.path, "--checkpoint", "last")
    raise DamagedError(f"{problem}; the last checkpoint is evaluated by {words}")


def start_from(directory: RunDirectory, experiment: Experiment) -> dict[str, Any]:
    """Put the weights of a run into an experiment, and return which they are, for `run.json`.

    They are the model's at its best epoch (before the first validation, at the last checkpoint); if
    rule and inner steps of both recipes are equal, what the rule has learned is among them.

    Raises as `restore` does, but for the recipe, which may be another.
    """
    path = directory.checkpoint("best")
    path = path if path.is_file() else directory.checkpoint("last")
    content = _load(path)
    own, recipe = experiment.learner.state_dict(), content["recipe"]
    _check(path, content["learner"], {}, "learner")
    same_rule = isinstance(recipe, dict) and not any(
        field.startswith(("inner.rule", "inner.steps"))
        for field, *_ in differing(recipe, experiment.recipe.values)
    )
    parts = ("model.", "rule.") if same_rule else ("model.",)
    weights = {n: tensor for n, tensor in content["learner"].items() if n.startswith(parts)}
    content["learner"] = {**own, **weights}
    state = _restore_learner(path, content, experiment)
    for name in own.keys() - weights.keys():
        if name.startswith(parts):
            raise _unfit(path, f"learner.{name} is missing")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "checkpoint": str(path.resolve()),
        "sha256": digest,
        "epoch": state.epochs,
        "step": state.step,
        "weights": [part.removesuffix(".") for part in parts],
    }


def check_recipe(path: Path, recorded: Any, recipe: Recipe) -> None:
    """Raise `RunError`, with what differs, unless `recorded` is the recipe: by its values, or hash.

    A recipe of more epochs, and else the same, is the recipe.
    """
    if isinstance(recorded, dict):
        changes = [
            (field, its, given)
            for field, its, given in recipe.changes_of(recorded)
            if not (field == "outer.epochs" and isinstance(its, int) and its < given)
        ]
        if not changes:
            return
        what = changes_text(changes)
    elif recorded in (recipe.hash, recipe.written_hash):
        return
    else:
        what = f"hash {shown_value(recorded)[:12]} → {recipe.hash[:12]}"
    raise RunError(
        f"{path} was written with another recipe ({what}); a run goes on with the recipe it "
        "started with, or with more outer.epochs. Weights are taken over into a run of another by "
        f"{command('run', 'RECIPE', '--from', path.parent)}"
    )


def _entries(experiment: Experiment) -> dict[str, Any]:
    """The states that training changes, besides its counters."""
    scheduler = experiment.scheduler
    return {
        "learner": experiment.learner.state_dict(),
        "optimizer": experiment.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "random": _random_states(experiment.device),
    }


def _read(path: Path, recipe: Recipe) -> dict[str, Any]:
    """The content of a checkpoint of this recipe."""
    content = _load(path)
    check_recipe(path, content["recipe"], recipe)
    return content


def _load(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint, its counters as a `TrainingState`."""
    content, sealed = read_sealed(path)
    if not isinstance(content["format"], int) or content["format"] not in _READ:
        found = shown_value(content["format"])[:20]
        raise RunError(
            f"{path}: a checkpoint of format {found}; this version of metablocks reads "
            f"formats {' and '.join(map(str, _READ))}. The version that wrote it is in "
            f"{path.with_name('run.json')}"
        )
    if content["format"] == FORMAT and not sealed:
        raise DamagedError(f"{path}: not a whole checkpoint: its last line, the checksum, is gone")
    missing = {"recipe", "state", "learner", "optimizer", "scheduler", "random"} - content.keys()
    if missing:
        raise _unfit(path, f"{', '.join(sorted(missing))} missing")
    try:
        state = TypeAdapter(TrainingState).validate_python(content["state"])
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, ("state", *wrong["loc"])))
        raise _unfit(path, f"{place}: {wrong['msg']}") from error
    return {**content, "state": state}


def _step_schedule(optimizer: Optimizer, scheduler: LRScheduler, epochs: int) -> None:
    """Bring the rates to where a schedule from the beginning has them after so many epochs."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    with warnings.catch_warnings(action="ignore"):  # no optimiser's step is taken between
        for _ in range(epochs):
            scheduler.step()


def _restore_learner(path: Path, content: dict[str, Any], experiment: Experiment) -> TrainingState:
    state: TrainingState = content["state"]
    expected = experiment.learner.state_dict()
    _check(path, content["learner"], expected, "learner")
    for name in content["learner"].keys() - expected.keys():
        raise _unfit(path, f"learner.{name} has no place in it")
    experiment.learner.load_state_dict(content["learner"])
    return state


def _check_entries(path: Path, content: dict[str, Any], experiment: Experiment) -> None:
    """Hold entries to those of the experiment.

    Another torch may have fewer options, and another device no random state of this one's.
    """
    expected = _entries(experiment)
    _check(path, content["random"], {"cpu": expected["random"].pop("cpu")}, "random")
    same = content.get("torch") == torch.__version__
    for name, all_keys in (("optimizer", same), ("scheduler", same), ("random", False)):
        _check(path, content[name], expected[name], name, all_keys=all_keys)
    stepped = _state_after_a_step(experiment.optimizer)
    for number, entry in content["optimizer"]["state"].items():
        if number in stepped:
            _check(path, entry, stepped[number], f"optimizer.state.{number}", all_keys=same)


def _state_after_a_step(optimizer: Optimizer) -> dict[int, Any]:
    """The optimiser's state by parameter as it is in training, without values.

    Nothing if the optimiser takes no step without values.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    shapes = {id(each): nn.Parameter(torch.empty_like(each, device="meta")) for each in parameters}
    try:
        twin = copy.deepcopy(optimizer, dict(shapes))
        for each in shapes.values():
            each.grad = torch.empty_like(each)
        twin.step()
        state: dict[int, Any] = twin.state_dict()["state"]
        return state
    except Exception:  # of an optimiser of one's own
        return {}


def _check(path: Path, given: Any, expected: Any, name: str, *, all_keys: bool = True) -> None:
    """Raise `RunError` for an entry that is missing, or has another type, shape or dtype."""
    if isinstance(expected, dict) and isinstance(given, dict):
        for key, value in expected.items():
            if key in given:
                _check(path, given[key], value, f"{name}.{key}", all_keys=all_keys)
            elif all_keys:
                raise _unfit(path, f"{name}.{key} is missing")
        return
    if _kind(given) != _kind(expected):
        raise _unfit(path, f"{name} is {_kind(given)}, expected {_kind(expected)}")
    if isinstance(expected, list | tuple):
        for number, pair in enumerate(zip(given, expected, strict=True)):
            _check(path, *pair, f"{name}.{number}", all_keys=all_keys)


def _kind(value: Any) -> str:
    """The type of a value, in words, with shape and dtype or length."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "a number" if number else f"a {type(value).__name__}"


def _unfit(path: Path, reason: str) -> RunError:
    return RunError(f"{path}: a whole checkpoint that does not fit this recipe: {reason}")


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states


def _set_random_states(path: Path, states: dict[str, torch.Tensor], device: torch.device) -> None:
    try:
        torch.set_rng_state(states["cpu"])
        if device.type != "cpu" and device.type in states:
            torch.get_device_module(device.type).set_rng_state(states[device.type], device)
    except RuntimeError as error:
        raise _unfit(path, f"random: {first_line(error)}") from error
