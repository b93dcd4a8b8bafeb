"""Learned support losses as curves, for `test.npz`, as far as the examples of some test tasks reach.

weights/…      of `WeightedLoss`:
    loss, weight       losses ℓ of an example, and V(ℓ) [points]
    right, wrong       ℓ of the support examples with right and with wrong labels, after the last step
curves/…       of `LearnedLoss`:
    error              prediction − target [points]; of classes the score of the right one, the others' 0
    target T           M there, of a low, a middle and a high target T
    mean over the classes
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metablocks.losses import LearnedLoss, WeightedLoss, example_losses
from metablocks.recipe import Experiment
from metablocks.types import Task, TaskBatch

TASKS = 20
POINTS = 61
MEAN_OVER_CLASSES = "mean over the classes"


def curves(experiment: Experiment, tasks: int, steps: int) -> dict[str, Tensor]:
    """Arrays by name, from the first of so many test tasks; none of a loss that is not learned."""
    loss = experiment.learner.support_loss
    numbers = range(min(TASKS, tasks))
    with torch.no_grad():
        if isinstance(loss, WeightedLoss):
            return _weights(loss, experiment, numbers, steps)
        if isinstance(loss, LearnedLoss):
            return _errors(loss, experiment, numbers)
    return {}


def _weights(
    loss: WeightedLoss, experiment: Experiment, numbers: range, steps: int
) -> dict[str, Tensor]:
    start, end = (
        torch.cat([example_losses(*pair) for pair in _on_support(experiment, numbers, step)])
        for step in (0, steps)
    )
    right = torch.cat(_right(experiment.source, numbers))
    grid = torch.linspace(0.0, float(torch.cat([start, end]).max()), POINTS).to(start)
    arrays = {"loss": grid, "weight": loss.weights(grid), "right": end[right], "wrong": end[~right]}
    return {f"weights/{name}": values.cpu() for name, values in arrays.items()}


def _errors(loss: LearnedLoss, experiment: Experiment, numbers: range) -> dict[str, Tensor]:
    pairs = zip(*_on_support(experiment, numbers, 0), strict=True)
    predictions, targets = (torch.cat(each) for each in pairs)
    outputs = loss.outputs
    if targets.is_floating_point():
        flat = targets.reshape(-1, outputs)
        reach = (predictions.reshape(-1, outputs) - flat).abs().max()
        rows = flat.quantile(torch.tensor([0.05, 0.5, 0.95]).to(flat), 0)
        ones = torch.ones_like(rows[:1])
        lines = {f"target {float(row.mean()):.2g}": (row[None], row[None], ones) for row in rows}
    else:
        reach, classes = predictions.abs().max(), torch.arange(outputs, device=targets.device)
        indicators = torch.eye(outputs).to(predictions)
        lines = {MEAN_OVER_CLASSES: (classes, 0 * indicators, indicators)}
    grid = torch.linspace(-1, 1, POINTS).to(predictions) * reach
    arrays = {"error": grid}
    for name, (target, base, direction) in lines.items():
        values = [loss(base + error * direction, target) for error in grid]
        arrays[name] = torch.stack(values)
    return {f"curves/{name}": values.cpu() for name, values in arrays.items()}


def _on_support(experiment: Experiment, numbers: range, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Of each task: predictions on its support set after so many steps on it, and the targets."""
    pairs = []
    for number in numbers:
        support = experiment.source.sample("test", [number])[0].support
        batch = TaskBatch.stack([Task(support, support)]).to(experiment.dtype)
        with experiment.precision():
            result = experiment.learner.evaluate(batch, steps=steps)
        pairs.append((result.predictions[0].to(experiment.dtype), batch.support[1][0]))
    return pairs


def _right(source: Any, numbers: range) -> list[Tensor]:
    """Of each task: True for the support examples `[examples]` whose labels are right."""
    clean = replace(source, wrong_labels=0.0) if hasattr(source, "wrong_labels") else source
    sides = ([each.sample("test", [n])[0].support[1] for n in numbers] for each in (source, clean))
    pairs = zip(*sides, strict=True)
    return [(given == label).reshape(len(label), -1).all(1) for given, label in pairs]
