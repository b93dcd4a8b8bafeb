"""The page: sections as HTML, with plotly.js and all else inside, so that it loads nothing.

Everything that a user may have written (names, labels, messages) goes through `escape`.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from metablocks.report.interactive import plotly
from metablocks.runs.drawing import Figure
from metablocks.runs.gallery import ClassRow, Image

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  padding: 0 16px 48px; max-width: 1200px; }}
h1 {{ font-size: 1.6rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.3rem; border-top: 2px solid #ccc; padding-top: 16px; margin-top: 40px;
  overflow-wrap: anywhere; }}
h3 {{ font-size: 1.05rem; margin-bottom: 4px; overflow-wrap: anywhere; }}
p {{ margin: 4px 0 8px; overflow-wrap: anywhere; }}
.note {{ color: #555; }}
.wide {{ overflow-x: auto; max-width: 100%; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 3px 10px 3px 0; text-align: left;
  vertical-align: top; white-space: nowrap; }}
.panels {{ display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }}
.panel {{ min-width: 0; overflow-x: auto; }}
.panel:not(:hover) .modebar {{ visibility: hidden; }}
.panel h4 {{ margin: 4px 0; font-size: 0.95rem; font-weight: 600; }}
.slider {{ display: flex; gap: 12px; align-items: center; flex-wrap: wrap; margin: 8px 0; }}
.slider input {{ flex: 1 1 200px; max-width: 600px; min-width: 0; }}
.row {{ display: flex; gap: 3px; flex-wrap: wrap; align-items: flex-start; margin: 4px 0; }}
.row figure {{ margin: 0; text-align: center; font-size: 0.8rem; line-height: 1.2; }}
.row img {{ display: block; width: 42px; height: 42px; border: 3px solid #fff;
  image-rendering: pixelated; }}
.row .right img {{ border-color: #00783c; }}
.row .wrong img {{ border-color: #be1428; }}
.row .wrong {{ color: #a00f20; }}
.row .support {{ background: #eee; }}
summary {{ cursor: pointer; padding: 6px 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<noscript><p>The charts of this page need JavaScript; nothing is loaded.</p></noscript>
{body}
<script type="text/plain" id="library">{library}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
(async () => {{
  const text = document.getElementById("library").textContent;
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  (0, eval)(await new Response(stream).text());
  const figures = JSON.parse(document.getElementById("figures").textContent);
  for (const [id, figure] of Object.entries(figures)) {{
    const place = document.getElementById(id);
    const labels = figure.data.filter(trace => trace.showlegend).length;
    if (place.clientWidth < 500) figure.layout.height += 18 * labels;
    if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false; // a finger scrolls
    await Plotly.newPlot(place, figure.data, figure.layout, {{responsive: true, displaylogo: false}});
    if (!figure.frames) continue;
    const epochs = Object.keys(figure.frames);
    const slider = document.getElementById(id + "-slider");
    const shown = document.getElementById(id + "-epoch");
    slider.addEventListener("input", () => {{
      const epoch = epochs[slider.value];
      shown.textContent = epoch;
      slider.setAttribute("aria-valuetext", "epoch " + epoch);
      Plotly.restyle(place, {{y: figure.frames[epoch]}});
    }});
  }}
  document.body.dataset.drawn = "true";
}})();
</script>
</body>
</html>
"""


class Page:
    """A page in the making: sections go in one after the other, `html` closes it.

    >>> page = Page("a & b")
    >>> page.text("c < d")
    >>> "<h1>a &amp; b</h1>" in page.html(""), "<p>c &lt; d</p>" in page.html("")
    (True, True)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._figures: dict[str, dict[str, Any]] = {}

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        self._parts.append(
            f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"
        )

    def table(self, rows: Sequence[Sequence[str]], summary: str = "") -> None:
        """A table with a head, which scrolls sideways; folded behind a `summary`, if there is one."""
        head, *body = [[escape(cell) for cell in row] for row in rows]
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
        table = f'<div class="wide" tabindex="0"><table>{"".join(lines)}</table></div>'
        if summary:
            table = f"<details><summary>{escape(summary)}</summary>{table}</details>"
        self._parts.append(table)

    def figure(self, figure: Figure) -> None:
        """A figure with its title: charts that move, or a gallery of images."""
        self._parts.append(f"<h3>{escape(figure.title)}</h3>")
        if figure.note:
            self.text(figure.note, "note")
        self._parts.append('<div class="panels">')
        for panel in figure.panels:
            self._parts.append('<div class="panel">')
            if panel.title and not panel.frames:
                self._parts.append(f"<h4>{escape(panel.title)}</h4>")
            if panel.gallery:
                self._parts.append(_gallery(panel.gallery))
            else:
                name = f"figure{len(self._figures)}"
                self._figures[name] = plotly(panel)
                if panel.frames:
                    self._parts.append(_slider(name, [*panel.frames]))
                places = len(panel.lines[0].x) if panel.names else 0
                self._parts.append(f'<div id="{name}" style="min-width: {9 * places}px"></div>')
            self._parts.append("</div>")
        self._parts.append("</div>")

    def html(self, library: str) -> str:
        """The whole page, with the `library` that draws its charts."""
        figures = json.dumps(self._figures, separators=(",", ":"), allow_nan=False)
        return _PAGE.format(
            title=escape(self.title),
            body="\n".join(self._parts),
            library=library,
            figures=figures.replace("<", "\\u003c"),
        )


def _slider(name: str, epochs: Sequence[int]) -> str:
    last = len(epochs) - 1
    return (
        f'<div class="slider"><label for="{name}-slider">epoch</label>'
        f'<input type="range" id="{name}-slider" min="0" max="{last}" value="{last}" '
        f'aria-valuetext="epoch {epochs[-1]}"><output id="{name}-epoch">{epochs[-1]}</output></div>'
    )


def _gallery(rows: Sequence[ClassRow]) -> str:
    return "".join(f'<div class="row">{"".join(_class_row(row))}</div>' for row in rows)


def _class_row(row: ClassRow) -> Iterator[str]:
    for image in row.support:
        yield _image(image, "support", f"class {row.number}")
    for image, predicted in row.query:
        kind = "right" if predicted == row.number else "wrong"
        yield _image(image, kind, f"→ {predicted}")


def _image(image: Image, kind: str, words: str) -> str:
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(image).save(file, "WEBP", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure class="{kind}"><img alt="{kind}: {escape(words)}" '
        f'src="data:image/webp;base64,{data}"><figcaption>{escape(words)}</figcaption></figure>'
    )
