"""Where a training run stands, in plain values."""

from dataclasses import asdict, dataclass, field
from typing import Any

from metablocks.run.scores import Scores


@dataclass
class TrainingState:
    """Counters of a run. An epoch is finished when its line is in the log."""

    step: int = 0
    """Meta-steps taken."""
    epochs: int = 0
    """Epochs finished."""
    losses: list[float] = field(default_factory=list)
    """Loss of each meta-step of the epoch in progress."""
    best: Scores | None = None
    """The best validation scores so far."""
    best_epoch: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TrainingState":
        """The state that `as_dict` described.

        >>> state = TrainingState(step=3, losses=[0.5])
        >>> TrainingState.from_dict(state.as_dict()) == state
        True
        """
        best = Scores(**values["best"]) if values["best"] else None
        return TrainingState(**{**values, "best": best})
