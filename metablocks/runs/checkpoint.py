"""Checkpoints: all that training needs to go on, bit for bit, as tensors and plain values."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from metablocks.errors import RunError
from metablocks.learner import MetaGradient
from metablocks.recipe import Experiment
from metablocks.runs.directory import write_atomically
from metablocks.runs.scores import Scores

FORMAT = 2


@dataclass
class TrainingState:
    """Counters and scores of a run. An epoch is finished when its line is in the log."""

    step: int = 0
    """Meta-steps taken."""
    epochs: int = 0
    """Epochs finished."""
    losses: list[float] = field(default_factory=list)
    """Loss of each meta-step of the epoch in progress."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """The estimator's metrics at each of them, by name (`MetaGradient.metrics`)."""
    best_epoch: int | None = None
    ranking: list[tuple[int, float]] = field(default_factory=list)
    """The epochs kept, the best first, each with its validation error (see `Scores.error`)."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds of the epoch in progress before a stop (see `Meter`)."""

    @property
    def members(self) -> list[int]:
        """The epochs in the ranking: the members of the ensemble."""
        return [epoch for epoch, _ in self.ranking]

    def record(self, result: MetaGradient) -> None:
        """Take a meta-step in.

        >>> import torch
        >>> state = TrainingState()
        >>> for loss in (3.0, 2.0):
        ...     state.record(MetaGradient(torch.tensor(loss), {}, torch.zeros(1, 1), {}))
        >>> state.step, state.losses
        (2, [3.0, 2.0])
        """
        self.step += 1
        self.losses.append(float(result.loss))
        for name, value in result.metrics.items():
            self.metrics.setdefault(name, []).append(float(value))

    def judge(self, epoch: int, scores: Scores, keep: int) -> None:
        """Take an epoch's validation scores in; of epochs that score alike the earlier is better.

        >>> state = TrainingState()
        >>> for epoch, mse in enumerate([0.5, 0.2, 0.9, 0.2], 1):
        ...     scores = Scores("validation", 1, "mse", [mse], [0.0], [0.0], [mse], [mse])
        ...     state.judge(epoch, scores, keep=3)
        >>> state.best_epoch, state.members
        (2, [2, 4, 1])
        """
        ranking = [*self.ranking, (epoch, scores.error)]
        self.ranking = sorted(ranking, key=lambda entry: entry[1])[:keep]
        self.best_epoch = self.members[0]


def save(path: Path, experiment: Experiment, state: TrainingState) -> None:
    """Write parameters, optimiser, schedule, random states, counters, choices, in one go."""
    scheduler = experiment.scheduler
    content = {
        "format": FORMAT,
        "recipe": experiment.recipe.hash,
        "learner": experiment.learner.state_dict(),
        "optimizer": experiment.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "state": asdict(state),
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
    return TrainingState(**content["state"])


def restore_learner(path: Path, experiment: Experiment) -> TrainingState:
    """Put only the learner's parameters back, for evaluation."""
    content = _read(path, experiment)
    experiment.learner.load_state_dict(content["learner"])
    return TrainingState(**content["state"])


def other_recipe(path: Path, its: str, given: str) -> str:
    """The message for a run whose recipe is not the one at hand, by their hashes."""
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
    content["state"].pop("best", None)  # older checkpoints hold the best scores beside their epoch
    return content


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states
