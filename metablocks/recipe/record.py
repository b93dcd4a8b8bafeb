"""A resolved recipe: plain values, their origins, its YAML text and its hash."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from metablocks.recipe.parse import Place, Problem, join, nodes, parse, scalar
from metablocks.recipe.resolve import DEFAULT


@dataclass(frozen=True)
class Recipe:
    """A complete statement of one experiment, defaults included. Made by `load` or `from_text`.

    `values` are plain (dicts, lists, scalars) and are not to be changed; `places` says for every
    path in them where it was written; `notes` is what overrides cleared; `allow` is the packages
    that blocks may come from.

    Law: `from_text(recipe.to_yaml(), allow=recipe.allow)` has the same values and the same hash.
    """

    source: str
    values: dict[str, Any]
    places: dict[str, Place] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that the recipe states."""
        name: str = self.values["name"]
        return name

    @property
    def hash(self) -> str:
        """SHA-256, in hex, of the canonical JSON of the resolved values."""
        text = json.dumps(self.values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def origins(self) -> dict[str, str]:
        """For every leaf: `file:line`, `--set`, or `default of LearningRate`."""
        return {path: origin(self.place(path)) for path in dict(leaves(self.values))}

    def place(self, path: str) -> Place:
        """The place of the value at `path`; for part of a value, that of the whole."""
        while path and path not in self.places:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.places.get(path, Place(self.source))

    def written_place(self, path: str) -> Place:
        """The same, but for a default the place of the block whose default it is."""
        place = self.place(path)
        while path and place.source.startswith(DEFAULT):
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
            place = self.place(path)
        return place

    def problem(self, path: str, message: str) -> Problem:
        """A problem of the value at `path`, at its written place."""
        return Problem(self.written_place(path), path, message)

    def at(self, path: str) -> Any:
        """The value at a path such as `inner.rule[0].init`, None if there is none."""
        return dict(_nodes(self.values, "")).get(path)

    def to_yaml(self, *, origins: bool = False) -> str:
        """YAML text that loads to the same recipe; with `origins`, each in a comment."""
        text: str = yaml.dump(
            self.values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31
        )
        if not origins:
            return text
        paths = dict(leaves(self.values))
        written = {n.at.line: p for p, n in nodes(parse(text, "", [])) if p in paths}
        lines = text.splitlines()
        width = min(max(len(lines[number - 1]) for number in written), 60)
        for number, path in written.items():
            lines[number - 1] = f"{lines[number - 1]:<{width}}  # {origin(self.place(path))}"
        return "\n".join([*lines, ""])


def origin(place: Place) -> str:
    """A place in the few words of a comment.

    >>> origin(Place("recipes/x.yaml", 7, 5)), origin(Place("--set inner.steps=3"))
    ('recipes/x.yaml:7', '--set')
    """
    if place.line:
        return f"{place.source}:{place.line}"
    return "--set" if place.source.startswith("--set") else place.source


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path. A list without mappings is one leaf.

    >>> list(leaves({"inner": {"adapt": ["*"], "rule": [{"init": 0.1}]}}))
    [('inner.adapt', ['*']), ('inner.rule[0].init', 0.1)]
    """
    for here, value in _nodes(values, path):
        if _is_leaf(value) and here:
            yield here, value


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if not _is_leaf(value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from _nodes(child, join(path, key))


def _is_leaf(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(item, dict) for item in value)
    return not isinstance(value, dict) or not value


class _Dumper(yaml.SafeDumper):
    """Block style, but a list of scalars in one line, and text quoted if it could be read otherwise."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    bare = text.isprintable() and scalar(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if bare else '"')


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=_is_leaf(items))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
