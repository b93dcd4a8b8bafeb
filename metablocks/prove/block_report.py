"""What `verify` found, as values and as text."""

import textwrap
from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["holds", "breaks", "crashes", "does not apply"]


@dataclass(frozen=True)
class LawRow:
    """One law."""

    law: str
    says: str
    """The law in a sentence."""
    verdict: Verdict
    found: str = ""
    """Where it breaks, how; where it does not apply, why."""
    case: str = ""
    """The smallest case on which it breaks, in Python."""
    words: str = ""
    """That case in words."""
    reproduce: str = ""
    """Python that shows it again."""
    cases: int = 0
    """How many it was run on."""

    @property
    def ok(self) -> bool:
        """Whether the law holds, or does not apply."""
        return self.verdict in ("holds", "does not apply")


@dataclass(frozen=True)
class BlockReport:
    """What `verify` returns: a row for each law of the block's protocol. `str` gives the report."""

    block: str
    """The Python that makes the block."""
    protocol: str
    rows: tuple[LawRow, ...]

    @property
    def ok(self) -> bool:
        """Whether no law breaks."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.law) for row in self.rows)
        lines = [
            f"{self.block}, held to the laws of the {self.protocol.replace('_', ' ')} protocol",
            "",
        ]
        for row in self.rows:
            verdict = row.verdict if row.ok else row.verdict.upper()
            lines.append(f"  {row.law:<{width}}  {verdict:<14}  {_brief(row)}".rstrip())
        broken = [row for row in self.rows if not row.ok]
        run = sum(row.verdict != "does not apply" for row in self.rows)
        lines += ["", f"{_verdict(len(broken), run)}"]
        alike: dict[str, list[LawRow]] = {}
        for row in broken:
            alike.setdefault(row.found if row.verdict == "crashes" else row.law, []).append(row)
        for number, rows in enumerate(alike.values(), start=1):
            lines += ["", *_detail(number, rows)]
        return "\n".join(lines)


def _brief(row: LawRow) -> str:
    if row.verdict == "holds":
        return f"on {row.cases} problem{'s' * (row.cases != 1)}"
    if row.verdict == "does not apply":
        return row.found
    return f"on {row.case}" if row.case else ""


def _verdict(broken: int, run: int) -> str:
    if not broken:
        return f"all {run} laws that apply hold"
    return f"{broken} of {run} laws {'breaks' if broken == 1 else 'break'}"


def _detail(number: int, rows: list[LawRow]) -> list[str]:
    """What is to be said of a law that breaks, or of all that crash alike."""

    def wrapped(label: str, text: str) -> list[str]:
        return textwrap.wrap(
            text, 100, initial_indent=f"   {label:<10}", subsequent_indent=" " * 13,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    row, *others = rows
    return [
        f"{number}. {row.law} {row.verdict}",
        *wrapped("the law", row.says),
        *wrapped("found", row.found),
        *wrapped("also in", ", ".join(other.law for other in others)),
        *wrapped("smallest", f"{row.case}: {row.words}" if row.words else row.case),
        "   again, in Python:",
        "",
        textwrap.indent(row.reproduce, " " * 6),
    ]
