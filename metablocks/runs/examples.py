"""The test in detail, `test.npz`: each task's scores and losses, some tasks as examples, spectra.

scores, losses         [tasks, steps + 1], before adaptation and after each inner step
spectrum/SIDE/NAME     singular values of a learned transform's factors (see `learned.spectra`)
weights/…, curves/…    a learned support loss (see `learned_losses`)
example/N/…            a test task, the worst first:
    number             its number in the split
    support, query     images [examples, channels, height, width], uint8, at most `SIDE` pixels
    support_y, query_y, prediction         classes [examples]
    support, query, support_y, query_y     of regression on one number: [examples]
    grid, fits         inputs [points], and predictions there [steps + 1, points]
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metablocks.errors import RunError, first_line
from metablocks.recipe import Experiment
from metablocks.runs.files import write_atomically
from metablocks.runs.learned import spectra
from metablocks.runs.learned_losses import curves
from metablocks.runs.scores import Scores
from metablocks.tasks.storage import FILE_LIMIT, check_size
from metablocks.types import Task, TaskBatch

EXAMPLES = 6
SIDE = 32
"""Pixels: larger images are made smaller."""
POINTS = 61
"""Of the grid that fits are drawn on."""


def write_test(path: Path, experiment: Experiment, scores: Scores) -> None:
    """Write `test.npz`, for the learner as it was tested, in one go."""
    assert scores.by_task is not None
    assert scores.losses_by_task is not None
    arrays: dict[str, Any] = {
        "scores": scores.by_task.float(),
        "losses": scores.losses_by_task.float(),
    }
    for side, factors in spectra(experiment.learner).items():
        arrays |= {f"spectrum/{side}/{name}": values for name, values in factors.items()}
    arrays |= curves(experiment, scores.tasks, len(scores.mean) - 1)
    for place, example in enumerate(_examples(experiment, scores)):
        arrays |= {f"example/{place}/{name}": value for name, value in example.items()}
    plain: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **plain))


def read_test(path: Path) -> dict[str, Any]:
    """The arrays of `test.npz`, names with slashes as dicts of dicts; nothing if there is none.

    Raises `RunError` for a file that is damaged, or larger than any that is read.
    """
    tree: dict[str, Any] = {}
    if not path.is_file():
        return tree
    try:
        with zipfile.ZipFile(path) as archive:
            check_size(sum(info.file_size for info in archive.infolist()), FILE_LIMIT)
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                *folders, leaf = key.split("/", 2)
                place = tree
                for folder in folders:
                    place = place.setdefault(folder, {})
                place[leaf] = arrays[key]
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        raise RunError(f"{path}: not readable: {first_line(error)}") from error
    return tree


def chosen(scores: Scores) -> list[int]:
    """Numbers of the tasks that are shown, the worst first: the worst, the one in the middle, the best.

    What is not a number is worse than any.

    >>> from metablocks.runs.scores import pool
    >>> values = torch.tensor([[0.1], [0.9], [0.5], [0.2], [0.3], [0.4], [0.8], [0.6], [0.7]])
    >>> chosen(pool("test", "accuracy", values, 1 - values))
    [0, 3, 4, 5, 2, 1]
    >>> losses = torch.tensor([[0.3], [0.1], [torch.nan], [0.2]])
    >>> chosen(pool("test", "mse", losses, losses))
    [2, 0, 3, 1]
    """
    assert scores.by_task is not None
    assert scores.losses_by_task is not None
    sign = 1 if scores.measure == "accuracy" else -1
    merits = torch.stack([sign * scores.by_task[:, -1], -scores.losses_by_task[:, -1]], 1)
    keys = merits.nan_to_num(-torch.inf, torch.inf, -torch.inf).tolist()
    order = sorted(range(scores.tasks), key=keys.__getitem__)
    if len(order) > EXAMPLES:
        middle = max(len(order) // 2, EXAMPLES - 2)
        order = [*order[: EXAMPLES - 2], order[middle], order[-1]]
    return order


def _examples(experiment: Experiment, scores: Scores) -> list[dict[str, Any]]:
    """The chosen tasks with predictions, of sources with images or with one number in and out."""
    source, shape = experiment.source, tuple(experiment.source.input_shape)
    images = source.kind == "classification" and len(shape) == 3 and shape[0] in (1, 3)
    numbers = source.kind == "regression" and shape == (1,) and source.outputs == 1
    if not images and not numbers:
        return []
    order = chosen(scores)
    tasks = source.sample("test", order).to(experiment.dtype)
    show, steps = _images if images else _fits, len(scores.mean) - 1
    return [
        {"number": number, **show(experiment, tasks[place], steps)}
        for place, number in enumerate(order)
    ]


def _images(experiment: Experiment, task: Task, steps: int) -> dict[str, Any]:
    images = torch.cat([task.support[0], task.query[0]]).float().cpu()
    low, high = images.min(), images.max()
    images = (images - low) / (high - low).clamp_min(1e-12)
    largest = max(images.shape[-2:])
    if largest > SIDE:
        images = F.interpolate(images, scale_factor=SIDE / largest, mode="area")
    support, query = (255 * images).round().byte().tensor_split([len(task.support[1])])
    return {
        "support": support,
        "query": query,
        "support_y": task.support[1].cpu(),
        "query_y": task.query[1].cpu(),
        "prediction": _prediction(experiment, task, steps).argmax(1),
    }


def _fits(experiment: Experiment, task: Task, steps: int) -> dict[str, Any]:
    """Points, and predictions on a grid from the first of them to the last."""
    x = torch.cat([task.support[0], task.query[0]])
    ends = float(x.min()), float(x.max())
    grid = torch.linspace(*ends, POINTS, dtype=x.dtype, device=x.device).unsqueeze(1)
    on_grid = Task(task.support, (grid, torch.zeros_like(grid)))
    fits = [_prediction(experiment, on_grid, each).flatten() for each in range(steps + 1)]
    points = {"support": task.support[0], "support_y": task.support[1]}
    points |= {"query": task.query[0], "query_y": task.query[1]}
    columns = {name: values.flatten().cpu() for name, values in points.items()}
    return {**columns, "grid": grid.flatten().cpu(), "fits": torch.stack(fits)}


def _prediction(experiment: Experiment, task: Task, steps: int) -> Tensor:
    """Of one task's query set `[examples, ...]`, after so many steps."""
    with experiment.precision():
        result = experiment.learner.evaluate(TaskBatch.stack([task]), steps=steps)
    prediction: Tensor = result.predictions[0]
    return prediction.float().cpu()
