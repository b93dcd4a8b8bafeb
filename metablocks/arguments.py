"""Parsers of the subcommands of `metablocks`, with their help and examples."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from metablocks.devices import find_device
from metablocks.errors import command as command_line
from metablocks.errors import suggest
from metablocks.memory import parse_bytes

_T = TypeVar("_T")
_RECIPE = "a shipped recipe's name ({} lists them) or the path of a YAML file"
_EXAMPLES = {
    "run": "metablocks run maml_sinusoid\n"
    "metablocks run mine.yaml --set inner.steps=3 --set outer.optimizer.lr=5e-4\n"
    "metablocks run --resume runs/maml_sinusoid-20250101-120000\n"
    "metablocks run --resume runs/maml_sinusoid-20250101-120000 --set outer.epochs=90\n"
    "metablocks run mine.yaml --from runs/maml_sinusoid-20250101-120000\n"
    "torchrun --nproc-per-node 4 -m metablocks run mine.yaml    # its tasks over 4 processes",
    "check": "metablocks check maml_omniglot_5w1s\n"
    "metablocks check mine.yaml --set inner.rule[0].init=0.1 --allow my_pkg\n"
    "metablocks check maml_pp_omniglot_5w1s --gradients",
    "show": "metablocks show maml_sinusoid --set inner.order.block=first_order\n"
    "metablocks show --algorithms",
    "blocks": "metablocks blocks\nmetablocks blocks rule\nmetablocks blocks evaluation",
    "new": "metablocks new > mine.yaml\nmetablocks check mine.yaml",
    "recipes": "metablocks recipes",
    "schema": "metablocks schema > recipe.schema.json",
    "eval": "metablocks eval runs/maml_sinusoid-20250101-120000 --steps 10 --tasks 1000",
    "replay": "metablocks replay runs/maml_sinusoid-20250101-120000 --step 1234",
    "compare": "metablocks compare maml_sinusoid fomaml_sinusoid --steps 2400\n"
    "metablocks compare maml_omniglot_5w1s mine.yaml --minutes 10 --seeds 3\n"
    "metablocks compare maml_omniglot_5w1s mine.yaml --seeds 20 --plan > commands.txt\n"
    "metablocks compare runs/maml_sinusoid-20250101-120000 runs/fomaml_sinusoid-20250101-130000",
    "report": "metablocks report runs/maml_sinusoid-20250101-120000\n"
    "metablocks report runs/maml_pp_omniglot_5w1s-*",
    "verify": "metablocks verify my_pkg.my_module:MyRule --set rate=0.1\n"
    "metablocks verify kfo --set hidden=1 --set activation=tanh --thorough\n"
    "metablocks verify vmap --device cuda",
    "laws": "metablocks laws",
}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors suggest the word that was meant."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            message += suggest(match[1], re.findall(r"[\w-]+", match[2]))
        super().error(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one subcommand. Raises `SystemExit` once argparse has printed the reason.

    >>> parse(["check", "quickstart", "--set", "seed=3"]).overrides
    ['seed=3']
    """
    parser, commands = parsers()
    args, extra = parser.parse_known_args(argv)
    chosen = commands.get(args.command, parser)
    if extra:
        word = next((word for word in extra if word.startswith("-")), extra[0])
        options = {option: action for action in chosen._actions for option in action.option_strings}
        near = suggest(word.partition("=")[0], options)
        if not near and word.startswith("-") and "--set" in options:
            near = f"; a field is set by --set {options['--set'].metavar}"
        chosen.error(f"unknown argument {word}{near}")
    if args.command is None:
        parser.error(f"a command is missing; it is one of {', '.join(commands)}")
    return args


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and of every subcommand by its name."""
    from metablocks import __version__

    typed = command_line()
    parser = _Parser(
        prog="metablocks",
        description="Gradient-based meta-learning from recipes.",
        epilog=f"{typed} COMMAND --help says more, with examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metablocks {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, about: str, more: str = "") -> argparse.ArgumentParser:
        lines = re.sub(
            "^metablocks", lambda _: typed, _EXAMPLES[name], flags=re.MULTILINE
        ).splitlines()
        examples = "".join(f"  {line}\n" for line in lines)
        commands[name] = sub.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.{more}",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return commands[name]

    run = command("run", "train what a recipe states")
    _add_recipe(run, optional=True)
    _add_place(run)
    _add_out(run, "runs")
    run.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="budget such as 4GiB: measure, and take the fastest executor that keeps to it",
    )
    run.add_argument(
        "--resume",
        type=_path,
        metavar="RUN_DIR",
        help="go on with a run: stopped, or finished and given more outer.epochs",
    )
    run.add_argument(
        "--from",
        dest="start",
        type=_path,
        metavar="RUN_DIR",
        help="begin with the weights of this run's best epoch",
    )
    every = "checkpoint within an epoch, too, after so many minutes (10)"
    run.add_argument("--save-every", type=parse_minutes, default=10.0, metavar="M", help=every)
    board = "write the curves for TensorBoard, too, into RUN_DIR/tensorboard"
    run.add_argument("--tensorboard", action="store_true", help=board)
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    check = command(
        "check",
        "build a recipe, take one meta-step and one evaluation, and say what it would train",
    )
    _add_recipe(check)
    _add_place(check)
    check.add_argument(
        "--gradients",
        action="store_true",
        help="measure, on a small counterpart, whether the gradient of every meta-parameter is right",
    )

    show = command("show", "print the resolved recipe, with the origin of each value")
    _add_recipe(show, optional=True)
    table = "print the table of the algorithms that ship, and what each chooses, instead"
    show.add_argument("--algorithms", action="store_true", help=table)
    about = "list the blocks of every slot, and the fields beside them: what each means, and takes"
    blocks = command("blocks", about)
    one = "one slot or section only, such as rule, or evaluation"
    blocks.add_argument("slot", nargs="?", metavar="SLOT", help=one)
    command("new", "print a recipe to begin with, each field with what it means")
    command("recipes", "list the recipes that ship")
    command("schema", "print the JSON schema of recipes, by which editors check and complete them")

    steps = partial(parse_count, least=0)
    evaluate = command("eval", "evaluate a run's checkpoint, on its own test tasks or others")
    which = "the best by validation, the last, or several of the best together (best)"
    evaluate.add_argument(
        "--checkpoint", choices=("best", "last", "ensemble"), default="best", help=which
    )
    evaluate.add_argument("--tasks", type=parse_count, metavar="N", help="how many tasks")
    evaluate.add_argument("--steps", type=steps, metavar="K", help="inner steps")
    splits = ("train", "validation", "test")
    evaluate.add_argument("--split", choices=splits, default="test", help="whose tasks (test)")
    seed = "of the tasks: another than the run's own takes other tasks"
    evaluate.add_argument("--seed", type=partial(steps, most=2**32 - 1), metavar="S", help=seed)
    _add_run(evaluate)

    about = "repeat one meta-step of a run in float64: what is not finite, and which code makes it"
    replay = command("replay", about)
    replay.add_argument(
        "--step", type=parse_count, required=True, metavar="S", help="the meta-step, from 1"
    )
    _add_run(replay)

    about = "train recipes under one budget, or read finished runs, and say which to use"
    compare = command("compare", about, _ON_COMPARE.format(command_line("show")))
    compare.add_argument(
        "names",
        nargs="+",
        type=_name,
        metavar="RECIPE|RUN_DIR",
        help="a recipe to train, or a finished run",
    )
    budget = compare.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=parse_count, metavar="N", help="meta-steps of every run")
    minutes = "training time of every run, with its validations; the speed is measured first"
    budget.add_argument("--minutes", type=parse_minutes, metavar="M", help=minutes)
    seeds = "how many seeds, from the recipe's own on (1); or which, as in 0,1,7"
    compare.add_argument("--seeds", type=parse_seeds, default=1, metavar="N", help=seeds)
    tasks = "evaluation tasks of every recipe"
    compare.add_argument("--tasks", type=parse_count, metavar="N", help=tasks)
    compare.add_argument(
        "--jobs", type=parse_count, default=1, metavar="J", help="runs side by side (1)"
    )
    _add_out(compare, "comparisons")
    plan = "print a command for each training, as for a scheduler's job array, and train none"
    compare.add_argument("--plan", action="store_true", help=plan)
    compare.add_argument("--quiet", action="store_true", help="no progress, only the result")
    _add_overrides(compare)
    _add_place(compare)

    report = command("report", "make one page of finished runs, and pictures", _ON_REPORT)
    report.add_argument(
        "run_dirs", nargs="+", type=_path, metavar="RUN_DIR", help="the folder of a finished run"
    )
    _add_out(report, "reports")

    verify = command("verify", "hold a block to the laws of its protocol", _ON_VERIFY)
    verify.add_argument("block", metavar="BLOCK", help="my_pkg.my_module:MyRule, or a short name")
    verify.add_argument(
        "--as", dest="protocol", metavar="PROTOCOL", help="if it is not clear from BLOCK"
    )
    verify.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field; repeatable"
    )
    verify.add_argument(
        "--device",
        type=_typed(find_device),
        default="cpu",
        metavar="D",
        help="auto, cpu, cuda, cuda:1, … (cpu)",
    )
    verify.add_argument("--thorough", action="store_true", help="200 problems a law in place of 15")
    verify.add_argument("--examples", type=parse_count, metavar="N", help="problems a law")
    command("laws", "list the numbered laws that reports and docstrings refer to")
    return parser, commands


_ON_VERIFY = """ Problems are drawn: small smooth nets in
float64, tasks, and other blocks of every axis; what breaks a law is shrunk to the smallest case.
The block's code is run. Protocols: start, batches, rule, order, step_loss, estimator, executor, norm
(surgery (model, steps) -> model, or a module that takes the number of channels), tasks (a task source)"""


_ON_COMPARE = """

