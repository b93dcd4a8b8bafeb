"""Diagrams as values: panels of lines, which a page (`metablocks.report`) and matplotlib draw alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from metablocks.runs.files import write_atomically
from metablocks.runs.gallery import ClassRow, mosaic

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
"""Okabe and Ito's, which the colour-blind can tell apart."""
LOOKS = [*product("osD^vPX*", COLOURS)]
"""Marker and colour of 64 lines."""
GREY = "#767676"
_MOST_TICKS = 16
_COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """Points, joined or not. A nan breaks the line."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    """In the legend; without one, the line is not there."""
    colour: str = COLOURS[0]
    width: float = 2.0
    """0 leaves points alone."""
    marker: str = ""
    """One of `osD^vPX*x`."""
    opacity: float = 1.0
    dashed: bool = False
    interval: Sequence[float] | None = None
    """Half the width of a confidence interval at each point."""
    notes: Sequence[str] = ()
    """Of each point, where a pointer can ask."""

    @property
    def reach(self) -> list[float]:
        """All y, and the ends of their intervals."""
        half = self.interval or ()
        ends = [y + sign * e for y, e in zip(self.y, half, strict=False) for sign in (-1, 1)]
        return [*self.y, *ends]


@dataclass(frozen=True)
class Panel:
    """One diagram. On a logarithmic axis, `log`, only points above 0 are drawn."""

    x: str
    y: str
    lines: Sequence[Line]
    title: str = ""
    log: bool = False
    whole: bool = False
    """True if x are whole numbers."""
    from_zero: bool = False
    """True if x begins at 0."""
    names: Mapping[float, str] = field(default_factory=dict)
    """Names of places on the x axis, in place of numbers."""
    frames: Mapping[int, Sequence[Sequence[float]]] = field(default_factory=dict)
    """By epoch, the y of every line; `lines` has the last one's."""
    gallery: Sequence[ClassRow] = ()
    """In place of lines: the images of a task."""

    @property
    def log_axis(self) -> tuple[tuple[float, float], list[float]] | None:
        """Ends and ticks of a logarithmic axis; None for a linear one.

        It is linear, too, if all values are within a factor of 2.
        """
        values = [y for line in self.lines for y in line.reach if 1e-300 < y < 1e300]
        if not self.log or not values or max(values) < 2 * min(values):
            return None
        return log_axis(min(values), max(values))


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one title; `name` is that of its files."""

    name: str
    title: str
    panels: Sequence[Panel]
    note: str = ""


def log_axis(low: float, high: float) -> tuple[tuple[float, float], list[float]]:
    """Ends and ticks of a logarithmic axis that holds two numbers above 0: of 1, 2, 5, 10, ….

    Ticks are decades alone where these are too many.

    >>> log_axis(0.3, 5.0)
    ((0.2, 5.0), [0.2, 0.5, 1.0, 2.0, 5.0])
    >>> log_axis(1e-9, 0.7)[1]
    [1e-09, 1e-08, 1e-07, 1e-06, 1e-05, 0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    first = max(step for step in steps if step <= low * (1 + 1e-9))
    last = min(step for step in steps if step >= high * (1 - 1e-9))
    ticks = [step for step in steps if first <= step <= last]
    if len(ticks) > _MOST_TICKS:
        every = math.ceil(len(decades) / _MOST_TICKS)
        ticks = [float(f"1e{decade}") for decade in decades[::every]]
    return (first, last), [tick for tick in ticks if first <= tick <= last]


def missing() -> list[str]:
    """A note if matplotlib is not installed; otherwise it is made ready to draw into files."""
    try:
        import matplotlib
    except ImportError:
        return ["no plots: matplotlib is not installed (pip install 'metablocks[plot]')"]
    matplotlib.use("agg")
    return []


def save(figure: Figure, folder: Path, kinds: Sequence[str] = ("png",)) -> None:
    """Draw a figure with matplotlib into `folder`, a file for each of `kinds`.

    The legend stands outside of the diagrams, one for all of them.
    """
    from matplotlib import pyplot as plt

    columns = min(_COLUMNS, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    wide = max((len(panel.names) for panel in figure.panels), default=0)
    size = (2.0 + max(4.3 * columns, 0.55 * wide), 1.2 + 3.6 * rows)
    drawn, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    legend: dict[str, Any] = {}
    for panel, axes in zip(figure.panels, grid.flat, strict=False):
        legend |= _draw(panel, axes)
    for axes in grid.flat[len(figure.panels) :]:
        axes.set_axis_off()
    title = _text(figure.title) + f"\n{_text(figure.note)}" * bool(figure.note)
    drawn.suptitle(title, fontsize="medium", wrap=True)
    if legend:
        place, count = "outside lower center", min(2 * columns, len(legend))
        drawn.legend([*legend.values()], [*legend], loc=place, ncols=count, frameon=False)
    for kind in kinds:
        write = partial(drawn.savefig, format=kind, dpi=130, bbox_inches="tight")
        write_atomically(folder / f"{figure.name}.{kind}", write)
    plt.close(drawn)


def _draw(panel: Panel, axes: Any) -> dict[str, Any]:
    """Draw one panel; returns its legend."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

    legend: dict[str, Any] = {}
    axes.set_title(_text(panel.title), fontsize="medium")
    if panel.gallery:
        image, texts = mosaic(panel.gallery)
        axes.imshow(image)
        axes.set_axis_off()
        letters = {"ha": "center", "va": "center", "fontsize": "x-small", "color": "white"}
        plate = {"facecolor": "#333", "edgecolor": "none", "pad": 1}
        for x, y, text in texts:
            axes.text(x, y, text, bbox=plate, **letters)
        return legend
    for line in panel.lines:
        style = {
            "color": line.colour,
            "linewidth": line.width,
            "linestyle": ("--" if line.dashed else "-") if line.width else "",
            "marker": line.marker or None,
            "markersize": 11 if line.marker == "*" else 5,
            "markevery": 0.1 if len(line.x) > 40 and line.width and not panel.names else None,
            "alpha": line.opacity,
        }
        handle = axes.errorbar(line.x, line.y, line.interval, capsize=2, **style)
        if line.label:
            legend.setdefault(_text(line.label), handle)
    axes.set(xlabel=_text(panel.x), ylabel=_text(panel.y))
    axes.ticklabel_format(axis="y", useOffset=False)  # each label says its number whole
    if panel.from_zero:
        axes.set_xlim(left=0)
    if panel.names:
        axes.set_xticks(
            [*panel.names], [*map(_text, panel.names.values())], rotation=60, ha="right"
        )
    elif panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log_axis:
        ends, ticks = panel.log_axis
        axes.set_yscale("log")
        axes.set_ylim(*ends)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    return legend


def _text(text: str) -> str:
    """Text that matplotlib takes as it is: no formulas, and no label that it would hide."""
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
