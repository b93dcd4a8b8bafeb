"""The recommendation follows from the numbers by the rule that it states."""

import math

import pytest
import torch
from made_up import row, row_of, score

from metablocks.compare.recommend import RULE, RULE_IN_TIME, recommend
from metablocks.compare.table import gap

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
            "takes about as long as maml and needs 40 MiB beyond start beside 100 MiB (maml)",
            id="of two that are level and as fast the lighter",
        ),
        pytest.param(
            [
                row("maml", 0.95, memory_beyond_start=None),
                row("other", 0.945, memory_beyond_start=None),
            ],
            "maml",
            "it takes about as long as other and scores better than other",
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
    assert "it takes about as long as lean and scores better than lean" in advice.reason


def test_it_says_what_it_rests_on():
    rows = [row("a", 0.95), row("b", 0.9, seeds=(0,), meta_steps=1000)]
    told = recommend(rows, "2 min of training a run").rests_on
    assert told == (
        "600 test tasks a recipe, not compared one by one: seeds differ, or older runs did not record "
        "them, 1 to 3 seeds each, 1,000 to 2,000 meta-steps, "
        "2 min of training a run"
    )


def test_one_row_alone_is_no_choice():
    failed = type(row("a", 0.9))("failed", "Failed", (), 1)
    assert recommend([row("a", 0.9), failed]) is None


def test_without_pairs_the_interval_is_that_of_two_independent_means():
    apart = gap(row("a", 0.9, 0.03), row("b", 0.8, 0.04))
    assert (apart.paired, apart.mean) == (False, pytest.approx(0.1))
    assert apart.interval == pytest.approx(0.05, abs=1e-12)


# ---- pairs


def simulated(count, true_difference, *, tasks, seeds=1, spread=0.2, noise=0.04):
    """Pairs of rows, whose tasks are as hard for both, with noise of their own."""
    draw = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(tasks, generator=draw, dtype=torch.float64)

    for _ in range(count):
        each = [0.6 + spread * normal() for _ in range(seeds)]
        one = row_of("one", *(hard + noise * normal() for hard in each))
        yield one, row_of("other", *(hard + noise * normal() + true_difference for hard in each))


@pytest.mark.parametrize(("tasks", "seeds"), [(200, 1), (100, 2), (12, 1)])
def test_a_true_difference_between_the_two_intervals_is_told_and_none_is_not(tasks, seeds):
    """200 times each. The difference is four standard errors of the paired mean.

    Of equal recipes 5 % should be told apart; of unequal ones 2 % should not (7 % of 12 tasks).
    """
    four = 4 * 0.04 * (2 / (tasks * seeds)) ** 0.5
    told = {}
    for name, shift in (("equal", 0.0), ("apart", four)):
        pairs = list(simulated(200, shift, tasks=tasks, seeds=seeds))
        gaps = [gap(other, one) for one, other in pairs]
        assert all(each.paired for each in gaps)
        unpaired = [math.hypot(a.score.interval[-1], b.score.interval[-1]) for a, b in pairs]
        assert all(each.interval < limit for each, limit in zip(gaps, unpaired, strict=True))
        assert sum(abs(each.mean) > limit for each, limit in zip(gaps, unpaired, strict=True)) == 0
        advised = [recommend(pair) for pair in pairs]
        told[name] = sum("ahead of" in advice.reason for advice in advised)
        if shift:
            right = sum(advice.recipe == "other" for advice in advised)
            assert right >= told[name] > (190 if tasks > 30 else 180)
    assert 4 <= told["equal"] <= 16


def test_what_differs_by_rounding_is_level():
    """One recipe at two chunks: on most tasks the same side is ahead, by a few units of float32."""
    hard, noise = torch.rand(100).double(), torch.rand(100).double()
    slow = row_of("slow", hard, measure="mse", seconds=60)
    quick = row_of("quick", hard * (1 + 1e-7 * noise), measure="mse", seconds=30)
    apart = gap(slow, quick)
    assert apart.paired
    assert abs(apart.mean) > apart.interval
    advice = recommend([slow, quick])
    assert advice.recipe == "quick"
    assert "level with the best (slow)" in advice.reason
    apart = gap(slow, row_of("worse", hard * (1 + 1e-3 * noise), measure="mse"))
    assert apart.clear


def test_other_seeds_are_other_tasks_and_no_pairs():
    ((one, other),) = simulated(1, 0.1, tasks=50, seeds=2)
    assert gap(one, other).paired
    assert gap(one, other).seed_std is not None
    elsewhere = type(other)(**{**vars(other), "seeds": (0, 7)})
    assert not gap(one, elsewhere).paired
    fewer = row_of("fewer", *(scores.by_task[:40, 0] for scores in other.by_seed))
    assert not gap(one, fewer).paired


def test_it_says_that_tasks_are_compared_one_by_one_and_what_seeds_do():
    hard = [0.2 * torch.rand(50, dtype=torch.float64) for _ in range(2)]
    one = row_of("one", *(0.5 + each for each in hard))
    other = row_of("other", 0.52 + hard[0], 0.60 + hard[1])
    advice = recommend([one, other])
    assert advice.recipe == "other"
    assert "ahead of one by 6.00 points, task by task, more than the ± " in advice.reason
    assert "50 test tasks a recipe" not in advice.rests_on  # 100, of both seeds
    assert advice.rests_on.startswith(
        "100 test tasks a recipe, the same for all and compared one by one, 2 seeds each"
    )
    assert advice.thin == (
        "seeds alone move the difference by 5.66 points (SD); the lead is less than twice that",
    )


def test_one_task_tells_nothing():
    advice = recommend([row_of(n, torch.tensor([v]).double()) for n, v in (("a", 0.9), ("b", 0.1))])
    assert "90.00 % ± –, the best, and level with b" in advice.reason
    assert any("1 test task is few" in doubt for doubt in advice.thin)


# ---- under one time


def test_under_one_time_time_breaks_no_tie():
    """The first two trained a little less long, by how epochs divide."""
    rows = [row("worst", 0.941, seconds=40), row("middle", 0.945, seconds=45), row("best", 0.95)]
    assert recommend(rows).recipe == "middle"
    advice = recommend(rows, "1 min of training a run")
    assert advice.recipe == "best"
    assert "it was given the same time and scores better than middle and worst" in advice.reason
    assert str(advice).endswith(f"rule: {RULE_IN_TIME}")
    lean = row("lean", 0.949, memory_beyond_start=40 * MIB)
    advice = recommend([*rows, lean], "1 min of training a run")
    assert advice.recipe == "lean"
    assert (
        "was given the same time and needs 40 MiB beyond start beside 100 MiB (best)"
        in advice.reason
    )


def test_memory_that_is_about_the_same_decides_nothing():
    rows = [row("best", 0.95), row("other", 0.945, memory_beyond_start=90 * MIB)]
    assert recommend(rows).recipe == "best"
