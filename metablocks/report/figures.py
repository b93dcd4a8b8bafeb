"""Figures of what runs record: tasks, rates, step-loss weights, spectra, losses, costs, examples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, TypeAlias

import numpy as np

from metablocks.runs.drawing import COLOURS, GREY, LOOKS, Figure, Line, Panel
from metablocks.runs.finished import FinishedRun
from metablocks.runs.gallery import LIMITS, class_rows
from metablocks.runs.learned import LARGEST
from metablocks.runs.learned_losses import MEAN_OVER_CLASSES
from metablocks.runs.plots import adaptation, of, scale_of, steps_of
from metablocks.runs.scores import score_text

_BLACK = "#000000"
_MANY = 200  # tasks
_BINS = 20

Test: TypeAlias = Mapping[str, Any]
"""The arrays of `test.npz`, as `read_test` gives them; none of a run that has not recorded it."""


def figures_of(group: Sequence[FinishedRun], tests: Sequence[Test]) -> Iterator[Figure]:
    """Figures of the runs of one recipe, of what they have recorded; `tests` as `read_test` gives them.

    Examples are of the first run alone.
    """
    for run, test in zip(group, tests, strict=True):
        figures = [adaptation(run)]
        if "scores" in test:
            figures.append(tasks(run, test))
        for name, draw in (("spectrum", spectra), ("weights", weights), ("curves", learned_loss)):
            if name in test:
                figures.append(draw(run, test[name]))
        if run is group[0] and "example" in test:
            figures.append(examples(run, test))
        for figure in figures:
            yield replace(figure, name=f"{figure.name}-seed{run.seed}")
    yield from filter(None, (rates(group), step_losses(group[0]), costs(group)))


def tasks(run: FinishedRun, test: Test) -> Figure:
    """Query loss or bits, and accuracy, of every test task after each inner step; overshooting tasks
    stand out.

    A task overshoots if it is worse at the end than at an earlier step.
    """
    scale, name = scale_of(run.test.measure)
    scores, steps = scale * test["scores"], steps_of(run)
    if run.test.measure == "bits":
        panels = [_by_task(scores, f"query {name}", steps, better=-1)]
    else:
        panels = [_by_task(test["losses"], "query loss", steps, better=-1)]
    if run.test.measure == "accuracy":
        panels.append(_by_task(scores, f"query {name}", steps, better=1))
    note = "overshoot: worse at the end than at an earlier step"
    return Figure("tasks", f"{of(run)}: every test task", panels, note)


def overshoots(values: Any, better: int) -> Any:
    """True for tasks `[tasks, steps + 1]` that are worse at the end than at an earlier step.

    What is not a number is worse than any.

    >>> overshoots(np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [3.0, 2.0, np.nan]]), better=-1)
    array([ True, False,  True])
    """
    merits = np.where(np.isnan(values), -np.inf, better * values)
    return merits[:, -1] < merits.max(1)


def rates(group: Sequence[FinishedRun]) -> Figure | None:
    """Learned rates by layer and step, a colour a seed, at every epoch; None where none is learned."""
    logs = [{row["epoch"]: row for row in run.metrics if "rates" in row} for run in group]
    epochs = sorted(set.intersection(*({*log} for log in logs)))
    if not epochs:
        return None
    shape = {name: len(values) for name, values in logs[0][epochs[-1]]["rates"].items()}
    longest = max(shape.values())
    stride = longest + (longest > 1)
    places = {name: place * stride for place, name in enumerate(shape)}
    x = [float(p + step) for p in places.values() for step in range(stride)]

    def column(row: Mapping[str, Any]) -> list[list[float]]:
        """Rates at every place, then those of tensors that have negative entries."""
        values, marks = list[float](), list[float]()
        for name, count in shape.items():
            all_, shares = row["rates"][name], row.get("negative_rates", {}).get(name)
            gap = [math.nan] * (stride - count)
            values += [*all_, *gap]
            marks += [r if shares and shares[k] else math.nan for k, r in enumerate(all_)] + gap
        return [values, marks]

    frames = {epoch: [y for log in logs for y in column(log[epoch])] for epoch in epochs}
    notes = [
        name + (f", step {step + 1}" if count > 1 else "") if step < count else ""
        for name, count in shape.items()
        for step in range(stride)
    ]
    lines = []
    for place, run in enumerate(group):
        values, marks = frames[epochs[-1]][2 * place : 2 * place + 2]
        colour = COLOURS[place % len(COLOURS)]
        width = 1.5 if longest > 1 else 0.0
        lines.append(Line(x, values, f"seed {run.seed}", colour, width, "o", notes=notes))
        every = (y for ys in frames.values() for y in ys[2 * place + 1])
        there = any(map(math.isfinite, every)) and all(line.label != "negative" for line in lines)
        label = "negative" if there else ""
        lines.append(Line(x, marks, label, _BLACK, 0.0, "x", notes=notes))
    names = {p + (shape[name] - 1) / 2: name for name, p in places.items()}
    end = f"after epoch {epochs[-1]}"
    panel = Panel("", "inner learning rate", lines, end, names=names, frames=frames)
    note = "of each parameter its inner steps, from left to right; " * (longest > 1)
    note += "of a tensor of rates the mean, marked as negative if any of them is"
    return Figure("rates", f"{of(*group)}: learned rates", [panel], note)


def step_losses(run: FinishedRun) -> Figure | None:
    """Weights of the query losses over the epochs; None where the last step alone counts."""
    logged = {row["epoch"]: row["step_loss"] for row in run.metrics if "step_loss" in row}
    if all(not any(weights[:-1]) for weights in logged.values()):
        return None
    steps: dict[tuple[float, ...], list[int]] = {}
    for step, column in enumerate(zip(*logged.values(), strict=True)):
        if any(column):
            steps.setdefault(column, []).append(step)
    lines = []
    for (column, same), colour in zip(steps.items(), cycle(COLOURS), strict=False):
        first, last = same[0], same[-1]
        whole = len(same) > 2 and same == [*range(first, last + 1)]
        label = f"{first} to {last}" if whole else ", ".join(map(str, same))
        lines.append(Line([*logged], column, f"after step {label}", colour, 1.5, "o"))
    panel = Panel("epoch", "weight", lines, whole=True)
    return Figure("step_loss", f"{of(run)}: weights of the steps' query losses", [panel])


def spectra(run: FinishedRun, factors: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Singular values of the factors of KFO and Meta-Curvature, a panel a side of the gradient."""
    panels = []
    for side, by_name in factors.items():
        lines = []
        looks = zip(by_name.items(), cycle(LOOKS), strict=False)
        for (name, values), (marker, colour) in looks:
            share = ((np.arange(len(values)) + 0.5) / len(values)).tolist()
            lines.append(Line(share, values.tolist(), name, colour, 1.5, marker))
        panels.append(Panel("share of the directions", "singular value", lines, side, log=True))
    note = (
        "best checkpoint; 1 leaves a direction of the gradient as it is; factors of more than "
        f"{LARGEST:,} rows are left out"
    )
    return Figure("spectra", f"{of(run)}: spectra of the learned transform", panels, note)


