"""The command `metablocks`: arguments in, one call of the library, an exit status out.

0: fine. 1: a run failed, or a gradient is wrong. 2: the input is wrong (arguments, recipe, data
folder). 130: interrupted.
"""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from metablocks.errors import DataError, MetablocksError, RecipeError, suggest
from metablocks.report import arguments as comparison
from metablocks.report.arguments import typed
from metablocks.report.request import parse_count

_RECIPE = "a shipped recipe's name (see: metablocks recipes) or the path of a YAML file"
_EXAMPLES = {
    "run": "metablocks run maml_sinusoid\n"
    "metablocks run mine.yaml --set inner.steps=3 --set outer.optimizer.lr=5e-4\n"
    "metablocks run --resume runs/maml_sinusoid-20250101-120000",
    "check": "metablocks check maml_omniglot_5w1s\n"
    "metablocks check mine.yaml --set inner.rule[0].init=0.1 --allow my_pkg\n"
    "metablocks check maml_pp_omniglot_5w1s --gradients",
    "show": "metablocks show maml_sinusoid --set inner.order.block=first_order",
    "blocks": "metablocks blocks\nmetablocks blocks rule",
    "recipes": "metablocks recipes",
    "eval": "metablocks eval runs/maml_sinusoid-20250101-120000 --steps 10 --tasks 1000",
    "compare": comparison.EXAMPLES,
    "verify": "metablocks verify my_pkg.my_module:MyRule --set rate=0.1\n"
    "metablocks verify kfo --set hidden=1 --set activation=tanh --thorough\n"
    "metablocks verify vmap --device cuda",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own); returns its exit status.

    >>> main(["check", "no_such_recipe"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_any_character()
    with _log_to_stderr():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    try:
        try:
            args = _parse(arguments)
        except SystemExit as stop:  # argparse has said why
            return stop.code if isinstance(stop.code, int) else 2
        status = _COMMANDS[args.command](args, arguments)
        sys.stdout.flush()
        return status
    except (RecipeError, DataError) as error:
        return _fail(error, 2)
    except MetablocksError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader (head, less) has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """What the package tells of its work (compiling, choices), line by line."""
    log = logging.getLogger("metablocks")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks import run
    from metablocks.recipe import load

    if args.recipe is None and args.resume is None:
        raise RecipeError("metablocks run: no recipe; give one, or --resume RUN_DIR")
    _make_importable(args.allow)
    if args.memory:
        args.set.append(
            f'hardware.executor={{block: auto, memory: "{args.memory}", compile: false}}'
        )
    recipe = load(args.recipe or _recipe_of(args.resume), args.set, args.allow)
    _print_notes(recipe.notes)
    return run.train_recipe(
        recipe,
        out=args.out,
        data=args.data,
        device=args.device,
        resume=args.resume,
        quiet=args.quiet,
        argv=argv,
    )


def _check(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe import build, load
    from metablocks.recipe.listing import summary

    _make_importable(args.allow)
    recipe = load(args.recipe, args.set, args.allow)
    _print_notes(recipe.notes)
    print(summary(build(recipe)))
    if not args.gradients:
        return 0
    from metablocks.prove import check_gradients

    report = check_gradients(recipe)
    print(f"\n{report.text()}")
    return 0 if report.ok else 1


def _show(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe import load

    _make_importable(args.allow)
    recipe = load(args.recipe, args.set, args.allow)
    _print_notes(recipe.notes)
    print(recipe.to_yaml(origins=True), end="")
    return 0


def _blocks(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe.listing import blocks_text
    from metablocks.recipe.slots import SLOTS

    if args.slot is not None and args.slot not in SLOTS:
        hint = suggest(args.slot, SLOTS) or "; there are: " + ", ".join(SLOTS)
        raise RecipeError(f'no slot is called "{args.slot}"{hint}')
    print(blocks_text([SLOTS[args.slot]] if args.slot else SLOTS.values()))
    return 0


def _recipes(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe import shipped
    from metablocks.recipe.listing import shipped_text

    print(shipped_text(shipped()))
    return 0


def _eval(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks import run

    _recipe_of(args.run_dir)
    _make_importable(run.allowed_packages(args.run_dir))
    return run.evaluate_run(
        args.run_dir,
        checkpoint=args.checkpoint,
        tasks=args.tasks,
        steps=args.steps,
        split=args.split,
        data=args.data,
        device=args.device,
    )


def _compare(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.report.compare import compare

    _make_importable(args.allow)
    return compare(comparison.to_request(args, argv))


def _verify(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.prove import blocks
    from metablocks.prove.subjects import named

    _make_importable([args.block])
    try:
        given = named(args.block, args.set, args.protocol)
    except MetablocksError as error:
        return _fail(error, 2)
    count = args.examples or (blocks.THOROUGH if args.thorough else blocks.EXAMPLES)
    waiting = sys.stderr.isatty()

    def tell(law: str) -> None:
        print(f"\r\x1b[K{law} …", end="", file=sys.stderr, flush=True)

    try:
        report = blocks.verify(
            given, device=args.device or "cpu", examples=count, progress=tell if waiting else None
        )
    finally:
        print("\r\x1b[K" * waiting, end="", file=sys.stderr)
    print(report)
    return 0 if report.ok else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "run": _run,
    "check": _check,
    "show": _show,
    "blocks": _blocks,
    "recipes": _recipes,
    "eval": _eval,
    "compare": _compare,
    "verify": _verify,
}


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints about a mistyped word also say what was meant."""

    def error(self, message: str) -> NoReturn:
        given = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if given:
            message += suggest(given[1], re.findall(r"[\w-]+", given[2]))
        super().error(message)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    args, extra = parser.parse_known_args(argv)
    chosen = commands.get(args.command, parser)
    if extra:
        word = next((word for word in extra if word.startswith("-")), extra[0])
        options = [option for action in chosen._actions for option in action.option_strings]
        chosen.error(f"unknown argument {word}{suggest(word.partition('=')[0], options)}")
    if args.command is None:
        parser.error(f"a command is missing; it is one of {', '.join(commands)}")
    return args


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    from metablocks import __version__

    parser = _Parser(
        prog="metablocks",
        description="Gradient-based meta-learning from recipes.",
        epilog="metablocks COMMAND --help says more, with examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metablocks {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, _Parser] = {}

    def command(name: str, about: str, more: str = "") -> _Parser:
        examples = "".join(f"  {line}\n" for line in _EXAMPLES[name].splitlines())
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
    run.add_argument("--out", type=Path, default=Path("runs"), help="folder of runs (runs)")
    run.add_argument(
        "--memory",
        metavar="SIZE",
        help="budget such as 4GiB: measure, and take the fastest executor that keeps to it",
    )
    run.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a stopped run")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    check = command("check", "build a recipe without training, and say what it would train")
    _add_recipe(check)
    check.add_argument(
        "--gradients",
        action="store_true",
        help="measure, on a small counterpart, whether the gradient of every meta-parameter is right",
    )
    _add_recipe(command("show", "print the resolved recipe, with the origin of each value"))
    blocks = command("blocks", "list the blocks of every slot: fields, defaults, equation, source")
    blocks.add_argument("slot", nargs="?", metavar="SLOT", help="one slot only, such as rule")
    command("recipes", "list the recipes that ship")
    steps = typed(partial(parse_count, least=0))
    evaluate = command("eval", "evaluate a run's checkpoint on new tasks")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run")
    evaluate.add_argument("--checkpoint", choices=("best", "last", "ensemble"), default="best")
    evaluate.add_argument("--tasks", type=typed(parse_count), metavar="N", help="how many tasks")
    evaluate.add_argument("--steps", type=steps, metavar="K", help="inner steps")
    evaluate.add_argument("--split", choices=("train", "validation", "test"), default="test")
    _add_place(evaluate)
    compare = command("compare", comparison.ABOUT, comparison.MORE)
    comparison.add_arguments(compare)
    _add_overrides(compare)
    _add_place(compare)
    verify = command("verify", "hold a block to the laws of its protocol", _ON_VERIFY)
    verify.add_argument("block", metavar="BLOCK", help="my_pkg.my_module:MyRule, or a short name")
    verify.add_argument("--as", dest="protocol", metavar="PROTOCOL", help="where it cannot be told")
    verify.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field; repeatable"
    )
    verify.add_argument("--device", type=_device, metavar="D", help="cpu, cuda, cuda:1, …")
    verify.add_argument("--thorough", action="store_true", help="200 problems a law, and not 15")
    verify.add_argument("--examples", type=typed(parse_count), metavar="N", help="problems a law")
    return parser, commands


_ON_VERIFY = """ Problems are drawn: small smooth nets in
float64, tasks, and other blocks of every axis; what breaks a law is shrunk to the smallest case.
The block's code is run. Protocols: rule, order, step_loss, estimator, executor, norm (surgery
(model, steps) -> model, or a module that takes the number of channels)"""


def _add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("recipe", nargs="?" if optional else None, metavar="RECIPE", help=_RECIPE)
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field, such as inner.steps=3; repeatable, left to right",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the recipe use blocks of this package (this runs its code); repeatable",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=_folder, metavar="FOLDER", help="where the data sets are")
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, …, in place of the recipe's"
    )


def _device(text: str) -> str:
    import torch

    try:
        torch.zeros(1, device=torch.device(text))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {reason}") from None
    return text


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return Path(text)


def _recipe_of(run_dir: Path) -> Path:
    recipe = run_dir / "recipe.yaml"
    if not recipe.is_file():
        what = (
            "has no recipe.yaml; it is not the folder of a run"
            if run_dir.is_dir()
            else (
                "no such folder; give one that metablocks run has written, such as runs/<name>-<time>"
            )
        )
        raise RecipeError(f"{run_dir}: {what}")
    return recipe


def _make_importable(allow: list[str]) -> None:
    """Packages that the user allowed may lie in the working directory, as for `python -m`."""
    if allow and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _print_any_character() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _fail(reason: object, status: int) -> int:
    sys.stdout.flush()
    print(reason, file=sys.stderr)
    return status
