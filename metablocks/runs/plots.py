"""Plots of finished runs: training loss, validation, and how well a learner adapts at the end."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

from metablocks.errors import RecipeError
from metablocks.runs.directory import RunDirectory
from metablocks.runs.files import write_atomically
from metablocks.runs.finished import FinishedRun, read_run
from metablocks.runs.scores import MEASURES, Scores

_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
"""Okabe and Ito's, which the colour-blind can tell apart."""
_LOOKS = [{"color": colour, "marker": marker} for marker, colour in product("osD^vPX*", _COLOURS)]
"""One for each recipe; enough for 64."""

Runs: TypeAlias = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by the label of their recipe, at least one each."""
Points: TypeAlias = Sequence[tuple[float, ...]]
"""x and y, and of validations half the width of the confidence interval."""


class _Panel(NamedTuple):
    """One diagram: the names of its axes, and the points of a run in it."""

    x: str
    y: str
    points: Callable[[FinishedRun], Points]


def draw(directory: RunDirectory) -> list[str]:
    """Write `training.png` and `adaptation.png` of a finished run; returns notes.

    Without matplotlib nothing is drawn, and the note says how to get it.
    """
    if notes := _missing():
        return notes
    try:
        run = read_run(directory.path)
    except RecipeError as error:
        return [f"no plots: {error}"]
    runs = {str(run.values["name"]): [run]}
    _curves(directory.path / "training.png", runs, [_training(), _validation(runs)])
    _adaptation(directory.path / "adaptation.png", run)
    return []


def draw_comparison(folder: Path, runs: Runs) -> list[str]:
    """Write `comparison.png` and `training.png` of the runs of each recipe; returns notes.

    A thick line is the mean over seeds, a thin one each seed. Without matplotlib nothing is drawn.
    """
    if notes := _missing():
        return notes
    panels = [_validation(runs, by_time=True), _validation(runs)]
    _curves(folder / "comparison.png", runs, panels)
    _curves(folder / "training.png", runs, [_training()])
    return []


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over seeds, point by point.

    >>> mean_curve([[(1, 0.5), (2, 0.7)], [(3, 0.5), (4, 0.9)]])
    [(2.0, 0.5), (3.0, 0.8)]
    """
    return [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*curves, strict=False)]


def _missing() -> list[str]:
    try:
        import matplotlib
    except ImportError:
        return ["no plots: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    return []


def _training() -> _Panel:
    def points(run: FinishedRun) -> Points:
        return [(row["step"], row["train_loss"]) for row in run.metrics if "train_loss" in row]

    return _Panel("meta-steps", "training loss (weighted query loss), mean of the epoch", points)


def _validation(runs: Runs, *, by_time: bool = False) -> _Panel:
    every = [run for group in runs.values() for run in group]
    scale, name = _scale(every[0].test)
    inner = sorted({run.inner_steps for run in every})
    steps = str(inner[0]) if len(inner) == 1 else f"{inner[0]} to {inner[-1]}"
    minutes = max(run.training_seconds for run in every) > 300
    unit, unit_name = (60.0, "min") if minutes else (1.0, "s")

    def points(run: FinishedRun) -> Points:
        return [
            (p.seconds / unit if by_time else p.step, scale * p.mean, scale * p.interval)
            for p in run.validations
        ]

    x = f"time in meta-steps, {unit_name}" if by_time else "meta-steps"
    return _Panel(x, f"validation {name}, after {steps} inner steps", points)


def _curves(path: Path, runs: Runs, panels: Sequence[_Panel]) -> None:
    """A diagram a panel: each seed in a thin line, if there are several, their mean in a thick one."""
    from matplotlib import pyplot as plt

    several = any(len(group) > 1 for group in runs.values())
    size = (2.0 + 4.3 * len(panels), 4.6)
    figure, row = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(row[0], panels, strict=True):
        lowest = math.inf
        for (label, group), look in zip(runs.items(), _LOOKS, strict=False):
            curves = [panel.points(run) for run in group]
            x, y, *interval = zip(*mean_curve(curves), strict=True)
            for curve in curves if len(curves) > 1 else ():
                thin = [*zip(*curve, strict=True)][:2]
                axes.plot(*thin, color=look["color"], linewidth=0.8, alpha=0.4)
            error = interval[0] if interval and len(runs) == 1 and not several else None
            style: dict[str, Any] = {
                **look,
                "label": label,
                "markevery": 0.1 if len(x) > 40 else None,
            }
            axes.errorbar(x, y, error, linewidth=2.0, markersize=4, capsize=2, **style)
            lowest = min([lowest, *(point[1] for curve in curves for point in curve)])
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.set_xlim(left=0)
        if lowest > 0 and "accuracy" not in panel.y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25, which="both")
    handles, labels = row[0][-1].get_legend_handles_labels()
    title = "mean over seeds; thin: each seed" if several else None
    place, count = "outside upper center", min(4, len(labels))
    figure.legend(handles, labels, loc=place, ncols=count, frameon=False, title=title)
    _save(figure, path)


def _adaptation(path: Path, run: FinishedRun) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(5.0, 4.0), layout="constrained")
    test, ensemble = run.test, run.ensemble
    scale, label = _scale(test)
    steps = range(len(test.mean))
    mean, interval = ([scale * value for value in each] for each in (test.mean, test.interval))
    style: dict[str, Any] = {"capsize": 3, "marker": "o", "label": "mean, 95 % confidence interval"}
    axes.errorbar(steps, mean, interval, **style)
    worst = [scale * value for value in test.worst_decile]
    axes.plot(steps, worst, "v--", color="tab:gray", label="worst 10 % of tasks")
    if ensemble:
        members = f"ensemble of {len(ensemble.members or [1])}"
        star: dict[str, Any] = {
            "color": "tab:red",
            "markersize": 11,
            "markeredgecolor": "white",
            "label": members,
        }
        # above the mean, which may be close
        axes.plot(ensemble.inner_steps or 0, scale * ensemble.mean[0], "*", zorder=5, **star)
    axes.set(xlabel="inner steps", ylabel=f"query {label}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"adaptation, {test.tasks} test tasks")
    values = [*mean, *worst]
    if test.measure == "mse" and min(values) > 0 and math.isfinite(max(values)):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


def _scale(scores: Scores) -> tuple[float, str]:
    name = MEASURES[scores.measure][0]
    return (100.0, f"{name}, %") if scores.measure == "accuracy" else (1.0, name)
