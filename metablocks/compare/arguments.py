"""The arguments of the command `compare`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from metablocks.compare.request import Request, parse_count, parse_minutes, parse_seeds

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes besides the overrides, the place and the packages that `run` takes too."""
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
    """What the parsed arguments ask for."""
    return Request(
        names=tuple(args.names),
        overrides=tuple(args.set),
        allow=tuple(args.allow),
        seeds=args.seeds,
        steps=args.steps,
        minutes=args.minutes,
        tasks=args.tasks,
        jobs=args.jobs,
        out=args.out,
        data=args.data,
        device=args.device,
        quiet=args.quiet,
        argv=tuple(argv),
    )


def typed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """A parser whose `ValueError` argparse shows with its message."""

    def typed(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed
