"""Panels as figures of plotly.js, plain values: the page hands them to `Plotly.newPlot` as JSON."""

import base64
import gzip
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from metablocks.errors import RecipeError
from metablocks.runs.drawing import Line, Panel

_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "x": "x-thin-open",
}
_FEW = 100  # points with large marks
_MOST = 12  # ticks of whole numbers, one each
_FONT = "system-ui, sans-serif"


def library() -> str:
    """The code of plotly.js, compressed by gzip, in base64.

    Raises `RecipeError` if Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError:
        words = "no report: plotly is not installed (pip install 'metablocks[plot]')"
        raise RecipeError(words) from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def plotly(panel: Panel) -> dict[str, Any]:
    """Data and layout of a panel, and where it has frames, the y of every trace by epoch.

    Text is escaped, as plotly.js takes tags in it. nan and infinity become null, which breaks a line.

    >>> plotly(Panel("step", "loss <b>", [Line([0], [math.nan])]))["data"][0]["y"]
    [None]
    """
    figure = {"data": [_trace(line) for line in panel.lines], "layout": _layout(panel)}
    if panel.frames:
        frames = {epoch: list(map(_numbers, ys)) for epoch, ys in panel.frames.items()}
        figure["frames"] = {str(epoch): ys for epoch, ys in frames.items()}
    return figure


def _trace(line: Line) -> dict[str, Any]:
    marker: dict[str, Any] = {}
    if line.marker:
        cross, small = line.marker == "x", 7 if len(line.x) <= _FEW else 4
        marker = {"symbol": _SYMBOLS[line.marker], "color": line.colour}
        marker["size"] = 12 if cross or line.marker == "*" else small
        marker["line"] = {"width": 2 if cross else 0, "color": line.colour}
    modes = [mode for mode, there in (("lines", line.width), ("markers", line.marker)) if there]
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": _numbers(line.x),
        "y": _numbers(line.y),
        "mode": "+".join(modes),
        "name": escape(line.label),
        "showlegend": bool(line.label),
        "opacity": line.opacity,
        "marker": marker,
        "line": {
            "color": line.colour,
            "width": line.width,
            "dash": "dash" if line.dashed else "solid",
        },
        "hoverinfo": "x+y+name" if line.label else "x+y",
    }
    if line.interval is not None:
        trace["error_y"] = {"type": "data", "array": _numbers(line.interval), "thickness": 1.2}
    if line.notes:
        trace |= {"text": list(map(escape, line.notes)), "hoverinfo": "text+y+name"}
    if line.width < 1 and line.opacity < 1:
        trace["hoverinfo"] = "skip"
    return trace


def _layout(panel: Panel) -> dict[str, Any]:
    axis = {"automargin": True, "zeroline": False, "ticks": "outside", "tickcolor": "#ccc"}
    x: dict[str, Any] = {"title": {"text": escape(panel.x)}, **axis}
    y: dict[str, Any] = {"title": {"text": escape(panel.y)}, **axis}
    if panel.names:
        x |= {"tickvals": [*panel.names], "ticktext": list(map(escape, panel.names.values()))}
        x |= {"tickangle": -90}  # a slanted label that is long ends beyond the chart
    elif panel.whole:
        values = [x for line in panel.lines for x in line.x if math.isfinite(x)]
        x |= {"tickformat": "d"} | ({"dtick": 1} if max(values) - min(values) <= _MOST else {})
    if panel.from_zero:
        x["rangemode"] = "tozero"
    if panel.log_axis:
        ends, ticks = panel.log_axis
        y |= {"type": "log", "range": list(map(math.log10, ends))}
        y |= {"tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    elif panel.frames:
        every = [v for ys in panel.frames.values() for each in ys for v in each if math.isfinite(v)]
        room = 0.05 * (max(every) - min(every)) or 0.01
        y["range"] = [min(0.0, min(every) - room), max(every) + room]
        y |= {"zeroline": True, "zerolinecolor": "#767676"}
    return {
        "xaxis": x,
        "yaxis": y,
        "height": 420,
        "margin": {"l": 50, "r": 12, "t": 12, "b": 40},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        "font": {"family": _FONT, "size": 13, "color": "#1a1a1a"},
        "plot_bgcolor": "#fff",
        "paper_bgcolor": "#fff",
        "hovermode": "closest",
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON, of a few digits."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in map(float, values)]
