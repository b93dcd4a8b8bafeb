"""The pictures of a comparison: validation against time and meta-steps, and how training went."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from metablocks.compare.results import FinishedRun, Validated

_COLOURS = (  # Okabe and Ito's, which the colour-blind can tell apart
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
)
_MARKERS = "osD^vPX*"


def draw(folder: Path, runs: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Write `comparison.png` and `training.png` of the runs of each recipe.

    Returns what there is to say about it. A thick line is the mean over seeds, a thin one each seed.
    Without matplotlib nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    _validation(folder / "comparison.png", runs)
    _training(folder / "training.png", runs)
    return []


def _validation(path: Path, runs: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Validation scores against the time in meta-steps, and against their number."""
    from matplotlib import pyplot as plt

    every = [run for each in runs.values() for run in each]
    accuracy = every[0].test.measure == "accuracy"
    longest = max(run.training_seconds for run in every)
    unit, name = (60.0, "min") if longest > 300 else (1.0, "s")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained"
    )
    for (label, group), look in zip(runs.items(), _looks(), strict=False):
        scale = 100.0 if accuracy else 1.0
        for axes, where in ((left, _seconds(unit)), (right, _steps)):
            curves = [_points(run.curve, where, scale) for run in group]
            mean = _points(mean_curve(group), where, scale)
            _lines(axes, curves, mean, look, label, markersize=4)
    after = sorted({run.test.inner_steps for run in every})
    steps = str(after[0]) if len(after) == 1 else f"{after[0]} to {after[-1]}"
    what = "validation accuracy, %" if accuracy else "validation MSE"
    left.set(xlabel=f"time in meta-steps, {name}", ylabel=f"{what}, after {steps} inner steps")
    right.set(xlabel="meta-steps")
    finite = [point.mean for run in every for point in run.curve if math.isfinite(point.mean)]
    if not accuracy and finite and min(finite) > 0:
        left.set_yscale("log")  # the right panel shares it
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}" if max(finite) < 5 * min(finite) else "")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, which="both")
    _save(figure, right, path, several=any(len(group) > 1 for group in runs.values()))


def _training(path: Path, runs: Mapping[str, Sequence[FinishedRun]]) -> None:
    """The training loss, epoch by epoch: whether it comes down smoothly."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    lowest = math.inf
    for (label, group), look in zip(runs.items(), _looks(), strict=False):
        curves = [
            [(row["step"], row["train_loss"]) for row in run.metrics if "train_loss" in row]
            for run in group
        ]
        mean = [
            (points[0][0], fmean(loss for _, loss in points))
            for points in zip(*curves, strict=False)
        ]
        _lines(axes, curves, mean, look, label, markevery=0.1, markersize=4)
        lowest = min([lowest, *(loss for curve in curves for _, loss in curve)])
    axes.set(xlabel="meta-steps", ylabel="training loss (weighted query loss), mean of the epoch")
    axes.set_xlim(left=0)
    if lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    _save(figure, axes, path, several=any(len(group) > 1 for group in runs.values()))


def mean_curve(group: Sequence[FinishedRun]) -> list[Validated]:
    """The mean over seeds, validation by validation: of the score, and of the time it came at."""
    return [
        Validated(points[0].step, fmean(p.seconds for p in points), fmean(p.mean for p in points))
        for points in zip(*(run.curve for run in group), strict=False)
    ]


_Points: TypeAlias = Sequence[tuple[float, float]]


def _looks() -> Iterator[dict[str, str]]:
    """Colours and markers, one pair for each recipe; enough for 64."""
    for marker in _MARKERS:
        for colour in _COLOURS:
            yield {"color": colour, "marker": marker}


def _seconds(unit: float) -> Callable[[Validated], float]:
    return lambda point: point.seconds / unit


def _steps(point: Validated) -> float:
    return float(point.step)


def _points(
    curve: Sequence[Validated], where: Callable[[Validated], float], scale: float
) -> _Points:
    return [(where(point), scale * point.mean) for point in curve]


def _lines(
    axes: Any,
    curves: Sequence[_Points],
    mean: _Points,
    look: Mapping[str, str],
    label: str,
    **style: Any,
) -> None:
    """Each seed in a thin line, where there are several, and their mean in a thick one."""
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=look["color"], linewidth=0.8, alpha=0.4)
    axes.plot(*zip(*mean, strict=True), linewidth=2.0, label=label, **look, **style)


def _save(figure: Any, axes: Any, path: Path, *, several: bool) -> None:
    from matplotlib import pyplot as plt

    handles, labels = axes.get_legend_handles_labels()
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
