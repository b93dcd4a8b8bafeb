"""The recommendation follows from the numbers by the rule that it states."""

import math

import pytest
from made_up import row, score

from metablocks.compare.recommend import RULE, margin, recommend

MIB = 2**20


@pytest.mark.parametrize(
    ("rows", "recipe", "says"),
    [
        pytest.param(
            [row("maml", 0.95), row("fomaml", 0.90, seconds=30)],
            "maml",
            "ahead of fomaml by 5.00 points, more than the ± 1.41 points of chance",
            id="a clear lead wins, however slow",
        ),
        pytest.param(
            [row("maml", 0.95), row("fomaml", 0.94, seconds=30)],
            "fomaml",
            "level with the best (maml): 1.00 points apart, within ± 1.41 points; it trains in 30 s "
            "instead of 60 s (maml)",
            id="of two that are level the faster",
        ),
        pytest.param(
            [row("maml", 0.95, seconds=30), row("fomaml", 0.94)],
            "maml",
            "the best, and level with fomaml; it trains in 30 s instead of 60 s (fomaml)",
            id="the best, where it is also the fastest",
        ),
        pytest.param(
            [row("maml", 0.95), row("lean", 0.945, seconds=66, memory_beyond_start=40 * MIB)],
            "lean",
            "takes about as long as maml, and needs 40 MiB beyond start beside 100 MiB (maml)",
            id="of two that are level and as fast the lighter",
        ),
        pytest.param(
            [
                row("maml", 0.95, memory_beyond_start=None),
                row("other", 0.945, memory_beyond_start=None),
            ],
            "maml",
            "has the better score of these",
            id="of two that are level in all the better",
        ),
        pytest.param(
            [row("slow", 0.95), row("quick", 0.80, seconds=1), row("middle", 0.945, seconds=20)],
            "middle",
            "it trains in 20 s instead of 60 s (slow)",
            id="one far behind does not count, however fast",
        ),
        pytest.param(
            [row("maml", 0.95, 0.001), row("fomaml", 0.949, 0.0001, seconds=30)],
            "fomaml",
            "level",
            id="intervals add in squares",
        ),
        pytest.param(
            [row("maml", 0.4, 0.02, measure="mse"), row("fomaml", 0.2, 0.02, measure="mse")],
            "fomaml",
            "ahead of maml by 0.2000",
            id="of errors the lower is the better",
        ),
        pytest.param(
            [row("wild", math.nan, math.nan), row("maml", 0.6), row("fomaml", 0.5)],
            "maml",
            "ahead of fomaml",
            id="no number is no score",
        ),
    ],
)
def test_the_rule_decides(rows, recipe, says):
    advice = recommend(rows)
    assert advice is not None
    assert advice.recipe == recipe
    assert says in advice.reason
    assert str(advice).endswith(f"rule: {RULE}")


def test_order_of_the_rows_does_not_matter():
    rows = [row("a", 0.95), row("b", 0.945, seconds=20), row("c", 0.9, seconds=5)]
    advised = {recommend([rows[i] for i in order]).recipe for order in [(0, 1, 2), (2, 1, 0)]}
    assert advised == {"b"}


@pytest.mark.parametrize(
    ("rows", "doubts"),
    [
        ([row("a", 0.95), row("b", 0.5)], []),
        ([row("a", 0.95, seeds=(0,)), row("b", 0.5)], ["one seed of training"]),
        ([row("a", 0.95), row("b", 0.949)], ["do not tell them apart"]),
        ([row("a", 0.95, failed=1), row("b", 0.5)], ["some runs failed"]),
    ],
)
def test_thin_evidence_is_named(rows, doubts):
    told = recommend(rows).thin
    assert len(told) == len(doubts)
    assert all(doubt in each for doubt, each in zip(doubts, told, strict=True))


def test_a_lead_smaller_than_what_seeds_differ_by_is_thin():
    first = row("a", 0.95)
    rows = [
        type(first)(**{**vars(first), "score": score(0.95, 0.001, seed_std=0.03)}),
        row("b", 0.91, 0.001),
    ]
    assert "seeds alone move a score by 3.00 points" in recommend(rows).thin[0]


def test_few_tasks_are_thin_evidence():
    few = [row("maml", 0.95, score_of={"tasks": 10}), row("fomaml", 0.5)]
    assert any("10 test tasks are few" in doubt for doubt in recommend(few).thin)
    assert not any("are few" in doubt for doubt in recommend([row("a", 0.9), row("b", 0.5)]).thin)


def test_memory_that_is_not_known_of_all_decides_nothing():
    rows = [row("maml", 0.95, memory_beyond_start=None), row("lean", 0.945)]
    advice = recommend(rows)
    assert advice.recipe == "maml"
    assert "has the better score of these" in advice.reason


def test_it_says_what_it_rests_on():
    rows = [row("a", 0.95), row("b", 0.9, seeds=(0,), meta_steps=1000)]
    told = recommend(rows, "2 min of training a run").rests_on
    assert told == (
        "600 test tasks a recipe, 1 to 3 seeds each, 1,000 to 2,000 meta-steps, "
        "2 min of training a run"
    )


def test_one_row_alone_is_no_choice():
    failed = type(row("a", 0.9))("failed", "Failed", (), 1)
    assert recommend([row("a", 0.9), failed]) is None


def test_the_margin_is_that_of_a_difference():
    assert margin(score(0.9, 0.03), score(0.8, 0.04)) == pytest.approx(0.05, abs=1e-12)