def weights(run: FinishedRun, arrays: Mapping[str, Any]) -> Figure:
    """The weight of an example over its loss, and the losses of right and of wrong support labels."""
    loss, weight = arrays["loss"], arrays["weight"]
    ends = [Line(loss[[0, -1]].tolist(), [end, end], "", GREY, 1.0, dashed=True) for end in (0, 1)]
    curves = [*ends, Line(loss.tolist(), weight.tolist(), "weight", _BLACK)]
    bins, counts, means = np.linspace(0.0, loss[-1], _BINS + 1), list[Line](), list[str]()
    for kind, colour in (("right", COLOURS[2]), ("wrong", COLOURS[1])):
        if len(arrays[kind]):
            share = np.histogram(arrays[kind], bins)[0] / len(arrays[kind])
            centres = ((bins[1:] + bins[:-1]) / 2).tolist()
            counts.append(Line(centres, share.tolist(), f"{kind} labels", colour, marker="o"))
            mean = np.interp(arrays[kind], loss, weight).mean()
            means.append(f"{mean:.2f} of {kind} labels")
    x = "loss of a support example"
    panels = [Panel(x, "weight", curves), Panel(x, "share of them", counts, "after the last step")]
    note = f"best checkpoint; the mean weight after the last inner step: {', '.join(means)}"
    return Figure("weights", f"{of(run)}: weights of examples", panels, note)


