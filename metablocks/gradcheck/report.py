"""The result of a gradient check, as values and as text: meta-parameters in groups, comparisons."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from metablocks.devices import in_float64
from metablocks.learner import MetaLearner
from metablocks.types import Tensors

NOTHING = 1e-12
"""A gradient that is zero up to rounding, as a share of the whole."""
_CHANGED = 1e-8


@dataclass(frozen=True)
class GroupRow:
    """A group of meta-parameters."""

    group: str
    """The start of its names, `model.body`, and whether it adapts inside a task."""
    numbers: int
    error: float
    """The largest of the relative errors against the references (see `GradientReport`)."""
    norm: float
    """Of the meta-gradient."""
    order: int
    """The derivatives of the support loss that reach the gradient: 0 (no gradient), 1 or 2."""
    cosine: float | None
    """Between the first- and the second-order meta-gradient; None if one is zero or missing."""
    ok: bool


@dataclass(frozen=True)
class Agreement:
    """Two ways to compute one number, how far apart they are, and how far they may be."""

    what: str
    error: float
    within: float

    @property
    def ok(self) -> bool:
        """True if they agree; NaN does not."""
        return self.error <= self.within


@dataclass(frozen=True)
class Comparison:
    """A gradient, or its slope along a direction, beside the expected one, by name."""

    what: str
    got: Tensors
    expected: Tensors
    within: float


@dataclass(frozen=True)
class Reference:
    """A gradient, and everything that it is compared with."""

    gradient: Tensors
    comparisons: list[Comparison]
    first: Tensors | None = None
    """The gradient to first order."""
    second: Tensors | None = None
    agreements: list[Agreement] = field(default_factory=list)


@dataclass(frozen=True)
class GradientPart:
    """The check at one epoch, from which on the order and the step loss decide as they do there."""

    epoch: int
    what: str
    """The order and the weights of the query losses there, in words."""
    rows: tuple[GroupRow, ...]
    agreements: tuple[Agreement, ...]
    problems: tuple[str, ...]
    """The faults, each naming its parameters."""

    @property
    def ok(self) -> bool:
        """True without problems."""
        return not self.problems


@dataclass(frozen=True)
class GradientReport:
    """The result of `check_learner` and `check_gradients`.

    Every meta-parameter's gradient is compared with the plain autograd loop, entry by entry, and with
    finite differences, along a random direction; errors are relative to the gradient of the
    parameter's group, or to a thousandth of the whole if the group has less.
    """

    name: str
    device: str
    parts: tuple[GradientPart, ...]
    problems: tuple[str, ...]
    """Faults at every epoch, or those that keep the gradient from being computed."""
    notes: tuple[str, ...]
    changes: tuple[str, ...] = ()
    """The differences between a recipe and its small counterpart."""

    @property
    def ok(self) -> bool:
        """True if every gradient is right."""
        return not self.problems and all(part.ok for part in self.parts)

    @property
    def rows(self) -> tuple[GroupRow, ...]:
        """The rows of all parts."""
        return tuple(row for part in self.parts for row in part.rows)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.ok:
            count = len(self.problems) + sum(len(part.problems) for part in self.parts)
            return f"WRONG: {count} {'problem' if count == 1 else 'problems'}"
        worst = max((row.error for row in self.rows), default=0.0)
        groups = len({row.group for row in self.rows})
        return f"ok: the gradient of {groups} groups is right, to {worst:.0e} at worst"

    def text(self) -> str:
        """The report as lines for a terminal."""
        lines = [f"gradients of {self.name}, float64, {self.device}"]
        if self.changes:
            lines.append(f"made small and smooth: {'; '.join(self.changes)}")
        for part in self.parts:
            lines += ["", f"from epoch {part.epoch}: {part.what}", *_table(part.rows)]
            lines += [
                f"  {one.what}: {one.error:.0e}{'' if one.ok else ' WRONG'}"
                for one in part.agreements
            ]
            lines += [f"  WRONG: {problem}" for problem in part.problems]
        if self.notes or self.problems:
            lines.append("")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"WRONG: {problem}" for problem in self.problems]
        return "\n".join([*lines, "", self.verdict])


def by_group(
    learner: MetaLearner, grads: Tensors, reference: Reference
) -> tuple[tuple[GroupRow, ...], list[str]]:
    """A row for each group of `grads`, and the problems of the gradient that is compared."""
    rows, problems = [], []
    whole = max(norm(grads.values()), 1e-300)
    for group, names in _groups(learner, list(grads)).items():
        size = norm(grads[name] for name in names)
        scale = max(size, 1e-3 * whole)
        errors, ok = [], True
        for comparison in reference.comparisons:
            got, expected = comparison.got, comparison.expected
            off = {name: float((got[name] - expected[name]).norm()) / scale for name in names}
            error = sum(value**2 for value in off.values()) ** 0.5
            errors.append(error if error == error else float("inf"))
            if not error <= comparison.within:
                ok = False
                wrong = [name for name, value in off.items() if not value <= comparison.within]
                problems.append(_problem(comparison, wrong or names, error))
        first, second = (
            [tensors[name] for name in names] if tensors else None
            for tensors in (reference.first, reference.second)
        )
        order = 0 if size <= NOTHING * whole else 1
        if order and first is not None:
            gap = norm(reference.gradient[n] - f for n, f in zip(names, first, strict=True))
            order = 2 if gap > _CHANGED * scale else 1
        cosine = _cosine(first, second, NOTHING * whole) if first and second else None
        numbers = sum(grads[name].numel() for name in names)
        rows.append(GroupRow(group, numbers, max(errors, default=0.0), size, order, cosine, ok))
    return tuple(rows), problems


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    total: float = sum(float(in_float64(tensor).square().sum()) for tensor in tensors)
    return math.sqrt(total)


def _groups(learner: MetaLearner, names: list[str]) -> dict[str, list[str]]:
    """Names by the start they share: a model's children, a rule's tensors and the layers they serve."""
    adapted = {f"model.{name}" for name in learner.adapted}
    mixed = any(name not in adapted for name in names if name.startswith("model."))
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "model":
            key = ".".join(parts[:2])
            if mixed:
                key += " (adapts)" if name in adapted else " (outer loop only)"
        else:
            start = 3 if parts[1] == "rules" else 1
            key = ".".join(parts[: start + 2])
        groups.setdefault(key, []).append(name)
    return groups


def _problem(comparison: Comparison, names: list[str], error: float) -> str:
    name = names[0]
    got, expected = comparison.got[name], comparison.expected[name]
    worst = int((got - expected).abs().argmax()) if got.ndim else 0
    numbers = f"{float(got.flatten()[worst]):.6g}, expected {float(expected.flatten()[worst]):.6g}"
    more = f" (and {', '.join(names[1:4])}{', …' if names[4:] else ''})" if names[1:] else ""
    off = f"off {comparison.what} by {error:.1e}, {comparison.within:.0e} allowed"
    return f"{name}{more}: {off}: {numbers}"


def _cosine(first: list[Tensor], second: list[Tensor], least: float) -> float | None:
    norms = norm(first), norm(second)
    if min(norms) <= least or not min(norms):
        return None
    product = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    return product / (norms[0] * norms[1])


def _table(rows: Sequence[GroupRow]) -> list[str]:
    head = ("meta-parameters", "numbers", "rel. error", "norm", "order", "cos(1st, 2nd)", "")
    cells = [
        (
            row.group,
            str(row.numbers),
            f"{row.error:.1e}",
            f"{row.norm:.2e}",
            str(row.order),
            "-" if row.cosine is None else f"{row.cosine:.4f}",
            "" if row.ok else "WRONG",
        )
        for row in rows
    ]
    widths = [max(len(line[k]) for line in [head, *cells]) for k in range(len(head))]
    align = ["<", ">", ">", ">", ">", ">", "<"]
    columns = [f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True)]
    return ["  " + "  ".join(columns).format(*line).rstrip() for line in [head, *cells]]
