"""What a check of a recipe's gradients found, as values and as text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupRow:
    """A group of meta-parameters."""

    group: str
    """The start of its names, `model.body`, and whether it adapts inside a task."""
    numbers: int
    error: float
    """The larger of the relative errors against both references (see `GradientReport`)."""
    norm: float
    """Of the meta-gradient."""
    order: int
    """The derivatives of the support loss that reach the gradient: 0 (no gradient), 1 or 2."""
    cosine: float | None
    """Between the first- and the second-order meta-gradient; None where one is zero or missing."""
    ok: bool


@dataclass(frozen=True)
class Agreement:
    """Two ways to one number: what is compared, how far apart they are, how far they may be."""

    what: str
    error: float
    within: float

    @property
    def ok(self) -> bool:
        """Whether they agree; what is not a number does not."""
        return self.error <= self.within


@dataclass(frozen=True)
class GradientPart:
    """The check at one epoch, where the recipe's policies decide as they do from there on."""

    epoch: int
    what: str
    """How the gradient is computed there, in words."""
    rows: tuple[GroupRow, ...]
    agreements: tuple[Agreement, ...]
    problems: tuple[str, ...]
    """What is wrong, each naming its parameters."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` returns.

    Every meta-parameter's gradient is held to the plain autograd loop, entry by entry, and to finite
    differences, along a random direction; errors are relative to the gradient of the parameter's
    group, or to a thousandth of the whole where the group has less.
    """

    recipe: str
    device: str
    changes: tuple[str, ...]
    parts: tuple[GradientPart, ...]
    problems: tuple[str, ...]
    """What is wrong at every epoch, or keeps the gradient from being computed."""
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every gradient is right."""
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
        lines = [f"gradients of {self.recipe}, float64, {self.device}"]
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
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if k in (0, 6) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *cells]
    ]
