"""The table of algorithms: read off the recipes, and the README's is it."""

import re
from pathlib import Path

import pytest

from metablocks.cli import main
from metablocks.recipe import load
from metablocks.recipe.algorithms import ALGORITHMS, algorithms_text

README = Path(__file__).parents[2] / "README.md"


def rows():
    lines = [line.strip("|").split("|") for line in algorithms_text().splitlines()[2:]]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_the_readme_has_the_table_that_the_command_prints(capsys):
    assert main(["show", "--algorithms"]) == 0
    printed = capsys.readouterr().out
    table = re.search(r"^\| algorithm \| recipe .*?\n\n", README.read_text("utf-8"), re.M | re.S)
    assert table is not None
    assert table[0] == printed + "\n"


def test_a_row_says_what_its_recipe_chooses_and_no_two_are_one():
    table = rows()
    assert [name for name, _ in table.items()] == [*ALGORITHMS]
    assert all(cells[0] == f"`{ALGORITHMS[name]}`" for name, cells in table.items())
    assert len({tuple(cells[1:]) for cells in table.values()}) == len(ALGORITHMS)
    start = load("proto_maml_strokes").at("inner.start.block")
    assert table["Proto-MAML"].count(f"`{start}`") == 1
    assert all(table["MAML"])


@pytest.mark.parametrize(
    "words", [[], ["maml_strokes", "--algorithms"], ["--algorithms", "--set", "seed=1"]]
)
def test_a_recipe_or_the_table(words, capsys):
    assert main(["show", *words]) == 2
    assert "show takes a recipe or --algorithms" in capsys.readouterr().err
