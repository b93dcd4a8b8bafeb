"""Recommend a recipe, by a rule that anyone can follow with the table in hand.

1. The best mean test score leads. A recipe is level with it if 0 is in the 95 % interval of their
   difference: task by task, since all recipes meet the same tasks. (Where seeds differ, or an older
   run did not record the scores of its tasks, it is that of two independent means.) So it is within
   a ten-thousandth of that score: such differences are of rounding, on every task the same way.
2. Of the recipes that are level, the fastest in all is recommended; of those within 20 % of the
   fastest, the one whose memory beyond start peaks lowest; of those within 20 % of that, or where it
   is not known of all, the better score. If all were given the same time, time decides nothing.

The intervals are over tasks. They say nothing about other seeds of training, other budgets or
other settings, so the advice names what it rests on and why its evidence is thin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan

from metablocks.compare.table import Gap, Row, gap, gap_text, measure_of, seconds_text
from metablocks.memory import format_bytes
from metablocks.runs.scores import MANY, MEASURES, Measure

_LEVEL = (
    "the best test score leads; recipes for which 0 is in the 95 % interval of the difference from it, "
    "task by task, or that are within a ten-thousandth of it, are level"
)
_MEMORY = (
    "the one with the lowest peak of memory beyond start; of those within 20 % of that, the best"
)
RULE = f"{_LEVEL}; of those, the fastest in all; of those within 20 % of that, {_MEMORY}"
RULE_IN_TIME = f"{_LEVEL}; of those, all given the same time, {_MEMORY}"
_SAME = 1.2
"""Times and sizes are the same up to this factor."""


@dataclass(frozen=True)
class Advice:
    """The recommended recipe, the reason, and the evidence."""

    recipe: str
    reason: str
    rests_on: str
    thin: tuple[str, ...]
    """Reasons that the evidence is thin; empty if it is not."""
    rule: str = RULE

    def __str__(self) -> str:
        lines = [f"use {self.recipe}: {self.reason}", f"rests on: {self.rests_on}"]
        lines += [f"thin evidence: {reason}" for reason in self.thin]
        return "\n".join([*lines, f"rule: {self.rule}"])


def recommend(rows: Sequence[Row], budget: str = "") -> Advice | None:
    """The advice that follows from the rows; None unless at least two have finite scores.

    `budget`: the time that every run was given, in words, if it was.
    """
    measure = measure_of(rows)
    scored = [row for row in rows if row.score and isfinite(row.score.final)]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda row: row.score.error if row.score else inf)
    best, second = scored[:2]
    behind = {row.recipe: gap(best, row) for row in scored[1:]}
    level = [row for row in scored if row is best or not behind[row.recipe].clear]
    chosen = _chosen(level, timed=bool(budget))
    return Advice(
        recipe=chosen.recipe,
        reason=_reason(chosen, best, second, level, behind, measure, timed=bool(budget)),
        rests_on=_evidence(scored, behind, budget),
        thin=tuple(_doubts(scored, level, behind, measure)),
        rule=RULE_IN_TIME if budget else RULE,
    )


def _chosen(level: Sequence[Row], *, timed: bool) -> Row:
    """`level` comes best score first, so a tie goes to the better score."""
    fastest = min(row.seconds or 0.0 for row in level)
    quick = [row for row in level if timed or (row.seconds or 0.0) <= _SAME * fastest]
    sizes = [row.memory_beyond_start for row in quick]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return quick[0]
    pairs = zip(quick, known, strict=True)
    return next(row for row, size in pairs if size <= _SAME * min(known))


def _reason(
    chosen: Row,
    best: Row,
    second: Row,
    level: Sequence[Row],
    behind: dict[str, Gap],
    measure: Measure,
    *,
    timed: bool,
) -> str:
    assert chosen.score is not None
    reason = f"test {MEASURES[measure][0]} {chosen.score.text(-1)}"
    if len(level) == 1:
        ahead = behind[second.recipe]
        by, limit = gap_text(abs(ahead.mean), measure), gap_text(ahead.limit, measure)
        how = ", task by task" if ahead.paired else ""
        return f"{reason}, ahead of {second.recipe} by {by}{how}, more than the ± {limit} of chance"
    others = [row for row in level if row is not chosen]
    if chosen is best:
        reason += f", the best, and level with {_names(others)}"
    else:
        apart = behind[chosen.recipe]
        by, limit = gap_text(abs(apart.mean), measure), gap_text(apart.limit, measure)
        within = "" if isnan(apart.limit) else f", within ± {limit}"
        reason += f", level with the best ({best.recipe}): {by} apart{within}"
    return f"{reason}; {_economy(chosen, level, timed=timed)}"


def _economy(chosen: Row, level: Sequence[Row], *, timed: bool) -> str:
    """The advantages of the chosen row over those that are level with it, as `_chosen` weighs them."""
    seconds, memory = chosen.seconds or 0.0, chosen.memory_beyond_start
    better = level[: level.index(chosen)]
    fastest = min(row.seconds or 0.0 for row in level)
    others = [row for row in level if row is not chosen]

    def is_slower(row: Row) -> bool:
        least = fastest if row in better else seconds
        return not timed and (row.seconds or 0.0) > _SAME * least

    def is_heavier(row: Row) -> bool:
        size = row.memory_beyond_start
        return row in better or (None not in (size, memory) and (size or 0) > _SAME * (memory or 0))

    slower = [row for row in others if is_slower(row)]
    alike = [row for row in others if row not in slower]
    heavier = [row for row in alike if is_heavier(row)]
    worse = [row for row in alike if row not in heavier]
    reasons, merits = [], []
    if slower:
        times = ", ".join(f"{seconds_text(row.seconds or 0.0)} ({row.recipe})" for row in slower)
        reasons.append(f"it trains in {seconds_text(seconds)} instead of {times}")
    if heavier:
        sizes = [f"{format_bytes(row.memory_beyond_start or 0)} ({row.recipe})" for row in heavier]
        merits.append(f"needs {format_bytes(memory or 0)} beyond start beside {', '.join(sizes)}")
    if worse:
        merits.append(f"scores better than {_names(worse)}")
    if merits:
        as_long = f"takes about as long as {_names(alike)}"
        merits.insert(0, "was given the same time" if timed else as_long)
        reasons.append("it " + _listed(merits))
    return " and ".join(reasons)


def _evidence(rows: Sequence[Row], behind: dict[str, Gap], budget: str) -> str:
    seeds = {len(row.seeds) for row in rows}
    paired = {apart.paired for apart in behind.values()}
    how = "the same for all and compared one by one"
    if False in paired:
        part = "in part " if True in paired else ""
        how = f"{part}not compared one by one: seeds differ, or older runs did not record them"
    evidence = [
        f"{_range({row.score.tasks for row in rows if row.score})} test tasks a recipe, {how}",
        f"{_range(seeds)} {'seed' if seeds == {1} else 'seeds'} each",
        f"{_range({row.meta_steps or 0 for row in rows})} meta-steps",
        budget,
    ]
    return ", ".join(filter(None, evidence))


def _doubts(
    scored: Sequence[Row], level: Sequence[Row], behind: dict[str, Gap], measure: Measure
) -> list[str]:
    doubts = []
    if len(level) > 1:
        doubts.append(
            f"the scores of {_names(level)} do not tell them apart; more tasks (--tasks) or seeds "
            "(--seeds) narrow the intervals"
        )
    fewest = min(row.score.tasks for row in scored if row.score)
    if fewest < MANY:
        tasks = "1 test task is" if fewest == 1 else f"{fewest} test tasks are"
        doubts.append(f"{tasks} few, of which to infer others: --tasks 100 or more")
    if any(len(row.seeds) == 1 for row in scored):
        doubts.append(
            "one seed of training; another may turn the order round: --seeds 3 tells how much "
            "they differ"
        )
    lead = behind[scored[1].recipe]
    spread = lead.seed_std
    if spread is None:
        spread = max((row.score.seed_std or [0.0])[-1] for row in scored[:2] if row.score)
    if len(level) == 1 and abs(lead.mean) < 2 * spread:
        what = "the difference" if lead.paired else "a score"
        doubts.append(
            f"seeds alone move {what} by {gap_text(spread, measure)} (SD); the lead is less than "
            "twice that"
        )
    if any(row.failed for row in scored):
        doubts.append("some runs failed, and those that did not count alone")
    return doubts


def _names(rows: Sequence[Row]) -> str:
    return _listed([row.recipe for row in rows])


def _listed(words: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _range(values: set[int]) -> str:
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)}))
