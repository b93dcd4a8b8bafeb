"""Scores of a learner for every inner step, over many tasks.

Tasks are fixed: number 0 … n − 1 of a split, the same for every run with the same task source and
seed. Batch norm normalises by the learner's `norm_statistics`: the batch's, query set included (the
transductive convention), unless it or a norm of the model says otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from metablocks.executors import Share, share_of
from metablocks.learner import MetaLearner
from metablocks.meta_steps import accuracy
from metablocks.tasks.base import Split, TaskSource
from metablocks.types import Tasks

Measure = Literal["accuracy", "mse", "bits"]
MEASURES: dict[Measure, tuple[str, str]] = {
    "accuracy": ("accuracy", "higher is better"),
    "mse": ("MSE", "lower is better"),
    "bits": ("bits per byte", "lower is better"),
}
"""The name of each measure, and which way is better."""
MANY = 30
"""From so many tasks on a mean is about normally distributed, and 1.96 standard errors are 95 %."""


@dataclass(frozen=True)
class Scores:
    """Statistics over tasks: in each list one number for each inner step, from step 0.

    `measure` is "accuracy" (higher is better, from 0 to 1), "mse" or "bits" per byte (lower). Of the
    tasks' scores,

    - `mean` is the mean, and `interval` half the width of its 95 % confidence interval: 1.96
      standard errors, below 30 tasks Student's number of them (`half_width`);
    - `std` is the standard deviation (n − 1 in the denominator);
    - `worst_decile` is the mean over the worst tenth, ⌈n / 10⌉ tasks, chosen anew at each step.

    `loss` is the mean query loss. For an ensemble, `members` are the epochs of its checkpoints, the
    best first, and each list holds one number, that after `inner_steps` inner steps. Of scores pooled
    over several seeds of training, `seed_std` is the standard deviation of their means. `by_task` are
    the scores themselves, `[tasks, steps + 1]`, float64, and `losses_by_task` the query losses, as
    long as they are at hand.

    What one task alone does not have, its `interval` and `std`, is nan, and written "–".
    """

    split: Split
    tasks: int
    measure: Measure
    mean: list[float]
    interval: list[float]
    std: list[float]
    worst_decile: list[float]
    loss: list[float]
    members: list[int] | None = None
    inner_steps: int | None = None
    seed_std: list[float] | None = None
    by_task: Tensor | None = field(default=None, repr=False, compare=False)
    losses_by_task: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def checkpoints(self) -> int:
        """The number of an ensemble's checkpoints."""
        return len(self.members or [1])

    @property
    def final(self) -> float:
        """The mean after the last step."""
        return self.mean[-1]

    @property
    def error(self) -> float:
        """The final score as something to be small: nan counts as infinite.

        >>> values = torch.tensor([[0.25]])
        >>> pool("test", "accuracy", values, values).error
        0.75
        """
        if math.isnan(self.final):
            return math.inf
        return 1.0 - self.final if self.measure == "accuracy" else self.final

    def text(self, step: int) -> str:
        """The score after `step` inner steps, as people write it.

        >>> values = torch.tensor([[0.2, 0.7], [0.2, 0.8], [0.2, 0.9]])
        >>> pool("test", "accuracy", values, values).text(1)
        '80.00 ± 24.84 %'
        >>> pool("test", "accuracy", values[:1], values[:1]).text(1)
        '70.00 % ± –'
        """
        mean = score_text(self.mean[step], self.measure)
        if self.tasks == 1:
            return f"{mean} ± –"
        return f"{mean.removesuffix(' %')} ± {score_text(self.interval[step], self.measure)}"

    def spread_text(self, step: int) -> tuple[str, str]:
        """Standard deviation and worst tenth after `step` inner steps, as people write them."""
        std = score_text(self.std[step], self.measure) if self.tasks > 1 else "–"
        return std, score_text(self.worst_decile[step], self.measure)

    def as_dict(self, *, by_task: bool = False) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints; what only some scores have, only of those."""
        values = plain(self)
        if by_task and self.by_task is not None:
            values["by_task"] = self.by_task.tolist()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scores":
        """The scores that a log has, in which null stands for nan.

        Raises `KeyError`, `TypeError` or `ValueError` for values that are none.
        """

        def floats(row: Any) -> list[float]:
            return [math.nan if value is None else float(value) for value in row]

        names = ("mean", "interval", "std", "worst_decile", "loss")
        lists = {name: floats(values[name]) for name in names}
        rows, steps = values.get("by_task"), len(lists["mean"])
        table = None if rows is None else torch.tensor([*map(floats, rows)], dtype=torch.float64)
        scores = cls(**{**values, **lists, "by_task": table})
        if {len(each) for each in lists.values()} != {steps} or not steps:
            raise ValueError("statistics of other numbers of inner steps")
        if scores.measure not in MEASURES or not isinstance(scores.tasks, int) or scores.tasks < 1:
            raise ValueError(f"measure {scores.measure!r} of {scores.tasks!r} tasks")
        if table is not None and list(table.shape) != [scores.tasks, steps]:
            raise ValueError(
                f"scores of tasks {list(table.shape)}, expected {[scores.tasks, steps]}"
            )
        return scores


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as plain values, its `Scores` too: without their scores by task."""

    def select(items: list[tuple[str, Any]]) -> dict[str, Any]:
        some = ("members", "inner_steps", "seed_std")
        left_out = ("by_task", "losses_by_task")
        return {
            name: value
            for name, value in items
            if name not in left_out and (name not in some or value is not None)
        }

    return asdict(record, dict_factory=select)


