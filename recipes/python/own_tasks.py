"""A task source of one's own: damped oscillations, y = A e^{−d|x|} sin(f x), new A, d, f in every task.

A source has a `kind`, an `input_shape`, a number of `outputs`, and `sample(split, indices)`. Its law:
task `index` of a split depends on nothing but the source's fields and (seed, split, index), so that
every process, chunk and resumed run sees the same tasks; `generator(seed, split, index)` gives each
task random numbers of its own. `metablocks.laws.sources` has the laws as functions.

In a recipe it stands as `tasks: {block: own_tasks:Oscillations, shots: 5, …}`, for
`metablocks run mine.yaml --allow own_tasks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

import metablocks as mb
from metablocks.tasks.base import Split, draw_tasks, regression_tasks


@dataclass(frozen=True, kw_only=True)
class Oscillations:
    """Regression tasks y = A e^{−d|x|} sin(f x): float32 leaves `[tasks, examples, 1]`."""

    kind: ClassVar[Literal["regression"]] = "regression"
    input_shape: ClassVar[tuple[int, ...]] = (1,)
    outputs: ClassVar[int] = 1

    shots: int = 5
    queries: int = 10
    seed: int = 0
    device: str | torch.device = "cpu"

    def sample(self, split: Split, indices: Sequence[int]) -> mb.TaskBatch:
        examples = self.shots + self.queries
        draws = draw_tasks(self.seed, split, indices, lambda rng: rng.random(3 + examples))
        amplitude, damping, frequency = (draws[:, i : i + 1] for i in range(3))
        x = 10 * draws[:, 3:] - 5
        y = (1 + amplitude) * np.exp(-damping * np.abs(x)) * np.sin((1 + frequency) * x)
        return regression_tasks(x, y, self.shots, self.device)


def main(iterations: int = 500) -> float:
    """Train MAML on the source in one call; return the loss on a new task after adaptation."""
    torch.manual_seed(0)
    source = Oscillations()
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
    learner, _ = mb.train_maml(
        model, source, inner_lr=0.01, outer_lr=1e-3, inner_steps=5, iterations=iterations,
        progress=False,
    )  # fmt: skip
    task = source.sample("test", [0])[0]
    inputs, target = task.query
    loss = nn.functional.mse_loss(learner.adapt(task.support)(inputs), target).item()
    print(f"query loss of a test task after 5 inner steps: {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
