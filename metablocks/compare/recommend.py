"""Recommend a recipe, by a rule that anyone can follow with the table in hand.

1. The best mean test score leads. A recipe is level with it if the difference is within
   √(c₁² + c₂²), c being the half widths of the two 95 % intervals.
2. Of the recipes that are level, the fastest in all is recommended; if times are within 20 % of
   the fastest, the one of these whose memory beyond start peaks lowest; if that is not known of
   all, or equal, the better score.

All recipes meet the same tasks, which this margin does not make use of: it is a cautious one. The
intervals are over tasks. They say nothing about other seeds of training, other budgets or
other settings, so the advice names what it rests on and why its evidence is thin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metablocks.compare.table import Row, gap_text, measure_of, seconds_text
from metablocks.memory import format_bytes
from metablocks.runs.scores import MEASURES, Measure, Scores

RULE = (
    "the best test score leads; recipes whose difference from it lies within √(c₁² + c₂²) of the "
    "95 % intervals are level; of those, the fastest in all, and if times are within 20 %, the "
    "one with the lowest peak of memory beyond start"
)
_SAME_TIME = 1.2
_MANY = 30
"""From so many tasks on a mean is about normally distributed, and its interval means what it says."""


@dataclass(frozen=True)
class Advice:
    """The recommended recipe, the reason, and the evidence."""

    recipe: str
    reason: str
    rests_on: str
    thin: tuple[str, ...]
    """Reasons that the evidence is thin; empty if it is not."""

    def __str__(self) -> str:
        lines = [f"use {self.recipe}: {self.reason}", f"rests on: {self.rests_on}"]
        lines += [f"thin evidence: {reason}" for reason in self.thin]
        return "\n".join([*lines, f"rule: {RULE}"])


def recommend(rows: Sequence[Row], budget: str = "") -> Advice | None:
    """The advice that follows from the rows; None unless at least two have finite scores."""
    measure = measure_of(rows)
    scored = [(row, row.score) for row in rows if row.score and math.isfinite(row.score.final)]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda pair: pair[1].final, reverse=measure == "accuracy")
    best, best_score = scored[0]
    level = [
        row
        for row, score in scored
        if abs(score.final - best_score.final) <= margin(score, best_score)
    ]
    chosen = _lightest_of_the_fastest(level)
    return Advice(
        recipe=chosen.recipe,
        reason=_reason(chosen, best, level, scored, measure),
        rests_on=_evidence([row for row, _ in scored], budget),
        thin=tuple(_doubts(scored, level, measure)),
    )


def margin(one: Scores, other: Scores) -> float:
    """Half the width of the 95 % interval of a difference, √(c₁² + c₂²)."""
    return math.hypot(one.interval[-1], other.interval[-1])


def _lightest_of_the_fastest(level: Sequence[Row]) -> Row:
    """`level` comes best score first, so a tie goes to the better score."""
    fastest = min(row.seconds or 0.0 for row in level)
    quick = [row for row in level if (row.seconds or 0.0) <= _SAME_TIME * fastest]
    if any(row.memory_beyond_start is None for row in quick):
        return quick[0]
    return min(quick, key=lambda row: row.memory_beyond_start or 0)


def _reason(
    chosen: Row,
    best: Row,
    level: Sequence[Row],
    scored: Sequence[tuple[Row, Scores]],
    measure: Measure,
) -> str:
    assert chosen.score is not None
    assert best.score is not None
    reason = f"test {MEASURES[measure][0]} {chosen.score.text(-1)}"
    if len(level) == 1:
        second, score = scored[1]
        ahead = gap_text(abs(score.final - chosen.score.final), measure)
        limit = gap_text(margin(score, chosen.score), measure)
        return f"{reason}, ahead of {second.recipe} by {ahead}, more than the ± {limit} of chance"
    others = [row for row in level if row is not chosen]
    if chosen is best:
        reason += f", the best, and level with {_names(others)}"
    else:
        behind = gap_text(abs(best.score.final - chosen.score.final), measure)
        limit = gap_text(margin(best.score, chosen.score), measure)
        reason += f", level with the best ({best.recipe}): {behind} apart, within ± {limit}"
    return f"{reason}; {_economy(chosen, others)}"


def _economy(chosen: Row, others: Sequence[Row]) -> str:
    """The advantages of the chosen row over those that are level with it."""
    seconds = chosen.seconds or 0.0
    slower = [row for row in others if (row.seconds or 0.0) > _SAME_TIME * seconds]
    alike = [row for row in others if row not in slower]
    reasons = []
    if slower:
        times = ", ".join(f"{seconds_text(row.seconds or 0.0)} ({row.recipe})" for row in slower)
        reasons.append(f"it trains in {seconds_text(seconds)} instead of {times}")
    if alike:
        memory = [row.memory_beyond_start for row in (chosen, *alike)]
        sizes = [format_bytes(size) for size in memory if size is not None]
        merit = "has the better score of these"
        if len(sizes) == len(memory):
            sizes[1:] = [
                f"{size} ({row.recipe})" for size, row in zip(sizes[1:], alike, strict=True)
            ]
            merit = f"needs {sizes[0]} beyond start beside {', '.join(sizes[1:])}"
        reasons.append(f"it takes about as long as {_names(alike)}, and {merit}")
    return " and ".join(reasons)


def _evidence(rows: Sequence[Row], budget: str) -> str:
    seeds = {len(row.seeds) for row in rows}
    evidence = [
        f"{_range({row.score.tasks for row in rows if row.score})} test tasks a recipe",
        f"{_range(seeds)} {'seed' if seeds == {1} else 'seeds'} each",
        f"{_range({row.meta_steps or 0 for row in rows})} meta-steps",
        budget,
    ]
    return ", ".join(filter(None, evidence))


def _doubts(
    scored: Sequence[tuple[Row, Scores]], level: Sequence[Row], measure: Measure
) -> list[str]:
    doubts = []
    if len(level) > 1:
        doubts.append(
            f"the scores of {_names(level)} do not tell them apart; more tasks (--tasks) or seeds "
            "(--seeds) narrow the intervals"
        )
    fewest = min(score.tasks for _, score in scored)
    if fewest < _MANY:
        doubts.append(
            f"{fewest} test tasks are few for an interval of ± 1.96 standard errors: --tasks 100 or more"
        )
    if any(len(row.seeds) == 1 for row, _ in scored):
        doubts.append(
            "one seed of training; another may turn the order round: --seeds 3 tells how much "
            "they differ"
        )
    (_, one), (_, two) = scored[:2]
    spread = max((score.seed_std or [0.0])[-1] for score in (one, two))
    if len(level) == 1 and abs(one.final - two.final) < 2 * spread:
        doubts.append(
            f"seeds alone move a score by {gap_text(spread, measure)} (SD); the lead is less than "
            "twice that"
        )
    if any(row.failed for row, _ in scored):
        doubts.append("some runs failed, and those that did not count alone")
    return doubts


def _names(rows: Sequence[Row]) -> str:
    names = [row.recipe for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(values: set[int]) -> str:
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)}))
