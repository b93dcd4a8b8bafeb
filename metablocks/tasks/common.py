"""What several task sources share: draws of tasks, regression batches."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.errors import TaskError
from metablocks.tasks.base import Split, generator
from metablocks.types import TaskBatch

Floats = NDArray[np.float64]


def draw(
    seed: int, split: Split, indices: Sequence[int], one: Callable[[np.random.Generator], Floats]
) -> Floats:
    """`one(generator of the task)` for every task, stacked: `[len(indices), ...]`, float64.

    Raises `TaskError` where no task, an unknown split or a negative index is asked for.
    """
    return np.stack([one(generator(seed, split, index)) for index in numbers(indices)])


def numbers(indices: Sequence[int]) -> list[int]:
    """The task numbers as a list of int; raises `TaskError` where there is none."""
    if len(indices) == 0:
        raise TaskError("no task asked for: indices is empty; give at least one task number")
    return [int(index) for index in indices]


def regression(x: Floats, y: Floats, shots: int, device: str | torch.device) -> TaskBatch:
    """Tasks from x and y `[tasks, examples]`: the first `shots` examples are the support set.

    Leaves are float32 `[tasks, examples, 1]` on `device`.
    """

    def tensor(values: Floats) -> torch.Tensor:
        return torch.from_numpy(values[..., None].astype(np.float32, order="C")).to(device)

    return TaskBatch(
        support=(tensor(x[:, :shots]), tensor(y[:, :shots])),
        query=(tensor(x[:, shots:]), tensor(y[:, shots:])),
    )
