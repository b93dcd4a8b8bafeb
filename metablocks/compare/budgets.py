"""One budget for all contenders, as overrides of their recipes.

A budget changes `outer.steps_per_epoch` alone. The number of epochs stays, so that schedules and
annealings, which are counted in epochs, keep their shape over the training.

- steps: every recipe takes the same number of meta-steps.
- minutes: meta-steps and validations of a run take that long, as measured beforehand (`probe`).
- neither: as the recipes say, if they say the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metablocks.compare.contenders import Contender
from metablocks.errors import RecipeError

_STEPS = "outer.steps_per_epoch"


@dataclass(frozen=True)
class Pace:
    """How fast a recipe trains on this machine, in seconds."""

    step: float
    """Of one meta-step, the mean over the whole training."""
    validation: float


@dataclass(frozen=True)
class Length:
    """How long a recipe trains."""

    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def override(self) -> str:
        return f"{_STEPS}={self.steps_per_epoch}"

    def __str__(self) -> str:
        return f"{self.epochs} epochs × {self.steps_per_epoch:,} = {self.steps:,} meta-steps"


def own_length(values: Mapping[str, Any]) -> Length:
    """What a recipe says itself."""
    return Length(values["outer"]["epochs"], values["outer"]["steps_per_epoch"])


def check_same_budget(contenders: Sequence[Contender]) -> None:
    """Raise `RecipeError` where recipes that are trained as they are say different budgets."""
    trained = [contender for contender in contenders if contender.recipe]
    told = {
        f"{own_length(each.values).steps:,} meta-steps of {each.values['outer']['tasks_per_step']} "
        "tasks": each.label
        for each in reversed(trained)
    }
    if len(told) > 1:
        budgets = "; ".join(f"{label} trains {budget}" for budget, label in reversed(told.items()))
        raise RecipeError(
            f"the recipes state different budgets: {budgets}. Give one to all: --steps N "
            "(meta-steps) or --minutes M (training time of a run)"
        )


def by_steps(wanted: int, trained: Sequence[Contender]) -> list[Length]:
    """The lengths nearest to `wanted` meta-steps, the same for all where the epochs allow it.

    Raises `RecipeError` for fewer meta-steps than a recipe has epochs.
    """
    epochs = [own_length(contender.values).epochs for contender in trained]
    for contender, count in zip(trained, epochs, strict=True):
        if wanted < count:
            raise RecipeError(
                f"--steps {wanted}: {contender.label} has {count} epochs of at least one meta-step; "
                f"take --steps {max(epochs)} or more, or fewer epochs: --set outer.epochs=10 (what "
                "a recipe anneals is counted in epochs)"
            )
    return [
        Length(count, steps // count)
        for count, steps in zip(epochs, _totals(wanted, epochs), strict=True)
    ]


def by_minutes(minutes: float, contender: Contender, pace: Pace) -> Length:
    """The longest training that fits, validations included: E·(S·step) + V·validation ≤ minutes.

    Raises `RecipeError` where not even one meta-step an epoch does.
    """
    epochs = own_length(contender.values).epochs
    validations = count_validations(epochs, contender.values["evaluation"]["every"])
    fixed = validations * pace.validation
    steps = math.floor((60 * minutes - fixed) / (epochs * pace.step))
    if steps < 1:
        least = (fixed + epochs * pace.step) / 60
        raise RecipeError(
            f"--minutes {minutes:g}: {contender.label} needs {least:.2g} minutes for {epochs} epochs "
            f"of one meta-step ({1000 * pace.step:.3g} ms) and {validations} validations "
            f"({pace.validation:.2g} s each); give more minutes, fewer --tasks, or rarer "
            "validations: --set evaluation.every=…"
        )
    return Length(epochs, steps)


def count_validations(epochs: int, every: int) -> int:
    """How often a run validates: every so many epochs, and after the last.

    >>> count_validations(10, 5), count_validations(10, 4), count_validations(3, 10)
    (2, 3, 1)
    """
    return math.ceil(epochs / every)


def _totals(wanted: int, epochs: Sequence[int]) -> list[int]:
    """Multiples of each number of epochs near `wanted`; one number for all if one is within 25 %.

    >>> _totals(300, [120, 120]), _totals(1000, [10, 20]), _totals(1000, [120, 50])
    ([240, 240], [1000, 1000], [1200, 1200])
    >>> _totals(300, [120, 50])
    [240, 300]
    """
    common = math.lcm(*epochs)
    if abs(nearest_multiple(common, wanted) - wanted) <= wanted / 4:
        return [nearest_multiple(common, wanted)] * len(epochs)
    return [nearest_multiple(count, wanted) for count in epochs]


def nearest_multiple(unit: int, wanted: int) -> int:
    """The multiple of `unit` nearest to `wanted`, at least one; of two equally near, the smaller.

    >>> nearest_multiple(120, 300), nearest_multiple(120, 310), nearest_multiple(120, 1)
    (240, 360, 120)
    """
    return unit * max(1, math.ceil(wanted / unit - 0.5))
