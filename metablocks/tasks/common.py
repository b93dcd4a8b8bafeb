"""What several task sources share: checks of fields, draws of tasks, regression batches."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.errors import TaskError
from metablocks.tasks.base import Split, generator
from metablocks.types import TaskBatch

Floats = NDArray[np.float64]


def at_least(minimum: int, block: str, **fields: int) -> None:
    """Raise `TaskError` for the first field that is no whole number of at least `minimum`.

    >>> at_least(1, "Sinusoid", shots=5, queries=0)
    Traceback (most recent call last):
    metablocks.errors.TaskError: Sinusoid: queries=0; queries is a whole number of at least 1
    """
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise TaskError(
                f"{block}: {name}={value!r}; {name} is a whole number of at least {minimum}"
            )


def number(block: str, *, positive: bool = False, **fields: float) -> None:
    """Raise `TaskError` for the first field that is not finite, or negative, or 0 if `positive`."""
    needed = "above 0" if positive else "of at least 0"
    for name, value in fields.items():
        if not _finite(value) or value < 0 or (positive and value == 0):
            raise TaskError(f"{block}: {name}={value!r}; {name} is a finite number {needed}")


def interval(block: str, **fields: tuple[float, float]) -> None:
    """Raise `TaskError` for the first field that is no pair (low, high) with low <= high.

    >>> interval("Sinusoid", phase=(3.0, 1.0))
    Traceback (most recent call last):
    metablocks.errors.TaskError: Sinusoid: phase=(3.0, 1.0); phase is a pair (low, high) of finite
    numbers with low <= high
    """
    for name, value in fields.items():
        pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_finite, value))
        if not pair or value[0] > value[1]:
            raise TaskError(
                f"{block}: {name}={value!r}; {name} is a pair (low, high) of finite numbers "
                "with low <= high"
            )


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


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
