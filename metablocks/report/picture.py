"""The picture of a comparison: validation scores against training time and against meta-steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metablocks.report.results import FinishedRun, Validated

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


def draw(path: Path, runs: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Write the picture of the runs of each recipe; returns what there is to say about it.

    A thick line is the mean over seeds, a thin one each seed. Without matplotlib nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    every = [run for each in runs.values() for run in each]
    accuracy = every[0].test.measure == "accuracy"
    longest = max(run.training_seconds for run in every)
    unit, name = (60.0, "min") if longest > 300 else (1.0, "s")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained"
    )
    for index, (label, group) in enumerate(runs.items()):
        look = Look(
            colour=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index // len(_COLOURS) % len(_MARKERS)],
            label=label,
            scale=100.0 if accuracy else 1.0,
        )
        _lines(left, group, look, lambda point: point.seconds / unit)
        _lines(right, group, look, lambda point: float(point.step))
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
    handles, labels = right.get_legend_handles_labels()
    several = any(len(group) > 1 for group in runs.values())
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
    return []


def mean_curve(group: Sequence[FinishedRun]) -> list[Validated]:
    """The mean over seeds, validation by validation: of the score, and of the time it came at."""
    return [
        Validated(points[0].step, fmean(p.seconds for p in points), fmean(p.mean for p in points))
        for points in zip(*(run.curve for run in group), strict=False)
    ]


@dataclass(frozen=True)
class Look:
    """How a recipe is drawn."""

    colour: str
    marker: str
    label: str
    scale: float
    """Of the scores."""


def _lines(
    axes: Any, group: Sequence[FinishedRun], look: Look, where: Callable[[Validated], float]
) -> None:
    def plot(curve: Sequence[Validated], **style: Any) -> None:
        scores = [look.scale * point.mean for point in curve]
        axes.plot([where(point) for point in curve], scores, color=look.colour, **style)

    if len(group) > 1:
        for run in group:
            plot(run.curve, linewidth=0.8, alpha=0.4)
    plot(mean_curve(group), linewidth=2.0, marker=look.marker, markersize=4, label=look.label)
