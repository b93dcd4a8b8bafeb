"""Recipes as records: text and values say the same, and shipped recipes are complete statements."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_texts import GOOD

from metablocks.cli import main
from metablocks.recipe import from_text, load, shipped
from metablocks.recipe.load import recipe_files
from metablocks.recipe.parse import Place, parse, plain, to_node
from metablocks.recipe.record import Recipe

NAMES = [path.stem for path in recipe_files()]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cc", "Cs")) | st.just("\n"))
    | st.sampled_from(["yes", "null", "1e-3", "0o17", "a: b", "a #b", "- a", "<<", "*", "", "1:30"])
)
TREES = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cc", "Cs"))),
    st.recursive(
        SCALARS,
        lambda below: (
            st.lists(below, max_size=3) | st.dictionaries(st.text("ab .*<", max_size=4), below)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def test_the_recipes_that_ship_are_found():
    assert {"quickstart", "maml_sinusoid", "maml_omniglot_5w1s", "anil_omniglot_5w1s"} <= set(NAMES)
    assert [recipe.name for recipe in shipped()] == NAMES
    assert all(recipe.title and recipe.cite for recipe in shipped())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_states_every_field_and_is_the_same_written_and_read_again(
    name, own_folder, monkeypatch
):
    monkeypatch.chdir(own_folder)
    recipe = load(name)
    again = from_text(recipe.to_yaml(origins=True))
    assert (again.values, again.hash) == (recipe.values, recipe.hash)
    assert not any(origin.startswith("default of") for origin in recipe.origins.values())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_checks_without_its_data(name, capsys, own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)  # which no download makes
    assert main(["check", name]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(load(name).name)
    assert re.search(r"\d parameters, [1-9][\d,]* adapt inside a task", out)
    assert err == ""


def test_hash_follows_values_not_text():
    spaced = GOOD.replace("seed: 0", "# a comment\nseed:   0")
    assert from_text(spaced).hash == from_text(GOOD).hash
    assert from_text(GOOD, overrides=["inner.rule[0].granularity=scalar"]).hash == (
        from_text(GOOD).hash
    )
    assert from_text(GOOD, overrides=["seed=1"]).hash != from_text(GOOD).hash


@given(TREES)
def test_any_values_written_as_yaml_read_the_same(values):
    text = Recipe("x", values, {}).to_yaml()
    if values:
        problems = []
        assert plain(parse(text, "x", problems)) == values
        assert problems == []


@given(SCALARS)
def test_a_scalar_written_by_us_is_read_alike_by_a_yaml_1_1_reader(value):
    """Other tools read recipe.yaml too; exponents without a dot are the known difference."""
    text = Recipe("x", {"key": value}, {}).to_yaml()
    if not re.search(r"[0-9]e|[0-9]:[0-9]", text) and value not in ("yes", "1e-3"):
        read = yaml.safe_load(text)["key"]
        assert read == value or not re.fullmatch(r"[\w.+-]*", str(value), re.ASCII)


def test_nodes_of_plain_values_are_the_values():
    values = {"a": [1, {"b": None}], "c": "x"}
    assert plain(to_node(values, Place("x"))) == values


def test_show_prints_a_runnable_recipe_with_aligned_origins(capsys, tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert main(["show", str(path), "--set", "inner.steps=1"]) == 0
    out = capsys.readouterr().out
    assert from_text(out).at("inner.steps") == 1
    assert len({line.index("  # ") for line in out.splitlines() if "  # " in line}) == 1
    assert re.search(r"^  steps: 1 +# --set$", out, re.MULTILINE)
