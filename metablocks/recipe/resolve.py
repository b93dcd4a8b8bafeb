"""A tree of values to a resolved recipe: every field checked, every default filled in.

Sections of `layout` and blocks are read alike, each by its own signature. All problems are collected;
nothing is constructed here.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import to_jsonable_python

from metablocks.errors import RecipeError, suggest_then
from metablocks.recipe import schema
from metablocks.recipe.layout import RecipeLayout, is_section, slot_of
from metablocks.recipe.parse import Node, Place, Problem, join, nodes, show
from metablocks.recipe.schema import INVALID, Field
from metablocks.recipe.slots import MOVED, SLOTS, Slot, find

DEFAULT = "default of"


def resolve(
    root: Node, allow: Collection[str], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Place]]:
    """The resolved plain values, and the place of every section, block and field by its path.

    Fields with problems are left out of the values.
    """
    reader = _Reader(allow, problems, {path: node.place for path, node in nodes(root)})
    values = reader.fields(root, schema.fields(RecipeLayout), "", "the recipe")
    return values, reader.origins


@dataclass
class _Reader:
    allow: Collection[str]
    problems: list[Problem]
    origins: dict[str, Place]

    def fields(
        self, node: Node, known: Mapping[str, Field], path: str, owner: str = ""
    ) -> dict[str, Any]:
        """The values of a block, section or group, without those that have a problem.

        `owner` is whose defaults stand for fields that are left out; without it, nothing does.
        """
        names, values = ", ".join(known), dict[str, Any]()
        if not isinstance(node.value, dict):
            self.refuse(node.place, path, f"takes a mapping of {names}, given {show(node)}")
            return values
        for name in node.value.keys() - known.keys():
            words = f"it takes: {names}" if names else "it takes no fields"
            message = f"unknown field{suggest_then(name, known, words)}"
            if moved := MOVED.get((owner, name)):
                message = f"is now {moved}"
            self.refuse(node.value[name].at, join(path, name), message)
        for name, field in known.items():
            here, value = join(path, name), INVALID
            if name in node.value:
                value = self.value(node.value[name], field, known, here)
            elif owner and field.required:
                takes = schema.describe(field.annotation)
                self.refuse(node.at, here, f"missing; it takes {takes}" if takes else "missing")
            elif owner and schema.is_plain(field.default):
                self.origins[here] = Place(f"{DEFAULT} {owner}")
                value = to_jsonable_python(field.default)
            if value is not INVALID:
                values[name] = value
        return values

    def value(self, node: Node, field: Field, known: Mapping[str, Field], path: str) -> Any:
        mark = slot_of(field.annotation)
        if is_section(field.annotation):
            return self.fields(node, schema.fields(field.annotation), path, "the recipe")
        if mark and (node.value is not None or field.default is not None):
            return self.slot(node, mark, path)
        if isinstance(node.value, dict) and schema.is_groups(field):
            options = {name: other for name, other in known.items() if other is not field}
            groups = node.value.items()
            return {pattern: self.fields(n, options, join(path, pattern)) for pattern, n in groups}
        checked = schema.check(node, field.annotation, path, self.problems)
        return INVALID if checked is INVALID else to_jsonable_python(checked)

    def slot(self, node: Node, mark: Any, path: str) -> Any:
        slot = SLOTS[mark.slot]
        if mark.at_least is None:
            return self.block(node, slot, path)
        if not isinstance(node.value, list) or len(node.value) < mark.at_least:
            given = "an empty list" if node.value == [] else show(node)
            example = f"[{{block: {next(iter(slot.blocks))}, …}}]"
            message = f"takes a list of blocks, such as {example}, given {given}"
            return self.refuse(node.place, path, message)
        items = [self.block(n, slot, join(path, i)) for i, n in enumerate(node.value)]
        return INVALID if INVALID in items else items

    def block(self, node: Node, slot: Slot, path: str) -> Any:
        names = ", ".join(slot.blocks)
        if isinstance(node.value, str):
            node = Node({"block": Node(node.value, node.place, node.place)}, node.place, node.key)
        if not isinstance(node.value, dict):
            message = f"takes a block, {{block: name, …}}, given {show(node)}; there are: {names}"
            return self.refuse(node.place, path, message)
        if "block" not in node.value:
            return self.refuse(node.at, path, f"has no block; it takes block: one of {names}")
        name_path = join(path, "block")
        name = schema.check(node.value["block"], str, name_path, self.problems)
        if name is INVALID:
            return INVALID
        try:
            target = find(slot, name, self.allow)
            known, before = schema.fields(target, slot.context), len(self.problems)
            if len(node.value) == 1 and (message := _not_called(target, slot, name, known)):
                return self.refuse(node.value["block"].place, name_path, message)
            others = {key: child for key, child in node.value.items() if key != "block"}
            values = self.fields(
                replace(node, value=others), known, path, getattr(target, "__name__", name)
            )
        except RecipeError as error:
            return self.refuse(node.value["block"].place, name_path, str(error))
        return INVALID if len(self.problems) > before else {"block": name, **values}

    def refuse(self, place: Place, path: str, message: str) -> Any:
        self.problems.append(Problem(place, path, message))
        return INVALID


def _not_called(target: Any, slot: Slot, name: str, known: Mapping[str, Field]) -> str:
    """A message on a function that a recipe, which gives it nothing, cannot call; else empty."""
    missing = [field.name for field in known.values() if field.required]
    if not missing or not inspect.isfunction(target) or ":" not in name:
        return ""
    short = name.rpartition(":")[2]
    return (
        f"{short} is called to make the {slot.name} block, with fields of the recipe, which gives no "
        f"{', '.join(missing)}. If it is the block itself, name a function that returns it: def "
        f"make(): return {short}"
    )
