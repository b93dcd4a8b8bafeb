"""Overrides: `--set inner.steps=3` applied to the tree of a recipe, from left to right.

The value is YAML, read as strictly as the file. A path may end at a field that the file leaves to
its default; whether the field exists is for the schema to say. Replacing a `block` keeps the fields
that the new one takes, too, with these values, and clears the others.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metablocks.errors import RecipeError, one_line
from metablocks.recipe import schema
from metablocks.recipe.layout import slot_paths
from metablocks.recipe.parse import Node, Place, Problem, join, parse_value, plain
from metablocks.recipe.slots import SLOTS, Slot, find

_WORD, _INDEX, _KEY = r"[A-Za-z_][A-Za-z0-9_-]*", r"\[[0-9]{1,6}\]", r'\["(?:[^"\\]|\\.)*"\]'
_PATH = re.compile(rf"(?:{_WORD}|{_KEY})(?:\.{_WORD}|{_INDEX}|{_KEY})*")
_STEP = re.compile(rf"\.?({_WORD})|({_INDEX}|{_KEY})")


def apply_overrides(
    root: Node, overrides: Sequence[str], problems: list[Problem], allow: Collection[str] = ()
) -> tuple[Node, list[str]]:
    """The tree with every `path=value` applied, and notes on what that kept and cleared of a block.

    Appends to `problems` what cannot be applied. The given tree is not changed.

    >>> from metablocks.recipe.parse import parse
    >>> root = parse("inner: {steps: 5, order: {block: truncated, last: 2}}", "x.yaml", [])
    >>> root, notes = apply_overrides(root, ["inner.steps=3", "inner.order.block=final"], [])
    >>> plain(root)
    {'inner': {'steps': 3, 'order': {'block': 'final'}}}
    >>> notes
    ['--set inner.order.block=final: cleared last, which belonged to truncated']

    `allow` is the packages that a block may come from.
    """
    notes: list[str] = []
    for override in overrides:
        source = f"--set {one_line(override)}"
        try:
            path, value = _split(override, source, problems)
            root = _Override(source, value, allow, notes).assign(root, path)
        except RecipeError as error:
            message = str(error).removeprefix(f"{source}: ")
            problems.append(Problem(Place(source), "", message))
    return root, notes


def _split(override: str, source: str, problems: list[Problem]) -> tuple[list[str | int], Node]:
    name, equals, text = _cut(override)
    if not equals:
        raise RecipeError("no = in it; it takes path=value, such as inner.steps=3")
    try:
        if not _PATH.fullmatch(name):
            raise ValueError
        steps = [word or json.loads(key[1:-1]) for word, key in _STEP.findall(name)]
        if not all(str(step).isprintable() for step in steps):  # as no key of a file is
            raise ValueError
    except ValueError:
        raise RecipeError(
            f'"{name}" is no path; it takes fields and entries, such as inner.rule[0].init'
        ) from None
    return steps, parse_value(text, source, problems)


def _cut(override: str) -> tuple[str, str, str]:
    """Cut at the first `=` outside a quoted path step."""
    match = re.match(r'((?:[^="]|"(?:[^"\\]|\\.)*")*)(=?)(.*)', override, re.DOTALL)
    assert match is not None
    name, equals, text = match.groups()
    return name.strip(), equals, text


@dataclass(frozen=True)
class _Override:
    source: str
    value: Node
    allow: Collection[str]
    notes: list[str]

    def assign(self, node: Node, path: list[str | int], at: str = "") -> Node:
        """The node, which stands at `at`, with the value at a path below it."""
        if not path:
            if _slot(at) and _fields(node) and _name(self.value) != _name(node):
                self.note(node, {})
            return replace(self.value, key=node.key and self.value.place)
        step, *rest = path
        if isinstance(step, int):
            if not isinstance(node.value, list):
                raise RecipeError(f"{at} is not a list; it has no [{step}]")
            if step >= len(node.value):
                count = f"{len(node.value)} {'entry' if len(node.value) == 1 else 'entries'}"
                raise RecipeError(f"{at} has {count}; there is no [{step}]")
            items = list(node.value)
            items[step] = self.assign(items[step], rest, join(at, step))
            return replace(node, value=items)
        slot = _slot(at)
        if isinstance(node.value, str) and slot:  # the shorthand of {block: name}
            node = replace(node, value={"block": Node(node.value, node.place)})
        if node.value is None:
            node = replace(node, value={})
        if not isinstance(node.value, dict):
            kind = "a list" if isinstance(node.value, list) else "one value"
            hint = f"; say which entry: {at}[0].{step}" if kind == "a list" else ""
            raise RecipeError(f'{at} is {kind}; it has no field "{step}"{hint}')
        entries = dict(node.value)
        if step == "block" and not rest and slot and _name(self.value) != _name(node):
            entries = _kept(node, slot, plain(self.value), self.allow)
            self.note(node, entries)
        place = Place(self.source)
        old = entries.get(step, Node(None, place, key=place))
        entries[step] = self.assign(old, rest, join(at, step))
        return replace(node, value=entries)

    def note(self, node: Node, kept: Collection[str]) -> None:
        """Add a note on the fields that a block loses, if there are any."""
        cleared = [name for name in _fields(node) if name not in kept]
        if cleared:
            owner = f", which belonged to {_name(node)}" if _has_block(node) else ""
            rest = f"; kept {', '.join(kept)}" if kept else ""
            self.notes.append(f"{self.source}: cleared {', '.join(cleared)}{owner}{rest}")


def _slot(path: str) -> Slot | None:
    bare, index = re.sub(r"\[\d+\]$", "", path), path.endswith("]")
    mark = slot_paths().get(bare)
    return None if mark is None or index == (mark.at_least is None) else SLOTS[mark.slot]


def _kept(node: Node, slot: Slot, block: Any, allow: Collection[str]) -> dict[str, Node]:
    """The fields of a block that another one takes, too, with these values."""
    try:
        fields = schema.fields(find(slot, block, allow), slot.context)
        return {
            name: node.value[name]
            for name in _fields(node)
            if name in fields and schema.fits(node.value[name], fields[name].annotation)
        }
    except (RecipeError, TypeError):  # which `resolve` reports, with the place
        return {}


def _name(node: Node) -> object:
    """The block's name: of a mapping its `block`, of shorthand itself."""
    return plain(node.value["block"]) if _has_block(node) else plain(node)


def _has_block(node: Node) -> bool:
    return isinstance(node.value, dict) and "block" in node.value


def _fields(node: Node) -> list[str]:
    return [key for key in node.value if key != "block"] if isinstance(node.value, dict) else []
