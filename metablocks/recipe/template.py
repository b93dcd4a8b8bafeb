"""A recipe to begin with: the quickstart, each field with what it means in a comment above it."""

import textwrap
from collections.abc import Iterator
from typing import Any

from metablocks.errors import command
from metablocks.recipe import schema
from metablocks.recipe.layout import SECTIONS, is_section, slot_of
from metablocks.recipe.listing import meanings
from metablocks.recipe.load import load
from metablocks.recipe.parse import join, nodes, parse
from metablocks.recipe.slots import SLOTS, Slot, find

_HEAD = """\
# yaml-language-server: $schema=recipe.schema.json
# Completion in editors: metablocks schema > recipe.schema.json beside this file.
# Every block of a slot with its fields: metablocks blocks SLOT, such as metablocks blocks tasks.
# A block may have other fields than the one that it replaces; a field that is left out is at its
# default. metablocks check FILE says what is wrong, and what would be trained; metablocks run FILE
# trains it.

"""


def template() -> str:
    """YAML text of a recipe that runs as it stands.

    >>> print(template())  # doctest: +ELLIPSIS
    # yaml-language-server: $schema=recipe.schema.json
    ...
      # inner steps that a task takes in training.
      steps: 1
    ...

    Law: without its comments it is `quickstart`, its name aside.
    """
    recipe = load("quickstart", ["name=My recipe"])
    text, about = recipe.to_yaml(), dict(_comments(recipe.values))
    lines = text.splitlines()
    places = [(n.at.line - 1, about[p]) for p, n in nodes(parse(text, "", [])) if p in about]
    for number, words in sorted(places, reverse=True):
        indent = " " * (len(lines[number]) - len(lines[number].lstrip())) + "# "
        above = textwrap.wrap(words, 100, initial_indent=indent, subsequent_indent=indent)
        lines[number:number] = above
    head = _HEAD.replace("metablocks ", f"{command()} ")
    return head + "\n".join(lines) + "\n"


def _comments(values: dict[str, Any], section: str = "recipe", path: str = "") -> Iterator[Any]:
    """The meaning of every field by its path, and of a slot also the names of its blocks."""
    about = meanings(SECTIONS[section])
    for field in schema.fields(SECTIONS[section]).values():
        here, value = join(path, field.name), values[field.name]
        if is_section(field.annotation):
            yield here, about[field.name]
            yield from _comments(value, field.name, here)
        elif mark := slot_of(field.annotation):
            slot, many = SLOTS[mark.slot], mark.at_least is not None
            takes = schema.describe(field.annotation) or ""
            yield here, f"{about[field.name]} {takes.capitalize()}"
            for place, block in enumerate(value) if many else [("", value)] if value else []:
                yield from _block_comments(block, slot, join(here, place) if many else here)
        else:
            yield here, about[field.name]


def _block_comments(block: dict[str, Any], slot: Slot, path: str) -> Iterator[Any]:
    for name, meaning in meanings(find(slot, block["block"])).items():
        if name in block:
            yield join(path, name), meaning
