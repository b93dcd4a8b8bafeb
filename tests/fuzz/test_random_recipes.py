"""Random recipes over every slot: each runs with finite numbers, or is refused with its place.

`tools/fuzz` goes on where this fixed set ends.
"""

import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from metablocks.errors import LawError
from metablocks.estimators import Unrolled
from metablocks.order import SecondOrder
from metablocks.recipe.layout import slot_paths
from metablocks.recipe.record import Recipe
from metablocks.recipe.slots import SLOTS
from metablocks.runs import checkpoint
from metablocks.runs.scores import pool
from tools.fuzzing import command, trial
from tools.fuzzing.data import draw_data_sets
from tools.fuzzing.recipes import recipes
from tools.fuzzing.search import Search, signature
from tools.fuzzing.trial import Finding, attempt, check_places

HELD = {mark.slot for mark in slot_paths().values()}  # by a recipe; the rest by another block
BLOCKS = [(name, block) for name in SLOTS if name in HELD for block in SLOTS[name].blocks]
ROOT = Path(command.__file__).parents[2]
OF_A_BLOCK, OF_ANY = 20, 20  # of a block no more are tried than until one runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")  # put back at the end
        yield draw_data_sets(tmp_path_factory.mktemp("data"))


def texts(count, slot=None, block=None):
    """The first recipes of the strategy: the same every time, and others for every block."""
    drawn = []

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(zlib.crc32(f"{slot}.{block}".encode()))
    @given(recipes(slot, block))
    def draw(text):
        drawn.append(text)

    draw()
    return drawn


@pytest.mark.parametrize(("slot", "block"), BLOCKS)
def test_recipes_of_every_block_run_or_are_refused_with_their_place(slot, block, data):
    def drawn():
        yield from reversed(texts(2, slot, block))  # the first is plain
        yield from texts(OF_A_BLOCK, slot, block)[2:]

    assert any(attempt(text, data).refused is None for text in drawn())


def test_recipes_of_any_blocks_run_or_are_refused_with_their_place(data):
    outcomes = [attempt(text, data) for text in texts(OF_ANY)]
    assert {outcome.refused is None for outcome in outcomes} == {True, False}


def test_what_is_to_be_compiled_is_traced_and_runs():
    text = (ROOT / "recipes" / "shallow_linear.yaml").read_text(encoding="utf-8")
    compiled = text.replace("compile: false", "compile: true")
    assert compiled != text
    assert attempt(compiled).refused is None


class Faulty(SecondOrder):
    """An order with a field of its own, which does what it is told to."""

    def __init__(self, *, unheard_of: bytes | None = None) -> None:
        self.act = Faulty.act

    def __call__(self, step, steps, progress):
        self.act()
        return True

    @staticmethod
    def act():
        raise KeyError("a crash inside a run")


@pytest.fixture
def faulty(monkeypatch):
    """One more block in a table. Returns a recipe that takes inner steps with it."""
    monkeypatch.setitem(SLOTS["order"].blocks, "faulty", Faulty)
    found = texts(10, "order", "faulty")
    return next(text for text in found if "steps: 1" in text and "\n    block: loop" in text)


def test_a_block_added_to_a_table_is_fuzzed_and_its_crash_is_found_shrunk_and_found_once(
    faulty, monkeypatch
):
    monkeypatch.setattr("tools.fuzzing.search.recipes", lambda: recipes("order", "faulty"))
    search = Search(data=None)
    found = search.round(1, until=time.monotonic() + 120)
    assert found is not None
    assert "a crash inside a run" in found.error
    assert "block: faulty" in found.text
    assert len(found.text) <= len(faulty)
    monkeypatch.setattr("tools.fuzzing.search.ROUND", 3)
    assert search.round(1, until=time.monotonic() + 120) is None
    assert search.counts["known"] > 0


def test_a_wrong_gradient_is_a_finding(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "act", staticmethod(lambda: None))
    right = Unrolled.__call__

    def wrong(self, *args):
        result = right(self, *args)
        return result._replace(grads={name: 1.01 * g for name, g in result.grads.items()})

    monkeypatch.setattr(Unrolled, "__call__", wrong)
    with pytest.raises(Finding, match="the gradient check says"):
        attempt(faulty)


def test_numbers_that_are_not_finite_are_a_finding(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "act", staticmethod(lambda: None))
    monkeypatch.setattr(trial, "final_scores", _nan_scores)
    with pytest.raises(Finding, match="validation losses is not finite"):
        attempt(faulty)


def _nan_scores(experiment, split, *, tasks):
    values = torch.full((tasks, 1), torch.nan)
    return pool(split, "mse", values, values)


def test_a_run_without_an_end_is_a_finding(faulty, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    monkeypatch.setattr(Faulty, "act", staticmethod(lambda: time.sleep(60)))
    with pytest.raises(Finding, match=r"no end after 0\.3 seconds"):
        attempt(faulty)


def test_a_run_that_resumes_as_another_is_a_finding(faulty, monkeypatch):
    monkeypatch.setattr(Faulty, "act", staticmethod(lambda: None))
    restore = checkpoint.restore

    def forgets(path, experiment):
        state = restore(path, experiment)
        next(experiment.learner.parameters()).data.add_(1.0)
        return state

    monkeypatch.setattr(checkpoint, "restore", forgets)
    monkeypatch.setattr(Recipe, "hash", "00")  # of the quarter that is resumed
    with pytest.raises(LawError, match=r"resume: .*learner.* is another: by"):
        attempt(faulty)


@pytest.mark.parametrize("message", ["", "no such block", "fuzz.yaml: no such block"])
def test_a_refusal_without_a_place_is_a_finding(message):
    check_places("fuzz.yaml:7:5 inner.rule[0].init: takes a number\nfuzz.yaml:8:1 b: no such")
    with pytest.raises(Finding, match="a refusal without a place"):
        check_places(f"fuzz.yaml:7:5 inner.rule[0].init: takes a number\n{message}" * bool(message))


def test_signatures_tell_places_apart_and_not_recipes():
    def raised(error):
        try:
            raise error
        except type(error) as caught:
            return signature(caught)

    assert raised(ValueError("3 of [1, 2]")) == raised(ValueError("4 of [1]"))
    assert raised(ValueError("3")) != raised(KeyError("3"))


def test_the_command_searches_and_says_how_many_ran(tmp_path, capfd):
    out = tmp_path / "found"
    assert command.main(["--minutes", "0.03", "--seed", "3", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert "seed 3, 0.03 minutes, 1 at a time" in said
    assert "0 findings" in said
    assert list(out.iterdir()) == []


def test_an_interrupted_command_says_what_was_done_and_leaves_nothing_behind(tmp_path):
    start = [sys.executable, "-m", command.__name__]
    words = [*start, "--minutes", "5", "--out", str(tmp_path / "found")]
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=PIPE, stderr=PIPE) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "\ninterrupted\n")
    assert re.fullmatch(r"seed \d+, 5 minutes, 1 at a time\n", first)
    assert re.match(r"\d+ recipes: \d+ ran, .* 0 findings\n", out)
    assert list(tmp_path.rglob("*.yaml")) == []


def test_the_command_tries_one_recipe_again(tmp_path, capsys, faulty, data, monkeypatch):
    monkeypatch.setattr(command, "draw_data_sets", lambda folder: data)
    path = tmp_path / "one.yaml"
    path.write_text(faulty)
    assert command.main(["--recipe", str(path)]) == 1
    assert "a crash inside a run" in capsys.readouterr().err
    path.write_text(faulty.replace("steps: 1", "steps: one", 1))
    assert command.main(["--recipe", str(path)]) == 0
    assert "refused: fuzz.yaml:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument", [["--minutes", "0"], ["--jobs", "0"], ["--recipe", "no_such_file.yaml"]]
)
def test_bad_arguments_end_with_status_2(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argument)
    assert stop.value.code == 2
    assert argument[1].rstrip(".0") in capsys.readouterr().err
