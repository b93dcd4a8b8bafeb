"""How well a learner adapts: a score for every inner step, over many tasks.

Tasks are fixed: number 0 … n − 1 of a split, the same for every run with the same task source and
seed. Batch norm uses batch statistics, query set included (the transductive convention).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metablocks.learner import MetaLearner
from metablocks.tasks.base import Kind, Split, TaskSource

Measure = Literal["accuracy", "mse"]


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of examples whose largest logit is the target's: `[n, classes]`, `[n]` → scalar.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return (prediction.argmax(-1) == target).to(torch.get_default_dtype()).mean()


@dataclass(frozen=True)
class Scores:
    """Means over tasks with 95 % confidence intervals: one number for each inner step from 0.

    `measure` is "accuracy" (higher is better) or "mse" (lower). `interval` is half the width of the
    interval, 1.96 standard errors over tasks. `loss` is the mean query loss.
    """

    split: Split
    tasks: int
    measure: Measure
    mean: list[float]
    interval: list[float]
    loss: list[float]

    @property
    def final(self) -> float:
        """The mean after the last step."""
        return self.mean[-1]

    def better_than(self, other: "Scores | None") -> bool:
        """Whether the final score is strictly better; anything is better than none or nan."""
        if other is None or math.isnan(other.final):
            return True
        if self.measure == "accuracy":
            return self.final > other.final
        return self.final < other.final

    def text(self, step: int) -> str:
        """The score after `step` inner steps, as people write it.

        >>> Scores("test", 600, "accuracy", [0.2, 0.95], [0.004, 0.006], [1.6, 0.2]).text(1)
        '95.00 ± 0.60 %'
        """
        mean, interval = self.mean[step], self.interval[step]
        if self.measure == "accuracy":
            return f"{100 * mean:.2f} ± {100 * interval:.2f} %"
        digits = ".4f" if mean < 1e4 else ".3e"
        return f"{mean:{digits}} ± {interval:{digits}}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)


def score(
    learner: MetaLearner,
    source: TaskSource,
    split: Split,
    *,
    tasks: int,
    steps: int,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Adapt to tasks 0 … `tasks` − 1 of a split by `steps` inner steps, `batch` tasks at a time."""
    metric = accuracy if source.kind == "classification" else None
    values, losses = [], []
    for first in range(0, tasks, batch):
        indices = range(first, min(first + batch, tasks))
        result = learner.evaluate(
            source.sample(split, indices).to(dtype), steps=steps, metric=metric
        )
        losses.append(result.query_losses.double().cpu())
        values.append(losses[-1] if result.metrics is None else result.metrics.double().cpu())
    return _summarise(split, source.kind, torch.cat(values), torch.cat(losses))


def _summarise(split: Split, kind: Kind, values: Tensor, losses: Tensor) -> Scores:
    count = len(values)
    spread = values.std(0) if count > 1 else torch.zeros_like(values[0])
    return Scores(
        split=split,
        tasks=count,
        measure="accuracy" if kind == "classification" else "mse",
        mean=values.mean(0).tolist(),
        interval=(1.96 * spread / math.sqrt(count)).tolist(),
        loss=losses.mean(0).tolist(),
    )
