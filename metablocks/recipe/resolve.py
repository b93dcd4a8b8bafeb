"""A tree of values to a resolved recipe: every field checked, every default filled in.

The walk follows `layout` for sections and the signatures of blocks for the rest. All problems are
collected; nothing is constructed here.
"""

from collections.abc import Collection, Iterable
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin

from metablocks.errors import RecipeError, suggest
from metablocks.recipe import schema
from metablocks.recipe.layout import ManyBlocks, RecipeLayout, slot_of
from metablocks.recipe.parse import Node, Place, Problem, join, show
from metablocks.recipe.schema import INVALID, Field, GroupOptions
from metablocks.recipe.slots import SLOTS, Slot, find

DEFAULT = "default of"


def resolve(
    root: Node, allow: Collection[str], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Place]]:
    """The resolved plain values, and the place of every section, block and field by its path.

    Fields with problems are left out of the values.
    """
    reader = _Reader(allow, problems)
    values = reader.section(root, RecipeLayout, "")
    return values, reader.origins


class _Reader:
    def __init__(self, allow: Collection[str], problems: list[Problem]) -> None:
        self.allow = allow
        self.problems = problems
        self.origins: dict[str, Place] = {}

    def section(self, node: Node, layout: type, path: str) -> dict[str, Any]:
        self.origins[path] = node.place
        known = schema.fields(layout)
        if not isinstance(node.value, dict):
            message = f"takes a mapping of {', '.join(known)}, given {show(node)}"
            self.problem(node.place, path, message)
            return {}
        self.unknown_and_missing(node, known.values(), path)
        values: dict[str, Any] = {}
        for field in (known[f.name] for f in dataclass_fields(layout)):
            here = join(path, field.name)
            if field.name not in node.value:
                if not field.required:
                    values[field.name] = self.default(field, here, "the recipe")
                continue
            if node.value[field.name].value is None and field.default is None:
                self.record(node.value[field.name], here)
                values[field.name] = None
                continue
            value = self.field(node.value[field.name], field.annotation, here)
            if value is not INVALID:
                values[field.name] = value
        return values

    def field(self, node: Node, annotation: Any, path: str) -> Any:
        if isinstance(annotation, type) and is_dataclass(annotation):
            return self.section(node, annotation, path)
        mark = slot_of(annotation)
        if isinstance(mark, ManyBlocks):
            return self.blocks(node, mark, path)
        if mark is not None:
            return self.block(node, SLOTS[mark.slot], path)
        return self.value(node, annotation, path)

    def value(self, node: Node, annotation: Any, path: str) -> Any:
        self.record(node, path)
        checked = schema.check(node, annotation, path, self.problems)
        return checked if checked is INVALID else _plain(checked)

    def blocks(self, node: Node, mark: ManyBlocks, path: str) -> Any:
        self.origins[path] = node.place
        slot = SLOTS[mark.slot]
        if not isinstance(node.value, list) or len(node.value) < mark.at_least:
            given = "an empty list" if node.value == [] else show(node)
            example = f"[{{block: {next(iter(slot.blocks))}, …}}]"
            message = f"takes a list of blocks, such as {example}, given {given}"
            self.problem(node.place, path, message)
            return INVALID
        items = [self.block(n, slot, join(path, i)) for i, n in enumerate(node.value)]
        return INVALID if INVALID in items else items

    def block(self, node: Node, slot: Slot, path: str) -> Any:
        self.origins[path] = node.place
        names = ", ".join(slot.blocks)
        if isinstance(node.value, str):
            node = Node({"block": Node(node.value, node.place, node.place)}, node.place, node.key)
        if not isinstance(node.value, dict):
            message = f"takes a block, {{block: name, …}}, given {show(node)}; there are: {names}"
            self.problem(node.place, path, message)
            return INVALID
        if "block" not in node.value:
            self.problem(node.at, path, f"has no block; it takes block: one of {names}")
            return INVALID
        name = self.value(node.value["block"], str, join(path, "block"))
        if name is INVALID:
            return INVALID
        try:
            target = find(slot, name, self.allow)
            known = schema.fields(target, (*slot.context, "self"))
        except RecipeError as error:
            self.problem(node.value["block"].place, join(path, "block"), str(error))
            return INVALID
        self.unknown_and_missing(node, known.values(), path, reserved=("block",))
        before = len(self.problems)
        values: dict[str, Any] = {"block": name}
        for field in known.values():
            here = join(path, field.name)
            if field.name in node.value:
                values[field.name] = self.block_field(node.value[field.name], field, known, here)
            elif not field.required and schema.is_plain(field.default):
                values[field.name] = self.default(field, here, target.__name__)
        if len(self.problems) > before or INVALID in values.values():
            return INVALID
        return values

    def block_field(self, node: Node, field: Field, known: dict[str, Field], path: str) -> Any:
        value = self.value(node, field.annotation, path)
        if value is not INVALID and value is not None and _has_groups(field.annotation):
            options = {name: f for name, f in known.items() if name != field.name}
            return self.groups(node, options, path)
        return value

    def groups(self, node: Node, known: dict[str, Field], path: str) -> Any:
        """An optimiser's `groups`: every entry holds fields of the optimiser itself."""
        result: dict[str, Any] = {}
        for pattern, group in node.value.items():
            here = join(path, pattern)
            optional = [Field(f.name, f.annotation, None) for f in known.values()]
            self.unknown_and_missing(group, optional, here)
            result[pattern] = {
                name: self.value(child, known[name].annotation, join(here, name))
                for name, child in group.value.items()
                if name in known
            }
        return result

    def unknown_and_missing(
        self, node: Node, known: Iterable[Field], path: str, reserved: tuple[str, ...] = ()
    ) -> None:
        known = list(known)
        names = [field.name for field in known]
        for key, child in node.value.items():
            if key not in names and key not in reserved:
                self.unknown(key, child, names, path)
        for field in known:
            if field.required and field.name not in node.value:
                takes = _takes(field.annotation)
                clause = f"; it takes {takes}" if takes else ""
                self.problem(node.at, join(path, field.name), f"missing{clause}")

    def unknown(self, key: str, child: Node, names: list[str], path: str) -> None:
        hint = suggest(key, names)
        takes = f"t takes: {', '.join(names)}" if names else "t takes no fields"
        takes = f" I{takes}" if hint else f"; i{takes}"
        if child.at.line:
            self.problem(child.at, join(path, key), f"unknown field{hint}{takes}")
        else:
            owner = path or "the recipe"
            self.problem(child.at, "", f'{owner} has no field "{key}"{hint or takes}')

    def default(self, field: Field, path: str, owner: str) -> Any:
        self.origins[path] = Place(f"{DEFAULT} {owner}")
        return _plain(field.default)

    def record(self, node: Node, path: str) -> None:
        self.origins[path] = node.place
        if isinstance(node.value, dict):
            for key, child in node.value.items():
                self.record(child, join(path, key))

    def problem(self, place: Place, path: str, message: str) -> None:
        self.problems.append(Problem(place, path, message))


def _takes(annotation: Any) -> str | None:
    """What a missing field would have taken."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return f"a mapping of {', '.join(schema.fields(annotation))}"
    mark = slot_of(annotation)
    if mark is None:
        return schema.describe(annotation)
    kind = "a list of blocks" if isinstance(mark, ManyBlocks) else "a block"
    return f"{kind}: {', '.join(SLOTS[mark.slot].blocks)}"


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth: what YAML and JSON can hold."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _has_groups(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(isinstance(mark, GroupOptions) for mark in get_args(annotation)[1:])
    return any(_has_groups(member) for member in get_args(annotation))
