"""The arguments of the command `compare`: their parsers, and the request that they make."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias, TypeVar

ABOUT = "train recipes under one budget, or read finished runs, and say which to use"
MORE = """

Recipes are trained, each run in a process of its own, on the same tasks with the same seeds; folders
of finished runs are read. Runs that differ in the seed alone are one row. The result is a table, a
picture, and a recommendation with the rule that it follows from, in a folder below --out. A variant
of a recipe is a file of its own: metablocks show NAME --set PATH=VALUE > variant.yaml"""

EXAMPLES = """metablocks compare maml_sinusoid fomaml_sinusoid --steps 2400
metablocks compare maml_omniglot_5w1s mine.yaml --minutes 10 --seeds 3
metablocks compare runs/maml_sinusoid-20250101-120000 runs/fomaml_sinusoid-20250101-130000"""

_T = TypeVar("_T")
Seeds: TypeAlias = int | tuple[int, ...]
"""A number of seeds, counted up from the first recipe's own; or the seeds themselves."""


@dataclass(frozen=True)
class Request:
    """The arguments of `metablocks compare`."""

    names: tuple[str, ...]
    """Recipes to train, and folders of finished runs."""
    overrides: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    """Packages whose blocks recipes may use."""
    seeds: Seeds = 1
    steps: int | None = None
    """Meta-steps of every recipe."""
    minutes: float | None = None
    """Training time of every run."""
    tasks: int | None = None
    """Evaluation tasks of every recipe."""
    jobs: int = 1
    """Runs trained side by side."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`, except for those that it shares with `run`."""
    parser.add_argument(
        "names", nargs="+", metavar="RECIPE|RUN_DIR", help="a recipe to train, or a finished run"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--steps", type=typed(parse_count), metavar="N", help="meta-steps of every run"
    )
    budget.add_argument(
        "--minutes",
        type=typed(parse_minutes),
        metavar="M",
        help="training time of every run, with its validations; the speed is measured first",
    )
    parser.add_argument(
        "--seeds",
        type=typed(parse_seeds),
        default=1,
        metavar="N",
        help="how many seeds, from the recipe's own on (1); or which, as in 0,1,7",
    )
    parser.add_argument(
        "--tasks", type=typed(parse_count), metavar="N", help="evaluation tasks of every recipe"
    )
    parser.add_argument(
        "--jobs", type=typed(parse_count), default=1, metavar="J", help="runs side by side (1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparisons"), help="folder of comparisons (comparisons)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def to_request(args: argparse.Namespace, argv: Sequence[str]) -> Request:
    """The request that parsed arguments make."""
    values = {field.name: getattr(args, field.name, None) for field in fields(Request)}
    lists = {"names": args.names, "overrides": args.set, "allow": args.allow, "argv": argv}
    return Request(**values | {name: tuple(words) for name, words in lists.items()})


def typed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """A parser whose `ValueError` argparse shows with its message."""

    def typed(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed
