"""The examples of `recipes/python/` run, at tiny size, and are not taken for recipes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import learn2learn_stand_in
import pytest

from metablocks.cli import main
from metablocks.laws import sources
from metablocks.recipe import shipped

FOLDER = Path(__file__).parents[1] / "recipes" / "python"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    yield lambda name: __import__(name)
    for name in names & set(sys.modules):
        del sys.modules[name]


def test_maml_omniglot(example, capsys):
    main = example("maml_omniglot").main
    accuracy = main(filters=4, steps=2, tasks_per_step=2, test_tasks=2)
    assert 0 <= accuracy <= 1
    assert "step     1  query loss" in capsys.readouterr().out


def test_own_rule(example):
    assert math.isfinite(example("own_rule").main(steps=2))


def test_own_tasks(example):
    own_tasks = example("own_tasks")
    assert math.isfinite(own_tasks.main(iterations=2))
    source = own_tasks.Oscillations(seed=1)
    sources.is_a_function_of_the_index(source, [3, 7, 3], ["train", "test"])
    sources.fits_its_description(source)


def test_own_model(example, capsys):
    example("own_model")
    model = "model={block: own_model:net, width: 4, depth: 1}"
    assert main(["check", "maml_strokes", "--set", model, "--allow", "own_model"]) == 0
    assert "own_model:net, 73 parameters" in capsys.readouterr().out
    assert main(["check", "maml_strokes", "--set", model]) == 2
    assert "--allow own_model" in capsys.readouterr().err


@pytest.mark.parametrize("per_step", [False, True])
def test_torchvision_model(example, per_step):
    main = example("torchvision_model").main
    assert math.isfinite(main(weights=None, per_step=per_step, size=16, steps=1))


def test_higher_code_and_its_counterpart_give_the_same_numbers(example):
    assert example("from_higher").main(meta_steps=5) < 1e-13


def test_learn2learn_code_and_its_counterpart_give_the_same_numbers(example, monkeypatch):
    package = SimpleNamespace(algorithms=learn2learn_stand_in)
    monkeypatch.setitem(sys.modules, "learn2learn", package)
    assert example("from_learn2learn").main(meta_steps=5) < 1e-13


def test_python_files_are_not_recipes():
    names = {recipe.name for recipe in shipped()}
    assert "quickstart" in names
    assert not names & {path.stem for path in FOLDER.glob("*.py")}
