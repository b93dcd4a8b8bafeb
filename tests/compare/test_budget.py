"""One budget for all: what is asked for is what the recipes then say."""

import math
from argparse import ArgumentTypeError

import pytest

from metablocks.arguments import parse_seeds
from metablocks.compare import timing
from metablocks.compare.budget import by_minutes, by_steps, choose_seeds, with_budget
from metablocks.compare.entries import read_entries
from metablocks.compare.request import Request
from metablocks.compare.timing import Pace
from metablocks.errors import RecipeError
from metablocks.recipe import build, load

SINUSOIDS = ["maml_sinusoid", "fomaml_sinusoid"]


def entries(*names, overrides=("outer.epochs=10",)):
    return read_entries(names or SINUSOIDS, overrides)


@pytest.mark.parametrize(
    ("wanted", "epochs", "steps_per_epoch"),
    [
        (1000, [10, 10], [100, 100]),
        (1000, [10, 20], [100, 50]),
        (1000, [120, 50], [10, 24]),
        (300, [120, 50], [2, 6]),
        (12, [12], [1]),
    ],
)
def test_steps_are_divided_among_the_epochs(wanted, epochs, steps_per_epoch):
    given = [read_entries(["maml_sinusoid"], [f"outer.epochs={count}"])[0] for count in epochs]
    assert by_steps(wanted, given) == steps_per_epoch


def test_fewer_steps_than_epochs_are_refused():
    with pytest.raises(
        RecipeError, match=r"maml_sinusoid has 10 epochs .* take --steps 10 or more"
    ):
        by_steps(9, entries())


def test_a_budget_changes_nothing_but_the_steps_of_an_epoch():
    before = entries()
    after, notes = with_budget(before, Request(("a",), steps=200))
    for old, new in zip(before, after, strict=True):
        changed = {
            path for path in new.recipe.origins if new.recipe.at(path) != old.recipe.at(path)
        }
        assert changed == {"outer.steps_per_epoch"}
        assert new.recipe.at("outer.steps_per_epoch") * new.recipe.at("outer.epochs") == 200
    assert notes[0] == "maml_sinusoid: 10 epochs × 20 = 200 meta-steps"


@pytest.mark.parametrize(("minutes", "every"), [(1.0, 1), (1.0, 10), (0.5, 3), (30.0, 4)])
def test_minutes_are_used_up_and_not_exceeded(minutes, every):
    (entry,) = read_entries(["maml_sinusoid"], ["outer.epochs=10", f"evaluation.every={every}"])
    pace = Pace(step=0.02, validation=1.5)

    def seconds(steps):
        return steps * pace.step + math.ceil(10 / every) * pace.validation

    steps = 10 * by_minutes(minutes, entry, pace)
    assert seconds(steps) <= 60 * minutes < seconds(steps + 10)


def test_minutes_that_do_not_do_are_refused_with_what_would():
    with pytest.raises(RecipeError, match=r"--minutes 0\.1: maml_sinusoid needs 0\.2\d* minutes"):
        by_minutes(0.1, entries()[0], Pace(step=0.02, validation=12.0))


def test_recipes_of_one_budget_need_none():
    given = entries()
    assert with_budget(given, Request(("a",))) == (given, [])


@pytest.mark.parametrize("field", ["outer.epochs", "outer.steps_per_epoch", "outer.tasks_per_step"])
def test_different_budgets_are_refused(field):
    one, other = entries()[0], read_entries(["fomaml_sinusoid"], [f"{field}=7"])[0]
    with pytest.raises(RecipeError, match=r"different budgets: maml_sinusoid trains .* --steps N"):
        with_budget([one, other], Request(("a",)))


def test_timing_looks_at_the_whole_training():
    experiment = build(
        load(
            "maml_sinusoid",
            [
                "hardware.device=cpu",
                "outer.epochs=8",
                "outer.tasks_per_step=2",
                "inner.order={block: annealed, first_order_epochs: 4}",
                "evaluation.tasks=9",
            ],
        )
    )
    seen = []
    backward = experiment.learner.backward

    def noted(tasks, *, progress, metric):
        seen.append(progress.epoch)
        return backward(tasks, progress=progress, metric=metric)

    experiment.learner.backward = noted
    pace = timing.measure(experiment, points=4, seconds=0.0)
    assert list(dict.fromkeys(seen)) == [1.0, 3.0, 5.0, 7.0]
    assert min(pace) > 0


@pytest.mark.parametrize("wrong", ["", "0", "-1", "a", "1.5", "1,1", ",", "1,,2", "1,a"])
def test_seeds_that_are_none_are_refused(wrong):
    with pytest.raises(ArgumentTypeError, match="takes how many seeds"):
        parse_seeds(wrong)


def test_all_recipes_are_trained_with_the_same_seeds():
    one, other = entries()[0], read_entries(["fomaml_sinusoid"], ["seed=5"])[0]
    seeds, notes = choose_seeds([one, other], Request(("a",), seeds=3))
    assert seeds == (0, 1, 2)
    assert "fomaml_sinusoid 5" in notes[0]
    assert choose_seeds([one, other], Request(("a",), seeds=(7, 3))) == ((7, 3), [])
