"""Counters and scores of a training: where it stands, besides its tensors."""

from dataclasses import dataclass, field

from metablocks.learner import MetaGradient
from metablocks.runs.scores import Scores


@dataclass
class TrainingState:
    """Counters and scores of a run. An epoch is finished when its line is in the log."""

    step: int = 0
    """Meta-steps taken."""
    epochs: int = 0
    """Epochs finished."""
    losses: list[float] = field(default_factory=list)
    """Loss of each meta-step of the epoch in progress, except for skipped ones."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """The estimator's metrics at each of them, by name (`MetaGradient.metrics`)."""
    skipped: int = 0
    """Meta-steps of the epoch in progress that were skipped, not being finite."""
    best_epoch: int | None = None
    ranking: list[tuple[int, float]] = field(default_factory=list)
    """The epochs kept, the best first, each with its validation error (see `Scores.error`)."""
    kept: list[int] = field(default_factory=list)
    """The epochs in the ranking, and those that were in it at the checkpoint before."""
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
        if result.skipped:
            self.skipped += 1
            return
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
