"""A resolved recipe: plain values, their origins, its YAML text and its hash."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from metablocks.errors import one_line
from metablocks.recipe.parse import Place, Problem, join, nodes, parse, scalar
from metablocks.recipe.resolve import DEFAULT

Differences = list[tuple[str, Any, Any]]
"""Paths of leaves, each with its two values."""


@dataclass(frozen=True)
class Recipe:
    """A complete statement of one experiment, defaults included. Made by `load` or `from_text`.

    `values` are plain (dicts, lists, scalars) and are not to be changed; `places` says for every
    path in them where it was written; `notes` is what overrides cleared, schedules that do not fit the
    training, and what a precision costs; `allow` is the packages that blocks may come from.

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
        return _digest(self.values)

    @property
    def written_hash(self) -> str:
        """The hash without the fields that were left out in the file.

        Law: it is the hash of a run's recipe, whatever fields recipes have been given since.
        """
        return _digest(self._written(self.values, ""))

    @property
    def origins(self) -> dict[str, str]:
        """For every leaf: `file:line`, `--set`, or `default of LearningRate`."""
        return {path: origin(self.place(path)) for path in dict(leaves(self.values))}

    def place(self, path: str) -> Place:
        """The place of the value at `path`; for part of a value, that of the whole."""
        while path and path not in self.places:
            path = _above(path)
        return self.places.get(path, Place(self.source))

    def written_place(self, path: str) -> Place:
        """The same, but for a default the place of the block whose default it is."""
        place = self.place(path)
        while path and place.source.startswith(DEFAULT):
            path = _above(path)
            place = self.place(path)
        return place

    def problem(self, path: str, message: str) -> Problem:
        """A problem of the value at `path`, at its written place."""
        return Problem(self.written_place(path), path, message)

    def at(self, path: str) -> Any:
        """The value at a path such as `inner.rule[0].init`, None if there is none."""
        here = ""
        value: Any = self.values
        while here != path:
            below = ((join(here, key), child) for key, child in _children(value))
            found = ((p, v) for p, v in below if path == p or path.startswith((f"{p}.", f"{p}[")))
            here, value = next(found, (path, None))
        return value

    def changes_of(self, values: dict[str, Any]) -> Differences:
        """The leaves in which it differs from the values of a run, with theirs and its own.

        A field that they lack, and that is at its default here, is newer than the run.
        """
        return [
            (path, its, own)
            for path, its, own in differing(values, self.values)
            if its is not None or not self._is_default(path)
        ]

    def _is_default(self, path: str) -> bool:
        return self.place(path).source.startswith(DEFAULT)

    def _written(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {
                key: self._written(child, join(path, key))
                for key, child in value.items()
                if not self._is_default(join(path, key))
            }
        if isinstance(value, list):
            return [self._written(child, join(path, i)) for i, child in enumerate(value)]
        return value

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


def differing(one: dict[str, Any], other: dict[str, Any]) -> Differences:
    """The leaves in which two values differ, with both values; None for a leaf that one lacks.

    >>> differing({"tasks": {"ways": 5, "shots": 1}}, {"tasks": {"ways": 20, "shots": 1}})
    [('tasks.ways', 5, 20)]
    """
    left, right = dict(leaves(one)), dict(leaves(other))
    return [
        (path, left.get(path), right.get(path))
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def changes_text(changes: Differences) -> str:
    """The differences, in a line.

    >>> changes_text([("inner.steps", 1, 2), ("outer.clip", None, 10.0)])
    'inner.steps: 1 → 2; outer.clip: absent → 10.0'
    """
    return "; ".join(f"{path}: {shown_value(a)} → {shown_value(b)}" for path, a, b in changes)


def shown_value(value: Any) -> str:
    """A leaf's value in a message."""
    return "absent" if value is None else one_line(str(value))


def _above(path: str) -> str:
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    for key, child in _children(value):
        yield from _nodes(child, join(path, key))


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if _is_leaf(value):
        return ()
    return value.items() if isinstance(value, dict) else enumerate(value)


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
