"""What is asked of a comparison."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Seeds: TypeAlias = int | tuple[int, ...]
"""How many, counted up from the first recipe's own; or which."""


@dataclass(frozen=True)
class Request:
    """The arguments of `metablocks compare`."""

    names: tuple[str, ...]
    """Recipes to train, and folders of finished runs."""
    overrides: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    seeds: Seeds = 1
    steps: int | None = None
    """Meta-steps of every recipe."""
    minutes: float | None = None
    """Training time of every run."""
    tasks: int | None = None
    """Evaluation tasks of every recipe."""
    jobs: int = 1
    """How many runs are trained side by side."""
    out: Path = Path("comparisons")
    data: Path | None = None
    device: str | None = None
    quiet: bool = False
    argv: tuple[str, ...] = ()

    @property
    def recipe_overrides(self) -> tuple[str, ...]:
        """Overrides for every recipe, before the budget's."""
        tasks = () if self.tasks is None else (f"evaluation.tasks={self.tasks}",)
        return (*self.overrides, *tasks)


def parse_seeds(text: str) -> Seeds:
    """`3`: three seeds, from the recipe's own on. `0,7` or `7,`: these. Raises `ValueError`.

    >>> parse_seeds("3"), parse_seeds("0,7"), parse_seeds("7,")
    (3, (0, 7), (7,))
    """
    words = text.removesuffix(",").split(",")
    numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,10}", word.strip())]
    several = "," in text
    if len(numbers) == len(words) == len(set(numbers)) and (several or numbers[0] > 0):
        return tuple(numbers) if several else numbers[0]
    raise ValueError(f"takes how many seeds, or different ones as in 0,1,7; given {text}")


def parse_count(text: str, least: int = 1) -> int:
    """An integer of at least `least`. Raises `ValueError`."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(f"takes an integer of at least {least}, given {text}")
    return int(text)


def parse_minutes(text: str) -> float:
    """A number above 0. Raises `ValueError`.

    >>> parse_minutes("2"), parse_minutes("0.5")
    (2.0, 0.5)
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        raise ValueError(f"takes minutes, a number above 0, given {text}")
    return float(text)
