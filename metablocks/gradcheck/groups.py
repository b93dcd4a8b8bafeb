"""Meta-parameters in groups: the rows of a report, and what is wrong with whom, by name."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from metablocks.gradcheck.report import GroupRow
from metablocks.learner import MetaLearner
from metablocks.types import Tensors

_NOTHING = 1e-12  # as a share of the whole gradient
_CHANGED = 1e-8


@dataclass(frozen=True)
class Comparison:
    """What a gradient is held to: tensors, or slopes along `directions`, by name."""

    what: str
    expected: Tensors
    within: float
    directions: Tensors | None = None

    def difference(self, name: str, gradient: Tensor) -> float:
        """How far the gradient of one parameter is off."""
        if self.directions is not None:
            gradient = (gradient * self.directions[name]).sum()
        return float((gradient - self.expected[name]).norm())


def by_group(
    learner: MetaLearner,
    grads: Tensors,
    held: Tensors,
    comparisons: Sequence[Comparison],
    orders: dict[str, Tensors],
) -> tuple[tuple[GroupRow, ...], list[str]]:
    """A row for each group of `grads`, and the problems of `held`, which is what is compared."""
    rows, problems = [], []
    whole = max(_norm(grads.values()), 1e-300)
    for group, names in _groups(learner, list(grads)).items():
        norm = _norm(grads[name] for name in names)
        scale = max(norm, 1e-3 * whole)
        error, ok = 0.0, True
        for one in comparisons:
            off = {name: one.difference(name, held[name]) / scale for name in names}
            total = sum(value**2 for value in off.values()) ** 0.5
            error = max(error, total) if total == total else float("inf")
            if not total <= one.within:
                ok = False
                wrong = [name for name, value in off.items() if not value <= one.within]
                problems.append(_problem(one, held, wrong or list(off), total))
        first, second = (
            [orders[which][name] for name in names] if which in orders else None
            for which in ("first", "second")
        )
        own = [held[name] for name in names]
        order = 0 if norm <= _NOTHING * whole else 1
        if order and first is not None:
            gap = _norm(a - b for a, b in zip(own, first, strict=True))
            order = 2 if gap > _CHANGED * scale else 1
        cosine = None
        if first is not None and second is not None:
            cosine = _cosine(first, second, _NOTHING * whole)
        rows.append(
            GroupRow(
                group,
                sum(grads[name].numel() for name in names),
                error,
                norm,
                order,
                cosine,
                ok,
            )
        )
    return tuple(rows), problems


def _groups(learner: MetaLearner, names: list[str]) -> dict[str, list[str]]:
    """Names by the start they share: a model's children, a rule's tensors and whom they serve."""
    adapted = {f"model.{name}" for name in learner.adapted}
    mixed = any(f"{n}" not in adapted for n in names if n.startswith("model."))
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "model":
            key = ".".join(parts[:2])
            if mixed:
                key += " (adapts)" if name in adapted else " (outer loop only)"
        else:
            start = 3 if parts[1] == "rules" else 1
            key = ".".join(parts[: start + 2])
        found.setdefault(key, []).append(name)
    return found


def _problem(one: Comparison, held: Tensors, names: list[str], error: float) -> str:
    name = names[0]
    due = one.expected[name]
    own = held[name] if one.directions is None else (held[name] * one.directions[name]).sum()
    worst = int((own - due).abs().argmax()) if own.ndim else 0
    numbers = f"{float(own.flatten()[worst]):.6g} where {float(due.flatten()[worst]):.6g} is due"
    more = f" (and {', '.join(names[1:4])}{', …' if names[4:] else ''})" if names[1:] else ""
    return f"{name}{more}: off {one.what} by {error:.1e}, {one.within:.0e} allowed: {numbers}"


def _cosine(one: list[Tensor], other: list[Tensor], least: float) -> float | None:
    norms = _norm(one) * _norm(other)
    if min(_norm(one), _norm(other)) <= least or not norms:
        return None
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True))) / norms


def _norm(tensors: Iterable[Tensor]) -> float:
    total: float = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return math.sqrt(total)
