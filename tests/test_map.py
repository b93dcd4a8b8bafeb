"""The README's map is true: it names every room, imports point down it, and there is no circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metablocks

PACKAGE = Path(metablocks.__file__).parent
README = PACKAGE.parent / "README.md"


def rooms():
    """The names of the map's rooms, from the top down: `cli`, `recipe`, …"""
    text = README.read_text(encoding="utf-8").split("## The map")[1].split("```")[1]
    # At the beginning of a line, one or two spaces apart.
    named = re.findall(r"^\w+(?:\.py|/)(?: {1,2}\w+(?:\.py|/))*", text, re.MULTILINE)
    return [room for line in named for room in re.findall(r"(\w+)(?:\.py|/)", line)]


def modules():
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(path, known):
    """The modules of the package that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in known)


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: {*imports(path, known)} - {name} for name, path in known.items()}


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_the_map_names_every_room_once():
    assert sorted(rooms()) == sorted({room(name) for name in modules()} - {""})


def test_imports_point_down_the_map(graph):
    rank = {name: place for place, name in enumerate(rooms())}
    up = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room(module) and (not room(other) or rank[room(other)] < rank[room(module)])
    ]
    assert not up


def test_no_files_import_each_other_in_a_circle(graph):
    # A package's __init__ gathers its files; who imports the package means one of these.
    TopologicalSorter(graph).prepare()
