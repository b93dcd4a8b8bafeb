"""A tree of values to a resolved recipe: every field checked, every default filled in.

The sections of `layout` are checked at once, and every block by its own signature. All problems are
collected; nothing is constructed here.
"""

import inspect
from collections.abc import Collection
from dataclasses import is_dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from metablocks.errors import RecipeError
from metablocks.recipe import schema
from metablocks.recipe.layout import RecipeLayout, slot_of
from metablocks.recipe.parse import Node, Place, Problem, join, nodes, plain, show
from metablocks.recipe.schema import INVALID, Field
from metablocks.recipe.slots import SLOTS, Slot, find

DEFAULT = "default of"


def resolve(
    root: Node, allow: Collection[str], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Place]]:
    """The resolved plain values, and the place of every section, block and field by its path.

    Fields with problems are left out of the values.
    """
    schema.check(root, schema.entry(RecipeLayout, section=True), "", problems)
    reader = _Reader(allow, problems)
    values = reader.section(root, RecipeLayout, "")
    return values, reader.origins


class _Reader:
    def __init__(self, allow: Collection[str], problems: list[Problem]) -> None:
        self.allow = allow
        self.problems = problems
        self.origins: dict[str, Place] = {}

    def section(self, node: Node, layout: Any, path: str) -> dict[str, Any]:
        self.origins[path] = node.place
        values: dict[str, Any] = {}
        entries = node.value if isinstance(node.value, dict) else {}
        wrong = [problem.path for problem in self.problems]
        for field in schema.fields(layout).values():
            here = join(path, field.name)
            child = entries.get(field.name)
            value: Any = INVALID
            if child is None:
                if not field.required:
                    value = self.default(field, here, "the recipe")
            elif is_dataclass(field.annotation):
                value = self.section(child, field.annotation, here)
            elif (mark := slot_of(field.annotation)) and (
                child.value is not None or field.default is not None
            ):
                value = self.slot(child, mark, here)
            elif not any(schema.within(other, here) for other in wrong):
                self.origins |= {path: node.place for path, node in nodes(child, here)}
                value = plain(child)
            if value is not INVALID:
                values[field.name] = value
        return values

    def slot(self, node: Node, mark: Any, path: str) -> Any:
        slot = SLOTS[mark.slot]
        if mark.at_least is None:
            return self.block(node, slot, path)
        self.origins[path] = node.place
        if not isinstance(node.value, list) or len(node.value) < mark.at_least:
            given = "an empty list" if node.value == [] else show(node)
            example = f"[{{block: {next(iter(slot.blocks))}, …}}]"
            message = f"takes a list of blocks, such as {example}, given {given}"
            return self.refuse(node.place, path, message)
        items = [self.block(n, slot, join(path, i)) for i, n in enumerate(node.value)]
        return INVALID if INVALID in items else items

    def block(self, node: Node, slot: Slot, path: str) -> Any:
        self.origins[path] = node.place
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
            if len(node.value) == 1 and (message := _not_called(target, slot, name)):
                return self.refuse(node.value["block"].place, name_path, message)
            checked = schema.check(node, schema.entry(target, slot.context), path, self.problems)
        except RecipeError as error:
            return self.refuse(node.value["block"].place, name_path, str(error))
        if checked is INVALID:
            return INVALID
        values: dict[str, Any] = {"block": name}
        owner = getattr(target, "__name__", name)
        self.origins |= {path: node.place for path, node in nodes(node, path)}
        for field in schema.fields(target, slot.context).values():
            if (mark := slot_of(field.annotation)) and field.name in checked:
                held = self.slot(node.value[field.name], mark, join(path, field.name))
                if held is INVALID:
                    return INVALID
                values[field.name] = held
            elif field.name in checked:
                values[field.name] = to_jsonable_python(checked[field.name])
            elif schema.is_plain(field.default):
                values[field.name] = self.default(field, join(path, field.name), owner)
        return values

    def default(self, field: Field, path: str, owner: str) -> Any:
        self.origins[path] = Place(f"{DEFAULT} {owner}")
        return to_jsonable_python(field.default)

    def refuse(self, place: Place, path: str, message: str) -> Any:
        self.problems.append(Problem(place, path, message))
        return INVALID


def _not_called(target: Any, slot: Slot, name: str) -> str:
    """A message on a function that a recipe, which gives it nothing, cannot call; else empty."""
    missing = [
        field.name for field in schema.fields(target, slot.context).values() if field.required
    ]
    if not missing or not inspect.isfunction(target) or ":" not in name:
        return ""
    short = name.rpartition(":")[2]
    return (
        f"{short} is called to make the {slot.name} block, with fields of the recipe, which gives no "
        f"{', '.join(missing)}. If it is the block itself, name a function that returns it: def "
        f"make(): return {short}"
    )
