"""A search for recipes that do what none should, until the time is up; what it finds is shrunk."""

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from tools.fuzzing.recipes import recipes
from tools.fuzzing.trial import attempt

ROUND = 200
"""Recipes from one seed; what one of them leads to is shrunk before the next is tried."""


@dataclass(frozen=True)
class Found:
    """The smallest recipe that leads to an error, and the error."""

    text: str
    error: str


class _TimeUp(BaseException):
    """Hypothesis lets it through, from wherever a round is."""


@dataclass
class Search:
    """Random recipes one after another; `counts` of what became of them, by word.

    A finding is reported once: recipes that lead to the same place again count as `known`.
    """

    data: Path | None
    tell: Callable[[str], None] = lambda text: None
    counts: Counter[str] = field(default_factory=Counter)
    known: set[str] = field(default_factory=set)

    def round(self, number: int, until: float) -> Found | None:
        """One seed's recipes, or as many as there is time for; the first finding, shrunk."""
        smallest: Found | None = None
        sign = ""

        def one(text: str) -> None:
            nonlocal smallest, sign
            if time.monotonic() > until:
                raise _TimeUp
            self.tell(text)
            try:
                outcome = attempt(text, self.data)
            except Exception as error:
                here = signature(error)
                if here in self.known or (sign and here != sign):
                    self.counts["known"] += 1
                    return
                sign = here
                self.counts["failed"] += 1
                if smallest is None or len(text) <= len(smallest.text):
                    smallest = Found(text, "".join(traceback.format_exception(error)))
                raise
            self.counts["refused" if outcome.refused else "ran"] += 1

        test = settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )(seed(number)(given(recipes())(one)))
        try:
            test()
        except _TimeUp:
            pass
        except Exception:
            if smallest is None:  # not of a recipe: the fuzz itself is broken
                raise
        if smallest is not None:
            self.known.add(sign)
        return smallest


def signature(error: BaseException) -> str:
    """Where an error comes from, in words that do not depend on the recipe: its place in the code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/metablocks/" in frame.filename] or frames
    words = re.sub(r"[\d.e+-]+|\[.*?\]|\".*?\"", "#", str(error))[:40]
    return f"{type(error).__name__} {Path(own[-1].filename).name}:{own[-1].name} {words}"
