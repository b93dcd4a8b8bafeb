"""Binary tasks of a logistic model, from which one step of logistic regression stays far.

    P(y = 1 | x) = s(θ·x),    s(z) = 1 / (1 + e^−z),    θ ~ N(0, σ² I) a task, x ~ N(0, I) an example

The cross-entropy of two logits with rows w₀, w₁ is the loss of logistic regression of c·x with
c = w₁ − w₀. One inner step at rate α on a large support set gives

    c' = u(c) + v,    u(c) = c − 2α E[(s(c·x) − ½) x],    v = 2α E[(y − ½) x] = 2α m θ

with m = E[s'(θ·x)] ≤ ¼. The meta-loss is convex and even in u, for θ and −θ are equally likely: no
start is better than c = 0, from where the step goes at most α/2 of the way to θ. A linear layer more
behind the model (LinNet) learns to be the step size that is missing, as in `Linear`.

Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
AISTATS 2021, which shows the failure mode on logistic regression too. Deviation: 1. the draws of θ
and x are ours, those of `Linear` in more dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from metablocks.checks import Count, CountFrom0, Device, Positive, checked
from metablocks.errors import TaskError
from metablocks.tasks.base import Floats, Kind, Split, draw_tasks
from metablocks.types import Batch, TaskBatch


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Tasks P(y = 1 | x) = s(θ·x) with θ ~ N(0, sigma² I) and x ~ N(0, I), in `dim` dimensions.

    `sample` returns inputs `[tasks, examples, dim]` in float32 and labels `[tasks, examples]`, 0 or
    1, in int64. `shots` and `queries` count examples, not examples of a class: labels are drawn, so
    that the classes are equal in the mean over tasks only, and a small support set may hold one
    class alone. No model predicts the labels without error. Obeys the law of `TaskSource`. The
    splits are independent draws of one family.

    - `shots`: support examples of a task, of both classes together.
    - `queries`: query examples of a task.
    - `dim`: number of inputs.
    - `sigma`: standard deviation of every entry of θ.

    Raises `TaskError` for `shots`, `queries` or `dim` below 1 and for `sigma` not above 0.

    Source: Arnold, Iqbal, Sha 2021.

    >>> import metablocks as mb
    >>> tasks = mb.tasks.Logistic(shots=5, queries=10, dim=2).sample("train", range(25))
    >>> tasks.support[0].shape, tasks.query[1].shape
    (torch.Size([25, 5, 2]), torch.Size([25, 10]))
    >>> tasks.query[1].unique()
    tensor([0, 1])
    """

    kind: ClassVar[Kind] = "classification"
    outputs: ClassVar[int] = 2

    shots: Count
    queries: Count
    dim: Count = 1
    sigma: Positive = 1.0
    seed: CountFrom0 = 0
    device: Device = "cpu"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split: x float32 `[len(indices), examples, dim]`, y int64."""
        examples = draw_tasks(self.seed, split, indices, self._examples)

        def batch(part: Floats) -> Batch:
            x = torch.from_numpy(part[..., :-1].astype(np.float32, order="C"))
            y = torch.from_numpy(part[..., -1].astype(np.int64, order="C"))
            return x.to(self.device), y.to(self.device)

        return TaskBatch(
            support=batch(examples[:, : self.shots]), query=batch(examples[:, self.shots :])
        )

    def _examples(self, rng: np.random.Generator) -> Floats:
        """x and y of one task, `[shots + queries, dim + 1]`."""
        count = self.shots + self.queries
        weight = self.sigma * rng.standard_normal(self.dim)
        x = rng.standard_normal((count, self.dim))
        chance = (1 + np.tanh((x * weight).sum(1) / 2)) / 2  # s(θ·x), without overflow
        y = rng.random(count) < chance
        return np.column_stack([x, y])
