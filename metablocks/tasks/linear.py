"""The 1-D linear tasks y = θ x on which plain MAML cannot adapt fast, and a deep net can.

θ ~ N(0, σ²) a task, x ~ N(0, 1) an example. With one inner step at rate α a shallow model c·x can
do no better than a meta-loss of ½ (1 − α)² σ², at c = 0; the deep model a·b·x adapts exactly at
a = 0, b = ±1/√α (in expectation over x): its upper layer has become the step size.

Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
AISTATS 2021, the analysis of the failure mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metablocks.checks import Count, CountFrom0, Device, Positive, checked
from metablocks.errors import TaskError
from metablocks.tasks.base import Kind, Split, draw_tasks, regression_tasks
from metablocks.types import TaskBatch


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Tasks y = θ x with θ ~ N(0, sigma²) and x ~ N(0, 1).

    `sample` returns float32 leaves, inputs and targets `[tasks, examples, 1]`. Obeys the law of
    `TaskSource`. The splits are independent draws of one family.

    - `shots`: support examples of a task.
    - `queries`: query examples of a task.
    - `sigma`: standard deviation of θ.

    Raises `TaskError` for `shots` or `queries` below 1 and for `sigma` not above 0.

    Source: Arnold, Iqbal, Sha 2021.

    >>> import torch
    >>> import metablocks as mb
    >>> tasks = mb.tasks.Linear(shots=1, queries=4, sigma=2.0).sample("test", [0, 1, 2])
    >>> slopes = tasks.query[1] / tasks.query[0]
    >>> slopes.shape, bool(torch.allclose(slopes, slopes[:, :1].expand(-1, 4, -1)))
    (torch.Size([3, 4, 1]), True)
    """

    kind: ClassVar[Kind] = "regression"
    input_shape: ClassVar[tuple[int, ...]] = (1,)
    outputs: ClassVar[int] = 1

    shots: Count
    queries: Count
    sigma: Positive = 1.0
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split; leaves float32 `[len(indices), examples, 1]`."""
        size = 1 + self.shots + self.queries
        normal = draw_tasks(self.seed, split, indices, lambda rng: rng.standard_normal(size))
        slope, x = self.sigma * normal[:, :1], normal[:, 1:]
        return regression_tasks(x, slope * x, self.shots, self.device)
