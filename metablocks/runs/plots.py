"""Figures of finished runs: training loss, validation, and how well a learner adapts at the end."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeAlias

from metablocks.errors import RecipeError
from metablocks.runs import drawing
from metablocks.runs.directory import RunDirectory
from metablocks.runs.drawing import COLOURS, GREY, LOOKS, Figure, Line, Panel
from metablocks.runs.finished import FinishedRun, number, read_run
from metablocks.runs.scores import MEASURES, Measure

Runs: TypeAlias = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by the label of their recipe, at least one each."""
Points: TypeAlias = Sequence[tuple[float, ...]]
"""x and y, and of validations half the width of the confidence interval."""


class _Curve(NamedTuple):
    """A quantity over the training: the names of its axes, and the points of a run."""

    x: str
    y: str
    points: Callable[[FinishedRun], Points]


def draw(directory: RunDirectory) -> list[str]:
    """Write `training.png` and `adaptation.png` of a finished run; returns notes.

    Without matplotlib nothing is drawn, and the note says how to get it.
    """
    if notes := drawing.missing():
        return notes
    try:
        run = read_run(directory.path)
    except RecipeError as error:
        return [f"no plots: {error}"]
    drawing.save(training({str(run.values["name"]): [run]}), directory.path)
    drawing.save(adaptation(run), directory.path)
    return []


def draw_comparison(folder: Path, runs: Runs) -> list[str]:
    """Write `comparison.png` and `training.png` of the runs of each recipe; returns notes.

    A thick line is the mean over seeds, a thin one each seed. Without matplotlib nothing is drawn.
    """
    if notes := drawing.missing():
        return notes
    curves = [_validation(runs, by_time=True), _validation(runs)]
    drawing.save(_curves("comparison", "validation", runs, curves), folder)
    drawing.save(_curves("training", "training", runs, [_training()]), folder)
    return []


def training(runs: Runs) -> Figure:
    """Training loss and validation over meta-steps."""
    return _curves("training", "training and validation", runs, [_training(), _validation(runs)])


def adaptation(run: FinishedRun) -> Figure:
    """The test score before adaptation and after each inner step; the ensemble's as a star.

    Of a stream it is that of each chunk, as the chunks before have left the learner.
    """
    test, ensemble = run.test, run.ensemble
    scale, name = scale_of(test.measure)
    steps = range(len(test.mean))
    mean, interval, worst = (
        [scale * value for value in each] for each in (test.mean, test.interval, test.worst_decile)
    )
    label = "mean, 95 % confidence interval"
    lines = [Line(steps, mean, label, marker="o", interval=interval)]
    lines.append(Line(steps, worst, "worst 10 % of tasks", GREY, marker="v", dashed=True))
    if ensemble:
        x, y = [ensemble.inner_steps or 0], [scale * ensemble.mean[0]]
        label = f"ensemble of {ensemble.checkpoints}"
        lines.append(Line(x, y, label, COLOURS[1], width=0, marker="*"))
    values = [*mean, *worst]
    log = test.measure == "mse" and min(values) > 0 and math.isfinite(max(values))
    panel = Panel(steps_of(run), f"query {name}", lines, log=log, whole=True)
    what = f"{name} along a stream" if is_stream(run) else "adaptation"
    return Figure("adaptation", f"{of(run)}: {what}, {test.tasks} test tasks", [panel])


def is_stream(run: FinishedRun) -> bool:
    """True if the tasks of a run are streams, of which each inner step sees a chunk."""
    return bool(run.values["inner"]["batches"]["block"] == "stream")


def steps_of(run: FinishedRun) -> str:
    """The name of the axis of inner steps."""
    return "chunks of the stream before, an inner step each" if is_stream(run) else "inner steps"


def of(*runs: FinishedRun) -> str:
    """Name and seeds of runs of one recipe, for titles."""
    return f"{runs[0].values['name']}, {_seeds(runs)}"


def scale_of(measure: Measure) -> tuple[float, str]:
    """The factor from scores to what is drawn, and the name of that.

    >>> scale_of("accuracy"), scale_of("bits")
    ((100.0, 'accuracy, %'), (1.0, 'bits per byte'))
    """
    name, _ = MEASURES[measure]
    return (100.0, f"{name}, %") if measure == "accuracy" else (1.0, name)


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over seeds, point by point.

    >>> mean_curve([[(1, 0.5), (2, 0.7)], [(3, 0.5), (4, 0.9)]])
    [(2.0, 0.5), (3.0, 0.8)]
    """
    return [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*curves, strict=False)]


def _seeds(runs: Sequence[FinishedRun]) -> str:
    seeds = sorted({run.seed for run in runs})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _training() -> _Curve:
    def points(run: FinishedRun) -> Points:
        rows = (row for row in run.metrics if "train_loss" in row)
        return [(row["step"], number(row["train_loss"])) for row in rows]

    return _Curve("meta-steps", "training loss, mean of the epoch", points)


def _validation(runs: Runs, *, by_time: bool = False) -> _Curve:
    every = [run for group in runs.values() for run in group]
    scale, name = scale_of(every[0].test.measure)
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
    return _Curve(x, f"validation {name}, after {steps} inner steps", points)


def _curves(name: str, what: str, runs: Runs, curves: Sequence[_Curve]) -> Figure:
    """A panel a curve: each seed in a thin line, if there are several, their mean in a thick one."""
    several = any(len(group) > 1 for group in runs.values())
    panels = []
    for curve in curves:
        lines = [*_lines(runs, curve, interval=len(runs) == 1 and not several)]
        lowest = min((y for line in lines for y in line.y), default=0.0)
        log = lowest > 0 and "accuracy" not in curve.y
        panels.append(Panel(curve.x, curve.y, lines, log=log, from_zero=True))
    every = [run for group in runs.values() for run in group]
    names = ", ".join(runs) if len(runs) <= 3 else f"{len(runs)} recipes"
    note = "thick: the mean over seeds; thin: each seed" if several else ""
    return Figure(name, f"{names}, {_seeds(every)}: {what}", panels, note)


def _lines(runs: Runs, curve: _Curve, *, interval: bool) -> Iterator[Line]:
    for (label, group), (marker, colour) in zip(runs.items(), LOOKS, strict=False):
        points = [curve.points(run) for run in group]
        for seed in points if len(points) > 1 else ():
            x, y, *_ = zip(*seed, strict=True)
            yield Line(x, y, colour=colour, width=0.8, opacity=0.4)
        x, y, *error = zip(*mean_curve(points), strict=True)
        yield Line(
            x, y, label, colour, marker=marker, interval=error[0] if error and interval else None
        )