def measure_of(source: TaskSource) -> Measure:
    """The measure of a source's tasks: accuracy of classes, squared error of numbers, bits of text."""
    measures: dict[str, Measure] = {"classification": "accuracy", "text": "bits"}
    return measures.get(source.kind, "mse")


def from_losses(losses: Tensor, measure: Measure) -> Tensor:
    """Scores that are the losses themselves: nats become bits.

    >>> from_losses(torch.tensor([math.log(2)]), "bits")
    tensor([1.])
    """
    return losses / math.log(2) if measure == "bits" else losses


def score(
    learner: MetaLearner,
    source: TaskSource,
    split: Split,
    *,
    tasks: int,
    steps: int | None = None,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    between: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores of the learner after each inner step on tasks 0 … `tasks` − 1 of a split.

    `steps` is the learner's own number unless given. `batch` tasks are evaluated at a time, divided
    among the processes of a distributed learner, which all get the scores of all; tensors of floats are
    of `dtype`. `between` is called before each batch. Law: scores do not depend on `batch`, nor on the
    number of processes, up to rounding.
    """
    measure = measure_of(source)
    metric = accuracy if measure == "accuracy" else None

    def judge(part: Tasks) -> tuple[Tensor, Tensor]:
        result = learner.evaluate(part, steps=steps, metric=metric)
        losses = result.query_losses.cpu().double()
        scores = from_losses(losses, measure) if result.metrics is None else result.metrics
        return scores.cpu().double(), losses

    share = share_of(learner.executor)
    return score_by(judge, source, split, tasks, batch, dtype, share, between)


def score_by(
    judge: Callable[[Tasks], tuple[Tensor, Tensor]],
    source: TaskSource,
    split: Split,
    tasks: int,
    batch: int,
    dtype: torch.dtype,
    share: Share,
    between: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores by `judge`: of a batch of tasks scores and losses, float64 `[tasks, steps + 1]`."""
    rows: list[tuple[Tensor, Tensor]] = []
    for first in range(0, tasks, batch):
        between()
        own = share.part(range(first, min(first + batch, tasks)))
        rows += chain(*share.gather([judge(source.sample(split, own).to(dtype))] if own else []))
    values, losses = map(torch.cat, zip(*rows, strict=True))
    return pool(split, measure_of(source), values, losses)


def pool(split: Split, measure: Measure, values: Tensor, losses: Tensor) -> Scores:
    """The statistics of tasks' scores and losses, both `[tasks, steps + 1]`.

    >>> values = torch.tensor([[4.0], [1.0], [1.0]])
    >>> scores = pool("test", "mse", values, values)
    >>> scores.mean, scores.worst_decile
    ([2.0], [4.0])
    """
    count = len(values)
    spread = values.std(0) if count > 1 else torch.full_like(values[0], torch.nan)
    worst = values.topk(math.ceil(count / 10), dim=0, largest=measure != "accuracy").values
    return Scores(
        split=split,
        tasks=count,
        measure=measure,
        mean=values.mean(0).tolist(),
        interval=half_width(spread, count).tolist(),
        std=spread.tolist(),
        worst_decile=worst.mean(0).tolist(),
        loss=losses.mean(0).tolist(),
        by_task=values,
        losses_by_task=losses,
    )


def pool_seeds(scores: Sequence[Scores]) -> Scores:
    """Scores of several seeds of training, pooled over all tasks of all of them.

    With n_s tasks, mean m_s and spread s_s for seed s, and m the mean over all N = Σ n_s tasks,

        std² = Σ_s ((n_s − 1) s_s² + n_s (m_s − m)²) / (N − 1),    interval = half_width(std, N)

    A worst decile and a loss are the means of the seeds' own. The interval is about tasks; how much
    the result depends on the seed of training is `seed_std`, the spread of the m_s; None with one.

    >>> one, other = (Scores("test", 50, "mse", [m], [0.0], [0.0], [m], [1.0]) for m in (0.5, 0.7))
    >>> pooled = pool_seeds([one, other])
    >>> pooled.tasks, pooled.text(0), f"{pooled.seed_std[0]:.4f}"
    (100, '0.6000 ± 0.0197', '0.1414')
    """
    counts = torch.tensor([[s.tasks] for s in scores], dtype=torch.float64)
    total = int(counts.sum())

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s, name) for s in scores], dtype=torch.float64)

    def mean(values: Tensor) -> Tensor:
        return (counts * values).sum(0) / total

    means = column("mean")
    within = torch.where(counts > 1, (counts - 1) * column("std") ** 2, 0.0)
    squares = within + counts * (means - mean(means)) ** 2
    std = (squares.sum(0) / (total - 1)).sqrt() if total > 1 else column("std")[0]
    return replace(
        scores[0],
        tasks=total,
        mean=mean(means).tolist(),
        interval=half_width(std, total).tolist(),
        std=std.tolist(),
        worst_decile=mean(column("worst_decile")).tolist(),
        loss=mean(column("loss")).tolist(),
        seed_std=means.std(0).tolist() if len(scores) > 1 else None,
        by_task=None,
        losses_by_task=None,
    )