Recipes are trained, each run in a process of its own, on the same tasks with the same seeds; folders
of finished runs are read. Runs that differ in the seed alone are one row. The result is a table, a
picture, and a recommendation with the rule that it follows from, in a folder below --out. A variant
of a recipe is a file of its own: {} NAME --set PATH=VALUE > variant.yaml"""


_ON_REPORT = """ The page opens from disk and loads
nothing: curves, every test task step by step, learned rates with an epoch slider, step-loss weights,
spectra, learned losses, example tasks, time and memory, the resolved recipe, and of several runs the
table of compare.
The runs are read, and none of their code is run."""


def parse_seeds(text: str) -> int | tuple[int, ...]:
    """`3`: three seeds, from the recipe's own on. `0,7` or `7,`: these.

    >>> parse_seeds("3"), parse_seeds("0,7"), parse_seeds("7,")
    (3, (0, 7), (7,))

    Raises `argparse.ArgumentTypeError`, as the other parsers do.
    """
    words = text.removesuffix(",").split(",")
    numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,10}", word.strip())]
    several = "," in text
    if len(numbers) == len(words) == len(set(numbers)) and (several or numbers[0] > 0):
        return tuple(numbers) if several else numbers[0]
    message = f"takes how many seeds, or different ones as in 0,1,7; given {text}"
    raise argparse.ArgumentTypeError(message)


def parse_count(text: str, least: int = 1, most: int = 10**18) -> int:
    """An integer from `least` to `most`."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        limit = f" to {most}" if most < 10**18 else " or more"
        message = f"takes a whole number, {least}{limit}, given {text}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def parse_minutes(text: str) -> float:
    """A number above 0.

    >>> parse_minutes("2"), parse_minutes("0.5")
    (2.0, 0.5)
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        message = f"takes minutes, a number above 0, given {text}"
        raise argparse.ArgumentTypeError(message)
    return float(text)


def _add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    about = _RECIPE.format(command_line("recipes").replace("%", "%%"))
    parser.add_argument("recipe", nargs="?" if optional else None, metavar="RECIPE", help=about)
    _add_overrides(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=_path, metavar="RUN_DIR", help="the folder of a run")
    _add_allow(parser)
    _add_place(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field, such as inner.steps=3; repeatable, left to right",
    )
    _add_allow(parser)


def _add_allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the recipe use blocks of this package (this runs its code); repeatable",
    )


def _add_out(parser: argparse.ArgumentParser, name: str) -> None:
    about = f"folder of {name} ({name})"
    parser.add_argument("--out", type=_path, default=Path(name), help=about)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=_folder, metavar="FOLDER", help="folder of the data sets")
    parser.add_argument(
        "--device", metavar="D", help="auto, cpu, cuda, cuda:1, …, in place of the recipe's"
    )


def _typed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """A parser whose `ValueError` argparse shows with its message."""

    def typed(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def _size(text: str) -> str:
    _typed(parse_bytes)(text)
    return text


def _path(text: str) -> Path:
    """A path, its leading ~ being the home folder where the shell has left it (--out=~/runs).

    One that begins with a dash is made absolute: in a command that is printed it would be an option.
    """
    path = Path(os.path.expanduser(text))
    return path.absolute() if str(path).startswith("-") else path


def _name(text: str) -> str:
    """A recipe's name or a path, which is made absolute where `_path` does that."""
    return str(_path(text)) if str(Path(text)).startswith("-") else text


def _folder(text: str) -> Path:
    if not _path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return _path(text)
