"""A resolved recipe: plain values, where each came from, its YAML text and its hash."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from metablocks.recipe.parse import Place, Problem, join, scalar
from metablocks.recipe.resolve import DEFAULT

_BARE = re.compile(r"[A-Za-z][\w .()+/*-]*", re.ASCII)


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
        """What the recipe calls itself."""
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
        """Where the value at `path` was written; for part of a value, where the whole was."""
        while path and path not in self.places:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.places.get(path, Place(self.source))

    def written_place(self, path: str) -> Place:
        """As `place`, but for a default the place of the block whose default it is."""
        place = self.place(path)
        while path and place.source.startswith(DEFAULT):
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
            place = self.place(path)
        return place

    def problem(self, path: str, message: str) -> Problem:
        """What is wrong with the value at `path`, where it, or the block whose default it is, stands."""
        return Problem(self.written_place(path), path, message)

    def at(self, path: str) -> Any:
        """The value at a path such as `inner.rule[0].init`, None where there is none."""
        return dict(_nodes(self.values, "")).get(path)

    def to_yaml(self, *, origins: bool = False) -> str:
        """YAML text that loads to the same recipe; with `origins`, each in a comment."""
        lines = list(_lines(self.values, "", 0))
        if not origins:
            return "".join(f"{text}\n" for text, _ in lines)
        width = min(max(len(text) for text, path in lines if path), 60)
        return "".join(
            f"{text:<{width}}  # {origin(self.place(path))}\n" if path else f"{text}\n"
            for text, path in lines
        )


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


def _lines(value: Any, path: str, depth: int, lead: str = "") -> Iterator[tuple[str, str]]:
    """Lines of block-style YAML, each with the path of its leaf, or "" where it has none."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for index, (key, child) in enumerate(pairs):
        here = join(path, key)
        indent = lead if lead and index == 0 else "  " * depth
        start = f"{indent}- " if isinstance(value, list) else f"{indent}{_word(key)}:"
        if _is_leaf(child):
            text = _flow(child) if not isinstance(child, str) else _word(child, bare_commas=True)
            yield f"{start}{' ' if isinstance(value, dict) else ''}{text}", here
        elif isinstance(value, list):
            yield from _lines(child, here, depth + 1, lead=start)
        else:
            yield start, ""
            yield from _lines(child, here, depth + 1)


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_word(k)}: {_flow(v)}' for k, v in value.items())}}}"
    if isinstance(value, str):
        return _word(value)
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value)


def _word(text: str, *, bare_commas: bool = False) -> str:
    """Text as YAML: bare where that is safe, else quoted."""
    bare = text.replace(", ", " ") if bare_commas else text
    if _BARE.fullmatch(bare) and text == text.strip() and scalar(text) == text:
        return text
    quoted = yaml.dump(text, default_style='"', allow_unicode=True, width=2**31)
    return quoted.rstrip("\n")
