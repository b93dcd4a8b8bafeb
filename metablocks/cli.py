"""The command `metablocks`: arguments in, one call of the library, an exit status out.

0: fine. 1: a run failed, or a gradient is wrong. 2: the input is wrong (arguments, recipe, data
folder). 130: interrupted.
"""

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metablocks.arguments import parse
from metablocks.errors import (
    DataError,
    MetablocksError,
    RecipeError,
    command,
    first_line,
    one_line,
    suggest,
)
from metablocks.memory import out_of_memory
from metablocks.processes import joined, launched, leads

if TYPE_CHECKING:
    from metablocks.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own); returns its exit status.

    >>> main(["check", "no_such_recipe"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_any_character()
    follows = not leads()  # of several processes, one prints; an error, the one that has it
    output = _PastReader(None if follows else sys.stdout)
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(_PastReader(None if follows else sys.stderr)),
        _log_to_stderr(),
    ):
        status = _main(arguments)
        if output.lost:
            return status or _fail(f"the output was not written: {output.lost}", 1)
        return status


def _main(arguments: list[str]) -> int:
    try:
        try:
            args = parse(arguments)
        except SystemExit as stop:  # argparse has said why
            return stop.code if isinstance(stop.code, int) else 2
        with joined():
            name = vars(args).pop("command")
            if launched() and name not in _OVER_PROCESSES:
                raise RecipeError(
                    f"metablocks {name} works in one process: start it without torchrun, "
                    f"which is for {' and '.join(_OVER_PROCESSES)}"
                )
            status = _COMMANDS[name](args, arguments)
        sys.stdout.flush()
        return status
    except (RecipeError, DataError) as error:
        return _fail(error, 2)
    except MetablocksError as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(
            f"out of memory ({first_line(error)}); fewer outer.tasks_per_step or a smaller model need "
            f"less, and {command('run')} --memory SIZE takes an executor that keeps to a budget",
            1,
        )
    except KeyboardInterrupt as stop:
        return 130 if getattr(stop, "reported", False) else _fail("interrupted", 130)


class _PastReader:
    """A stream that falls silent once its reader (head, less, a terminal) has gone.

    So it does if it was closed from the start, and where its file cannot be written (a full disk), which
    is in `lost` then. The command goes on: a training is not to end because nobody reads its lines.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.lost: str | None = None

    def write(self, text: str) -> int:
        with self._silent():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent():
            self._stream.flush()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Printable(logging.Formatter):
    """The message alone, without what garbles a terminal: files of others may have put it there."""

    def format(self, record: logging.LogRecord) -> str:
        return _printable(record.getMessage())


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Log messages of the package go to stderr."""
    log = logging.getLogger("metablocks")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks import runs

    if args.recipe is None and args.resume is None:
        raise RecipeError("metablocks run: no recipe; give one, or --resume RUN_DIR")
    for run_dir in filter(None, (args.start, args.resume)):
        _check_run(run_dir)
    if args.start and args.resume:
        raise RecipeError("metablocks run: --from is for a new run, --resume for one that is there")
    if args.memory:
        args.overrides.append(
            f'hardware.executor={{block: auto, memory: "{args.memory}", compile: false}}'
        )
    recipe = _load(args)
    return runs.train_recipe(
        recipe,
        out=args.out,
        data=args.data,
        device=args.device,
        resume=args.resume,
        start=args.start,
        save_every=args.save_every,
        tensorboard=args.tensorboard,
        quiet=args.quiet,
        argv=argv,
    )


def _check(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe import build
    from metablocks.recipe.listing import summary
    from metablocks.runs.trial import try_out

    recipe = _load(args)
    experiment = build(recipe, device=args.device, data=args.data)
    tried = try_out(recipe, device=args.device, data=args.data)
    print(f"{summary(experiment)}\n  {'tried':<11}{tried}")
    if not args.gradients:
        return 0
    from metablocks.gradcheck import check_gradients

    report = check_gradients(recipe, device=args.device)
    print(f"\n{report.text()}")
    return 0 if report.ok else 1


def _show(args: argparse.Namespace, argv: list[str]) -> int:
    if args.algorithms == (args.recipe is not None) or (args.algorithms and args.overrides):
        raise RecipeError("show takes a recipe or --algorithms: metablocks show maml_sinusoid")
    if args.algorithms:
        from metablocks.recipe.algorithms import algorithms_text

        print(algorithms_text())
        return 0
    print(_load(args).to_yaml(origins=True), end="")
    return 0


def _blocks(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe.layout import SECTIONS
    from metablocks.recipe.listing import blocks_text
    from metablocks.recipe.slots import SLOTS

    names = [*SLOTS, *SECTIONS]
    if args.slot is not None and args.slot not in names:
        owners = [name for name, slot in SLOTS.items() if args.slot in slot.blocks]
        of = f"; it is a block of {' and '.join(owners)}" * bool(owners)
        hint = of or suggest(args.slot, names) or "; there are: " + ", ".join(names)
        raise RecipeError(f'no slot is called "{args.slot}"{hint}')
    print(blocks_text([args.slot]) if args.slot else blocks_text())
    return 0


def _new(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe.template import template

    print(template(), end="")
    return 0


def _recipes(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe import shipped
    from metablocks.recipe.listing import shipped_text

    print(shipped_text(shipped()))
    return 0


def _schema(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.recipe.listing import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0


def _eval(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks import runs

    _check_run(args.run_dir)
    _make_importable(args.allow)
    return runs.evaluate_run(**vars(args))


def _replay(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.runs.replay import replay

    _check_run(args.run_dir)
    _make_importable(args.allow)
    replayed = replay(**vars(args))
    print(replayed.text)
    return 0 if replayed.finite else 1


def _compare(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.compare.commands import compare
    from metablocks.compare.request import Request

    _make_importable(args.allow)
    return compare(Request(**vars(args), argv=argv))


def _report(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.report.commands import report

    for run_dir in args.run_dirs:
        _check_run(run_dir)
    return report(args.run_dirs, args.out)


def _verify(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks import verify
    from metablocks.laws.check import EXAMPLES

    _make_importable([args.block])
    try:
        block = verify.named_block(args.block, args.set, args.protocol)
    except MetablocksError as error:
        return _fail(error, 2)
    count = args.examples or (verify.THOROUGH if args.thorough else EXAMPLES)
    terminal = sys.stderr.isatty()

    def show(text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    progress = (lambda law: show(f"{law} …")) if terminal else None
    try:
        report = verify.verify(block, device=args.device, examples=count, progress=progress)
    finally:
        if terminal:
            show("")
    print(report)
    return 0 if report.ok else 1


def _laws(args: argparse.Namespace, argv: list[str]) -> int:
    from metablocks.laws import numbered

    print(numbered.text())
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "run": _run,
    "check": _check,
    "show": _show,
    "blocks": _blocks,
    "new": _new,
    "recipes": _recipes,
    "schema": _schema,
    "eval": _eval,
    "replay": _replay,
    "compare": _compare,
    "report": _report,
    "verify": _verify,
    "laws": _laws,
}


_OVER_PROCESSES = ("run", "eval")


def _load(args: argparse.Namespace) -> "Recipe":
    """Load the recipe that the arguments name, or else that of the run, and print its notes."""
    from metablocks.recipe import load
    from metablocks.runs.loading import load_recipe

    _make_importable(args.allow)
    if args.recipe is None:
        recipe = load_recipe(args.resume, args.overrides, args.allow)
    else:
        recipe = load(args.recipe, args.overrides, args.allow)
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    return recipe


def _check_run(run_dir: Path) -> None:
    from metablocks.runs.loading import check_run

    check_run(run_dir)


def _make_importable(allow: list[str]) -> None:
    """Let allowed packages lie in the working directory, as for `python -m`."""
    if allow and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _print_any_character() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(reason: object, status: int) -> int:
    sys.stdout.flush()
    if not getattr(reason, "reported", False):
        print(_printable(str(reason)), file=sys.stderr if leads() else sys.__stderr__)
    return status


def _printable(text: str) -> str:
    return "\n".join(map(one_line, text.split("\n")))