def learned_loss(run: FinishedRun, arrays: Mapping[str, Any]) -> Figure:
    """The learned loss over the error of a prediction, a line a target."""
    names = [name for name in arrays if name != "error"]
    x = arrays["error"].tolist()
    lines = [
        Line(x, arrays[name].tolist(), name, colour)
        for name, colour in zip(names, cycle(COLOURS), strict=False)
    ]
    of_classes = MEAN_OVER_CLASSES in arrays
    x_name = "score of the right class, the others' 0" if of_classes else "prediction − target"
    panel = Panel(x_name, "learned loss", lines)
    note = "best checkpoint; an inner step goes down along these, at the pace of their slopes"
    return Figure("learned_loss", f"{of(run)}: the learned loss of an example", [panel], note)


def costs(group: Sequence[FinishedRun]) -> Figure:
    """Seconds and peak memory of every epoch, a colour a seed."""
    seconds, memory = list[Line](), list[Line]()
    for run, colour in zip(group, cycle(COLOURS), strict=False):
        x = [row["epoch"] for row in run.times]
        whole, training = (
            [row[key] for row in run.times] for key in ("seconds", "training_seconds")
        )
        seconds.append(Line(x, whole, f"seed {run.seed}", colour, 1.5, "o"))
        seconds.append(Line(x, training, "in meta-steps alone", colour, 1.0, dashed=True))
        peaks = [(row["peak_memory"] or math.nan) / 2**20 for row in run.times]
        memory.append(Line(x, peaks, f"seed {run.seed}", colour, 1.5, "o"))
    panels = [Panel("epoch", "seconds an epoch", seconds, whole=True)]
    if any(run.peak_memory is not None for run in group):
        panels.append(Panel("epoch", "peak memory, MiB", memory, whole=True))
    return Figure("costs", f"{of(*group)}: time and memory", panels)


def examples(run: FinishedRun, test: Test) -> Figure:
    """The example tasks, the worst first: images with predictions, or fits after each step."""
    panels, pictures = [], False
    for example in test["example"].values():
        scores = test["scores"][int(example["number"])].tolist()
        first, last = (score_text(scores[step], run.test.measure) for step in (0, -1))
        title = f"task {example['number']}: {first} → {last}"
        pictures = "prediction" in example
        if pictures:
            panels.append(Panel("", "", (), title, gallery=class_rows(example)))
        else:
            panels.append(_fit(title, example))
    note = f"support to the left; queries framed, red if wrong, with the class predicted{LIMITS}"
    title = f"{of(run)}: test tasks, the worst first"
    return Figure("examples", title, panels, note * pictures)


def _by_task(values: Any, name: str, x_axis: str, better: int) -> Panel:
    """Each task a thin line, those that overshoot in a colour; the mean on top."""
    steps, over = range(values.shape[1]), overshoots(values, better)
    lines = []
    for kind, colour, chosen in (("others", GREY, ~over), ("overshoot", COLOURS[1], over)):
        if chosen.any():
            broken = np.pad(values[chosen], ((0, 0), (0, 1)), constant_values=math.nan)
            x = [*steps, math.nan] * int(chosen.sum())
            width = 0.8 if len(values) < _MANY else 0.4
            lines.append(Line(x, broken.ravel().tolist(), kind, colour, width, opacity=0.55))
    lines.append(Line(steps, values.mean(0).tolist(), "mean", _BLACK, 2.5))
    share = f"{over.sum()} of {len(values)} tasks overshoot"
    return Panel(x_axis, name, lines, share, log=better < 0, whole=True)


def _fit(title: str, example: Test) -> Panel:
    """Fits from light (before) to dark (after the last step), support and query points."""
    fits, grid = example["fits"], example["grid"].tolist()
    last = len(fits) - 1
    lines = []
    for step, fit in enumerate(fits):
        label = {0: "before", 1: "after 1 step", last: f"after {last} steps"}.get(step, "")
        opacity = 1.0 if step in (0, last) else 0.25 + 0.5 * step / max(1, last)
        colour = GREY if step == 0 else COLOURS[0]
        width = 2.5 if step == last else 1.2
        lines.append(
            Line(grid, fit.tolist(), label, colour, width, opacity=opacity, dashed=step == 0)
        )
    for side, marker, colour in (("query", "o", COLOURS[2]), ("support", "D", COLOURS[1])):
        x, y = example[side].tolist(), example[f"{side}_y"].tolist()
        lines.append(Line(x, y, side, colour, 0.0, marker))
    return Panel("x", "y", lines, title)
