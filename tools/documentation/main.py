"""Pages of the reference and the cookbook, by pdoc.

pdoc, and not Sphinx: the docstrings are plain text with names in backticks, which pdoc reads as they
are, links where a name is one of the package, and renders by itself, without a second tree of files
that says what stands where.

A reference is a name in backticks that begins with `metablocks.` or `mb.`, or is a class (`LikeThis`).
"""

import argparse
import builtins
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pdoc
import torch.utils.data
from torch.nn import parallel

import metablocks as mb

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (
    "metablocks",
    "metablocks.rules",
    "metablocks.tasks",
    "metablocks.models",
    "metablocks.estimators",
    "metablocks.executors",
    "metablocks.recipe",
    "metablocks.runs",
    "metablocks.verify",
    "metablocks.errors",
    "metablocks.laws",
    "metablocks.laws.rules",
    "metablocks.laws.orders",
    "metablocks.laws.step_losses",
    "metablocks.laws.estimators",
    "metablocks.laws.executors",
    "metablocks.laws.norms",
    "metablocks.laws.sources",
)
ELSEWHERE = {
    *("AutoModelForCausalLM", "AutoModelForImageClassification"),  # of transformers
    *("KShots", "NWays", "TaskDataset"),  # of learn2learn
}
_LINK, _ANCHOR = re.compile(r'<a\b[^>]*?\bhref="([^"]+)"'), re.compile(r'<[^>]*?\bid="([^"]+)"')
_SCRIPT = re.compile(r"<script.*?</script>", re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"(?:(?:metablocks|mb)(?:\.\w+)+|(?:[A-Z]+[a-z]+\w*))")


def main() -> int:
    """Build the pages; returns the number of references that lead nowhere, 1 at most."""
    parser = argparse.ArgumentParser(prog="tools/docs", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pages go")
    folder = parser.parse_args().folder
    wrong = build(folder)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{folder / 'index.html'}" if not wrong else f"{len(wrong)} references lead nowhere")
    return min(len(wrong), 1)


def build(folder: Path, cookbook: Path = ROOT / "recipes" / "python") -> list[str]:
    """Write the pages; returns what is wrong with them, a line each. Warnings of pdoc are errors."""
    examples = sorted(path for path in cookbook.glob("*.py") if not path.stem.startswith("test_"))
    sys.path.insert(0, str(cookbook))
    try:
        names = [path.stem for path in examples]
        pdoc.render.configure(docformat="markdown", search=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            alone = [spec for name in REFERENCE for spec in (name, rf"!{name}\..+")]
            pdoc.pdoc(*alone, *names, output_directory=folder)
        modules = [importlib.import_module(name) for name in (*REFERENCE, *names)]
    finally:
        sys.path.remove(str(cookbook))
        for path in examples:
            sys.modules.pop(path.stem, None)
    return [*mend_links(folder), *dead_names(modules)]


def mend_links(folder: Path) -> list[str]:
    """Links between the pages that lead to no page, or no place on it.

    Where pdoc links a member that has no place of its own, an inherited field or a method of
    `nn.Module`, the link leads to its class.
    """
    pages = {p: p.read_text(encoding="utf-8") for p in folder.resolve().rglob("*.html")}
    anchors = {path: set(_ANCHOR.findall(text)) for path, text in pages.items()}
    wrong = []
    for path, text in pages.items():
        for link in set(_LINK.findall(_SCRIPT.sub("", text))):
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if ":" in file:
                continue  # another site
            if target not in pages:
                wrong.append(f"{path.name}: no such page: {link}")
            elif anchor and anchor not in anchors[target]:
                if anchor.rpartition(".")[0] in anchors[target]:
                    text = text.replace(f'href="{link}"', f'href="{link.rpartition(".")[0]}"')
                else:
                    wrong.append(f"{path.name}: no such place: {link}")
        path.write_text(text, encoding="utf-8")
    return wrong


def dead_names(modules: list[Any]) -> list[str]:
    """References in docstrings of public names, and of the modules, to what there is not."""
    wrong = []
    for place, owner, text in (item for module in modules for item in _texts(module)):
        prose = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(">>>"))
        for code in _CODE.findall(prose):
            name = _NAME.fullmatch(code.removesuffix("()"))
            if name and not _is_known(name[0], owner):
                wrong.append(f"{place}: no such name: {code}")
    return wrong


def _texts(module: Any) -> Iterator[tuple[str, Any, str]]:
    yield module.__name__, module, inspect.getdoc(module) or ""
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            text = inspect.getdoc(value)
            if not text:
                raise SystemExit(f"{module.__name__}.{name} has no docstring")
            yield f"{module.__name__}.{name}", sys.modules[value.__module__], text


def _is_known(name: str, owner: Any) -> bool:
    rest = name.partition(".")[2]
    if not rest:
        spaces = [owner, mb, mb.tasks, mb.errors, builtins]
        spaces += [torch, torch.nn, torch.utils.data, parallel]
        return name in ELSEWHERE or any(hasattr(space, name) for space in spaces)
    try:
        pkgutil.resolve_name(f"metablocks.{rest}")
    except (ImportError, AttributeError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