def difference(one: Scores, other: Scores) -> Scores:
    """The final score of `one` less that of `other`, task by task, on the same tasks.

    Its interval is that of the mean difference: what makes tasks easier or harder for both is not in it.

    >>> hard, noise = torch.tensor([[0.2], [0.5], [0.9]]), torch.tensor([[0.1], [0.11], [0.09]])
    >>> one, other = (pool("test", "mse", v, v) for v in (hard + noise, hard))
    >>> difference(one, other).text(0), one.text(0)
    ('0.1000 ± 0.0248', '0.6333 ± 0.8585')

    Raises `ValueError` for scores that are not of equally many tasks, each known.
    """
    if one.by_task is None or other.by_task is None or one.tasks != other.tasks:
        raise ValueError("scores that are not known task by task, of equally many tasks")
    values = one.by_task[:, -1:] - other.by_task[:, -1:]
    return pool(one.split, one.measure, values, values)


def half_width(std: Tensor, count: int) -> Tensor:
    """Half the width of the 95 % confidence interval of a mean of `count` numbers; nan for one.

    >>> half_width(torch.tensor(1.0), 100), half_width(torch.tensor(1.0), 4)
    (tensor(0.1960), tensor(1.5912))
    """
    errors = 1.96 if count >= MANY else student(count - 1)
    return errors * std / math.sqrt(count)


@cache
def student(freedom: int) -> float:
    """Standard errors on each side that hold 95 % of Student's t with so many degrees of freedom.

    By bisection of P(|t| ≤ √ν tan θ), which for a whole ν is a finite sum of powers of cos θ. nan for 0.

    Source: Abramowitz, Stegun 1964, 26.7.3 and 26.7.4.

    >>> [round(student(freedom), 3) for freedom in (1, 2, 9, 28)]
    [12.706, 4.303, 2.262, 2.048]
    """

    def probability(angle: float) -> float:
        odd, cosine = freedom % 2, math.cos(angle)
        term = total = cosine if odd else 1.0
        for index in range(2 + odd, freedom - 1, 2):
            term *= cosine**2 * (index - 1) / index
            total += term
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))

    if freedom < 1:
        return math.nan
    low, high = 0.0, math.pi / 2
    while high - low > 1e-15:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def score_text(value: float, measure: Measure) -> str:
    """A score, or a spread of scores, as people write it.

    >>> score_text(0.5, "accuracy"), score_text(0.5, "mse"), score_text(2e-5, "mse")
    ('50.00 %', '0.5000', '2e-05')
    """
    return f"{100 * value:.2f} %" if measure == "accuracy" else number_text(value)


def number_text(value: float) -> str:
    """A number in a few characters."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
