"""The JSON schema of recipes says what `metablocks check` says, except for rules across fields."""

import json

import pytest
from json_schema import is_valid
from recipe_texts import GOOD, broken
from test_recipe_bad_files import CASES

from metablocks.cli import main
from metablocks.errors import RecipeError
from metablocks.recipe.layout import SECTIONS
from metablocks.recipe.listing import json_schema, meanings
from metablocks.recipe.load import recipe_files, recipes_folder
from metablocks.recipe.parse import parse, plain
from metablocks.recipe.schema import fields
from metablocks.recipe.slots import SLOTS

SCHEMA = json_schema()
ACROSS_FIELDS = {
    "a negative rate",
    "a rule that does not negate",
    "default that no longer fits",
    "final rate above the rate",
    "group that matches nothing",
    "model that does not fit the tasks",
    "more evaluation steps than per-step rates",
    "more last steps than steps",
    "nothing to adapt",
    "sizes that fit no memory",
    "surgery that does not fit the model",
    "too large for the precision",
    "what a rule sets up fits no memory",
}
OF_THIS_MACHINE = {
    "device that is not here",
    "no such device",
    "too large for a tensor's sizes",  # a float with an integer's value
}


def values(text):
    """The values of a recipe's text, or None if they are none that JSON has."""
    problems = []
    try:
        root = plain(parse(text, "x.yaml", problems))
        json.dumps(root, allow_nan=False)
    except (RecipeError, ValueError):
        return None
    return None if problems else root


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_name_their_schema(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert is_valid(values(text), SCHEMA, SCHEMA)


def test_the_schema_beside_the_shipped_recipes_is_the_one_of_the_command(capsys):
    """Else: `tools/metablocks schema > recipes/recipe.schema.json`."""
    assert main(["schema"]) == 0
    beside = recipes_folder() / "recipe.schema.json"
    made = json.loads(capsys.readouterr().out)  # other releases of pydantic write 0.0 for 0
    assert json.loads(beside.read_text(encoding="utf-8")) == made


def test_it_refuses_what_check_refuses_except_for_rules_across_fields():
    assert is_valid(values(GOOD), SCHEMA, SCHEMA)
    texts = {
        case: broken(*(change for change in changes if isinstance(change, tuple)))
        for case, changes in CASES.items()
    }
    readable = {case: value for case, text in texts.items() if (value := values(text)) is not None}
    accepted = {case for case, value in readable.items() if is_valid(value, SCHEMA, SCHEMA)}
    assert accepted == ACROSS_FIELDS | OF_THIS_MACHINE


@pytest.mark.parametrize("slot", SLOTS.values(), ids=lambda slot: slot.name)
def test_every_field_of_every_block_has_a_meaning(slot):
    for name, block in slot.blocks.items():
        lacking = set(fields(block, slot.context)) - set(meanings(block))
        assert not lacking, f"{name}: an item - `field`: … of the docstring is missing"


def test_every_field_beside_blocks_has_a_meaning():
    for section in SECTIONS.values():
        assert set(fields(section)) == set(meanings(section))
