"""The page: `page.html`, a template, with plotly.js and all else inside, so that it loads nothing.

Everything that a user may have written (names, labels, messages) is escaped by the template.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from metablocks.report.interactive import plotly
from metablocks.runs.drawing import Figure
from metablocks.runs.gallery import ClassRow, Image


class Page:
    """A page in the making: sections go in one after the other, `html` closes it.

    >>> page = Page("a & b")
    >>> page.text("c < d")
    >>> "<h1>a &amp; b</h1>" in page.html(""), "<p>c &lt; d</p>" in page.html("")
    (True, True)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[dict[str, Any]] = []
        self._charts: dict[str, dict[str, Any]] = {}

    def heading(self, text: str) -> None:
        self._parts.append({"heading": text})

    def text(self, text: str, kind: str = "") -> None:
        self._parts.append({"text": text, "kind": kind})

    def table(self, rows: Sequence[Sequence[str]], summary: str = "") -> None:
        """A table with a head, which scrolls sideways; folded behind a `summary`, if there is one."""
        self._parts.append({"table": rows, "summary": summary})

    def figure(self, figure: Figure) -> None:
        """A figure with its title: charts that move, or a gallery of images."""
        panels = []
        for panel in figure.panels:
            name = f"figure{len(self._charts)}"
            if not panel.gallery:
                self._charts[name] = plotly(panel)
            panels.append((panel, name, [[*_pictures(row)] for row in panel.gallery]))
        self._parts.append({"figure": figure, "panels": panels})

    def html(self, library: str) -> str:
        """The whole page, with the `library` that draws its charts."""
        folder = FileSystemLoader(Path(__file__).parent)
        environment = Environment(
            loader=folder,
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        options = {"separators": (",", ":"), "allow_nan": False}
        environment.policies["json.dumps_kwargs"] = options
        template = environment.get_template("page.html")
        return template.render(
            title=self.title, parts=self._parts, library=library, charts=self._charts
        )


def _pictures(row: ClassRow) -> Iterator[tuple[str, str, str]]:
    """Kind, words and data of the images of a class."""
    for image in row.support:
        yield "support", f"class {row.number}", _webp(image)
    for image, predicted in row.query:
        kind = "right" if predicted == row.number else "wrong"
        yield kind, f"→ {predicted}", _webp(image)


def _webp(image: Image) -> str:
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(image).save(file, "WEBP", quality=85)
    return base64.b64encode(file.getvalue()).decode()
