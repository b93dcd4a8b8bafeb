"""A learner's variants, their meta-gradients from fixed draws, and the epochs where it decides anew."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from metablocks.executors import RandomDrawsWarning
from metablocks.laws.plain_loop import SEED
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.step_loss import step_weights
from metablocks.types import Progress, TaskBatch, Tensors


def with_blocks(learner: MetaLearner, **blocks: Any) -> MetaLearner:
    """The same learner with other blocks, on the same parameters."""
    other = copy.copy(learner)
    for name, block in blocks.items():
        setattr(other, name, block)
    return other


def run(learner: MetaLearner, tasks: TaskBatch, progress: Progress) -> tuple[MetaGradient, bool]:
    """The meta-gradient from `SEED` on, and whether its executor says that its draws are its own."""
    devices = {p.device for p in learner.parameters() if p.device.type != "cpu"}
    kept = torch.random.fork_rng(sorted({device.index or 0 for device in devices}))
    with kept, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.manual_seed(SEED)
        result = learner.meta_gradient(tasks, progress=progress)
    return result, any(issubclass(one.category, RandomDrawsWarning) for one in told)


def through(learner: MetaLearner, progress: Progress) -> tuple[bool, ...]:
    """Through which steps the learner's order looks."""
    return tuple(learner.order(k, learner.steps, progress) for k in range(learner.steps))


def turning_points(learner: MetaLearner, epochs: int) -> list[int]:
    """Epoch 0, and those from which the order, or which query losses count, is another.

    >>> from torch import nn
    >>> from metablocks import AnnealedOrder, LearningRate
    >>> order = AnnealedOrder(first_order_epochs=4)
    >>> learner = MetaLearner(
    ...     nn.Linear(1, 1), loss=nn.functional.mse_loss, steps=1, rule=LearningRate(0.1), order=order
    ... )
    >>> turning_points(learner, 9), turning_points(learner, 3)
    ([0, 4], [0])
    """
    found: list[int] = []
    before: Any = None
    for epoch in range(epochs):
        progress = Progress(epoch=epoch)
        weights = step_weights(learner.step_loss, learner.steps, progress)
        decided = (through(learner, progress), tuple(weight > 0 for weight in weights))
        if decided != before:
            found.append(epoch)
        before = decided
    return found


def brief(block: Any) -> str:
    """A block as it would be called, without what is left at its default.

    >>> from metablocks import Vmap
    >>> brief(Vmap()), brief(Vmap(chunk=2))
    ('Vmap()', 'Vmap(chunk=2)')
    """
    if not dataclasses.is_dataclass(block):
        return repr(block)
    given = [
        f"{field.name}={getattr(block, field.name)!r}"
        for field in dataclasses.fields(block)
        if field.repr and getattr(block, field.name) != field.default
    ]
    return f"{type(block).__name__}({', '.join(given)})"


def norm(tensors: Tensors, names: Iterable[str] | None = None) -> float:
    """‖tensors‖ over the names, or over all."""
    chosen = list(tensors) if names is None else names
    total: float = sum(float(tensors[name].double().square().sum()) for name in chosen)
    return math.sqrt(total)


def distance(one: Tensors, other: Tensors, names: Iterable[str] | None = None) -> float:
    """‖one − other‖ over the names, or over all."""
    chosen = list(other) if names is None else names
    return norm({name: one[name] - other[name] for name in chosen})
