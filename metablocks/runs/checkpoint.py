"""Checkpoints: all that training needs to go on, bit for bit, as tensors and plain values."""

from pathlib import Path
from typing import Any

import torch

from metablocks.errors import RunError
from metablocks.recipe import Experiment
from metablocks.runs.directory import write_atomically
from metablocks.runs.state import TrainingState

FORMAT = 2


def save(path: Path, experiment: Experiment, state: TrainingState) -> None:
    """Write parameters, optimiser, schedule, random states, counters, choices, in one go."""
    scheduler = experiment.scheduler
    content = {
        "format": FORMAT,
        "recipe": experiment.recipe.hash,
        "learner": experiment.learner.state_dict(),
        "optimizer": experiment.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "state": state.as_dict(),
        "random": _random_states(experiment.device),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def restore(path: Path, experiment: Experiment) -> TrainingState:
    """Put a checkpoint into a freshly built experiment, and the random states back.

    Raises `RunError` for a file that is absent, damaged, of another format or of another recipe.
    """
    content = _read(path, experiment)
    experiment.learner.load_state_dict(content["learner"])
    experiment.optimizer.load_state_dict(content["optimizer"])
    if experiment.scheduler:
        experiment.scheduler.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["random"]["cpu"])
    if experiment.device.type != "cpu" and experiment.device.type in content["random"]:
        module = torch.get_device_module(experiment.device.type)
        module.set_rng_state(content["random"][experiment.device.type], experiment.device)
    return TrainingState.from_dict(content["state"])


def restore_learner(path: Path, experiment: Experiment) -> TrainingState:
    """Put only the learner's parameters back, for evaluation."""
    content = _read(path, experiment)
    experiment.learner.load_state_dict(content["learner"])
    return TrainingState.from_dict(content["state"])


def other_recipe(path: Path, its: str, given: str) -> str:
    """What to say where a run's recipe is not the one at hand, by their hashes."""
    return (
        f"{path} was written with another recipe (hash {its[:12]}, this one is {given[:12]}); a run "
        "goes on with the recipe it started with, and no --set"
    )


def _read(path: Path, experiment: Experiment) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; the run stopped before it wrote one")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise RunError(f"{path}: not a metablocks checkpoint")
    if content["format"] != FORMAT:
        raise RunError(
            f"{path}: a checkpoint of format {content['format']}; this version of metablocks reads "
            f"format {FORMAT}. The version that wrote it is in {path.with_name('run.json')}"
        )
    if content["recipe"] != experiment.recipe.hash:
        raise RunError(other_recipe(path, content["recipe"], experiment.recipe.hash))
    return content


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states
