"""The runs of one contender as one row of numbers: every mean over its seeds.

Scores are pooled over all tasks of all seeds. With n_s tasks, mean m_s and spread s_s for seed s,
and m the mean over all N = Σ n_s tasks,

    std² = Σ_s ((n_s − 1) s_s² + n_s (m_s − m)²) / (N − 1),    interval = 1.96 std / √N

A worst decile and a loss are the means of the seeds' own. The interval is about tasks. How much the
result depends on the seed of training is the spread of the m_s, which is told apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from metablocks.compare.contenders import Contender, at
from metablocks.compare.results import FinalScores, FinishedRun


@dataclass(frozen=True)
class Score:
    """Pooled test scores after the last inner step; an accuracy is a share, 0 to 1."""

    tasks: int
    mean: float
    interval: float
    std: float
    worst_decile: float
    """The mean over seeds of the mean of each seed's worst tenth of tasks."""
    loss: float
    seed_std: float | None
    """Of the means of the seeds; None with one seed."""
    members: int = 1


@dataclass(frozen=True)
class Row:
    """One row of the table. Without finished runs there is no score, and every number is None."""

    recipe: str
    title: str
    seeds: tuple[int, ...]
    failed: int
    """How many runs failed."""
    measure: str | None = None
    inner_steps: int | None = None
    score: Score | None = None
    ensemble: Score | None = None
    meta_steps: int | None = None
    tasks_per_step: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    """Of training with its validations, the mean over seeds."""
    peak_memory: int | None = None
    memory_beyond_start: int | None = None
    train_loss: float | None = None


def summarise(contender: Contender, runs: Sequence[FinishedRun], failed: int = 0) -> Row:
    """The row of a contender."""
    title = str(contender.values["name"])
    if not runs:
        return Row(contender.label, title, (), failed)
    ensembles = [run.ensemble for run in runs if run.ensemble]
    return Row(
        recipe=contender.label,
        title=title,
        seeds=tuple(run.seed for run in runs),
        failed=failed,
        measure=runs[0].test.measure,
        inner_steps=runs[0].test.inner_steps,
        score=pool([run.test for run in runs]),
        ensemble=pool(ensembles) if len(ensembles) == len(runs) else None,
        meta_steps=runs[0].steps,
        tasks_per_step=at(contender.values, "outer.tasks_per_step"),
        seconds_per_step=sum(run.training_seconds for run in runs) / sum(run.steps for run in runs),
        seconds=fmean(run.seconds for run in runs),
        peak_memory=_largest([run.peak_memory for run in runs]),
        memory_beyond_start=_largest([run.memory_beyond_start for run in runs]),
        train_loss=fmean(run.train_loss for run in runs),
    )


def pool(tests: Sequence[FinalScores]) -> Score:
    """Scores over all tasks of all seeds.

    >>> one = FinalScores(2, "accuracy", 1, 0.5, 0.0, 0.0, 0.5, 1.0)
    >>> pool([one, FinalScores(2, "accuracy", 1, 0.7, 0.0, 0.0, 0.7, 0.5)])
    Score(tasks=4, mean=0.6, interval=0.113..., std=0.115..., worst_decile=0.6, loss=0.75,
    seed_std=0.141..., members=1)
    """
    total = sum(test.tasks for test in tests)

    def mean(values: Sequence[float]) -> float:
        return sum(t.tasks * value for t, value in zip(tests, values, strict=True)) / total

    middle = mean([test.mean for test in tests])
    squares = sum((t.tasks - 1) * t.std**2 + t.tasks * (t.mean - middle) ** 2 for t in tests)
    std = math.sqrt(squares / (total - 1)) if total > 1 else 0.0
    return Score(
        tasks=total,
        mean=middle,
        interval=1.96 * std / math.sqrt(total),
        std=std,
        worst_decile=mean([test.worst_decile for test in tests]),
        loss=mean([test.loss for test in tests]),
        seed_std=stdev(test.mean for test in tests) if len(tests) > 1 else None,
        members=tests[0].members,
    )


def ratio(value: float | None, first: float | None) -> float | None:
    """value / first, where both are known and that means something.

    >>> ratio(3.0, 2.0), ratio(None, 2.0), ratio(1.0, 0.0)
    (1.5, None, None)
    """
    return value / first if value is not None and first else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
