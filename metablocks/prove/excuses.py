"""Where a law does not apply to a block: why, or None where it does."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metablocks.laws import norms, rules
from metablocks.laws.cases import Case


def draws(make: Any) -> str | None:
    return "it draws random numbers" if any(rules.draws(make, Case().problem())) else None


def draws_nothing_or_says_so(make: Any) -> str | None:
    if make().draws_each_step:
        return "it declares draws_each_step"
    return None if draws(make) else "it draws no random numbers"


def any_number_of_steps(make: Any) -> str | None:
    rule = make().setup({"w": torch.zeros(2)}, 2)
    return (
        "it is made for any number of steps (max_steps is None)" if rule.max_steps is None else None
    )


def no_identity(make: Any) -> str | None:
    if rules.is_the_identity(make, Case().problem()):
        return None
    return "it does not start as the identity"


def keeps_its_transform(make: Any) -> str | None:
    return "it does not adapt its transform" if make().rate is None else None


def without(field: str) -> Callable[[Any], str | None]:
    def excuse(block: Any) -> str | None:
        known = (
            [f.name for f in dataclasses.fields(block)] if dataclasses.is_dataclass(block) else []
        )
        return None if field in known else f"it is no dataclass with a field {field}"

    return excuse


def not_exact(estimator: Any) -> str | None:
    return None if getattr(estimator, "exact", True) else "it declares exact = False"


def draws_batches(estimator: Any) -> str | None:
    return "it draws batches" if getattr(estimator, "batch", None) else None


def no_conversion(norm: Any) -> str | None:
    return "it is a module, and not a conversion" if hasattr(norm, "module") else None


def no_rows(norm: Any) -> str | None:
    problem = Case(norm="batch", steps=2, width=3).problem()
    if not norms.is_step_aware(norm, problem):
        return "no module of it asks for the inner step (inner_step)"
    rows = [p for p in norm(problem.model(), 5).parameters() if p.ndim == 2 and len(p) == 5]
    return None if rows else "its parameters have no row for each step"


def evaluates_by_statistics(norm: Any) -> str | None:
    model: nn.Module = norm(Case(norm="batch").problem().model(), 1)
    stored = any(getattr(module, "keeps_statistics", False) for module in model.modules())
    return (
        "it evaluates by other statistics than it trains by (keeps_statistics)" if stored else None
    )
