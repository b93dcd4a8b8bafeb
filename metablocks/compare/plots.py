"""Plots of a comparison: validation against time and meta-steps, and the training loss."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from metablocks.compare.finished import FinishedRun, Validation

_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
"""Okabe and Ito's, which the colour-blind can tell apart."""
_LOOKS = [{"color": colour, "marker": marker} for marker, colour in product("osD^vPX*", _COLOURS)]
"""One for each recipe; enough for 64."""

Runs: TypeAlias = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by the label of their row, at least one each."""
Points: TypeAlias = Sequence[tuple[float, float]]


def draw(folder: Path, runs: Runs) -> list[str]:
    """Write `comparison.png` and `training.png` of the runs of each recipe; returns notes.

    A thick line is the mean over seeds, a thin one each seed. Without matplotlib nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    _validation(folder / "comparison.png", runs)
    _training(folder / "training.png", runs)
    return []


def mean_curve(group: Sequence[FinishedRun]) -> list[Validation]:
    """The mean over seeds, validation by validation: of the score, and of the time it came at."""
    return [
        Validation(points[0].step, fmean(p.seconds for p in points), fmean(p.mean for p in points))
        for points in zip(*(run.validations for run in group), strict=False)
    ]


def _validation(path: Path, runs: Runs) -> None:
    """Validation scores against the time in meta-steps, and against their number."""
    from matplotlib import pyplot as plt

    every = [run for group in runs.values() for run in group]
    accuracy = every[0].measure == "accuracy"
    scale = 100.0 if accuracy else 1.0
    longest = max(run.training_seconds for run in every)
    unit, unit_name = (60.0, "min") if longest > 300 else (1.0, "s")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained"
    )
    for (label, group), look in zip(runs.items(), _LOOKS, strict=False):
        *curves, mean = [
            (
                [(p.seconds / unit, scale * p.mean) for p in curve],
                [(p.step, scale * p.mean) for p in curve],
            )
            for curve in [*(run.validations for run in group), mean_curve(group)]
        ]
        for side, axes in enumerate((left, right)):
            _lines(axes, [curve[side] for curve in curves], mean[side], look | {"label": label})
    inner = sorted({run.inner_steps for run in every})
    steps = str(inner[0]) if len(inner) == 1 else f"{inner[0]} to {inner[-1]}"
    name = "validation accuracy, %" if accuracy else "validation MSE"
    left.set(xlabel=f"time in meta-steps, {unit_name}", ylabel=f"{name}, after {steps} inner steps")
    right.set(xlabel="meta-steps")
    scores = [point.mean for run in every for point in run.validations if math.isfinite(point.mean)]
    if not accuracy and scores and min(scores) > 0:  # the right panel shares the scale
        _log_scale(left, minor="{x:g}" if max(scores) < 5 * min(scores) else "")
    _save(figure, (left, right), path, several=any(len(group) > 1 for group in runs.values()))


def _training(path: Path, runs: Runs) -> None:
    """The training loss, epoch by epoch: whether it comes down smoothly."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    lowest = math.inf
    for (label, group), look in zip(runs.items(), _LOOKS, strict=False):
        curves = [
            [(row["step"], row["train_loss"]) for row in run.metrics if "train_loss" in row]
            for run in group
        ]
        mean = [
            (points[0][0], fmean(loss for _, loss in points))
            for points in zip(*curves, strict=False)
        ]
        _lines(axes, curves, mean, look | {"label": label, "markevery": 0.1})
        lowest = min([lowest, *(loss for curve in curves for _, loss in curve)])
    axes.set(xlabel="meta-steps", ylabel="training loss (weighted query loss), mean of the epoch")
    if lowest > 0:
        _log_scale(axes, minor="{x:g}")
    _save(figure, (axes,), path, several=any(len(group) > 1 for group in runs.values()))


def _lines(axes: Any, curves: Sequence[Points], mean: Points, style: Mapping[str, Any]) -> None:
    """Each seed in a thin line, if there are several, and their mean in a thick one."""
    for curve in curves if len(curves) > 1 else ():
        axes.plot(*zip(*curve, strict=True), color=style["color"], linewidth=0.8, alpha=0.4)
    axes.plot(*zip(*mean, strict=True), linewidth=2.0, markersize=4, **style)


def _log_scale(axes: Any, *, minor: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(minor)


def _save(figure: Any, panels: Sequence[Any], path: Path, *, several: bool) -> None:
    from matplotlib import pyplot as plt

    for axes in panels:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, which="both")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(4, len(labels)),
        frameon=False,
        title="mean over seeds; thin: each seed" if several else None,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
