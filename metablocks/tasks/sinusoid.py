"""Sinusoid regression: y = A sin(f x − φ), a new amplitude A and phase φ in every task.

Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
ICML 2017, section 5.1. The literature has three protocols whose errors must not be mixed; the
defaults here are Finn's (A in [0.1, 5], φ in [0, π], f = 1, x in [−5, 5]). A protocol that varies
the frequency is the same block with another `frequency`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from metablocks.checks import Count, CountFrom0, Device, Interval, checked
from metablocks.errors import TaskError
from metablocks.tasks.base import Floats, Kind, Split, draw_tasks, regression_tasks
from metablocks.types import TaskBatch


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Sinusoid:
    """Tasks y = A sin(f x − φ), with A, φ, f and every x drawn uniformly from their ranges.

    `sample` returns float32 leaves, inputs and targets `[tasks, examples, 1]`: `shots` support and
    `queries` query examples. Values are computed in float64 on the host, so every device gets the
    same numbers. Obeys the law of `TaskSource`. The splits are independent draws of one family.

    - `shots`: support examples of a task.
    - `queries`: query examples of a task.
    - `amplitude`: the range of A, [low, high].
    - `phase`: the range of φ.
    - `frequency`: the range of f.
    - `domain`: the range of x.
    - `points`: "drawn": every x by itself; "even": the examples of a task come from an even grid
      over `domain`, ends included, which support and query share out at random: all of it once
      (Nichol, Achiam, Schulman 2018).

    Raises `TaskError` for `shots` or `queries` below 1, an invalid range and other `points`.

    Source: Finn, Abbeel, Levine 2017, section 5.1.

    >>> import metablocks as mb
    >>> tasks = mb.tasks.Sinusoid(shots=5, queries=10).sample("train", range(25))
    >>> tasks.support[0].shape, tasks.query[1].shape
    (torch.Size([25, 5, 1]), torch.Size([25, 10, 1]))
    """

    kind: ClassVar[Kind] = "regression"
    input_shape: ClassVar[tuple[int, ...]] = (1,)
    outputs: ClassVar[int] = 1

    shots: Count = 5
    queries: Count = 5
    amplitude: Interval = (0.1, 5.0)
    phase: Interval = (0.0, math.pi)
    frequency: Interval = (1.0, 1.0)
    domain: Interval = (-5.0, 5.0)
    points: Literal["drawn", "even"] = "drawn"
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if self.domain[0] == self.domain[1]:
            words = f"is {self.domain!r}, a single x; low must be below high"
            raise TaskError.about("Sinusoid", "domain", words)

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split; leaves float32 `[len(indices), examples, 1]`."""
        size = 3 + self.shots + self.queries
        uniform = draw_tasks(self.seed, split, indices, lambda rng: rng.random(size))
        amplitude = _scale(uniform[:, 0:1], self.amplitude)
        phase = _scale(uniform[:, 1:2], self.phase)
        frequency = _scale(uniform[:, 2:3], self.frequency)
        place = uniform[:, 3:]
        if self.points == "even":
            ranks = place.argsort(axis=1).argsort(axis=1)
            place = ranks / (self.shots + self.queries - 1)
        x = _scale(place, self.domain)
        return regression_tasks(
            x, amplitude * np.sin(frequency * x - phase), self.shots, self.device
        )


def _scale(uniform: Floats, bounds: tuple[float, float]) -> Floats:
    low, high = bounds
    return low + (high - low) * uniform
