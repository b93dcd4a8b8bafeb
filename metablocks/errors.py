"""The errors of metablocks: what was given, where, and what would work.

Every error that metablocks raises on purpose is a `MetablocksError`. Each class also derives from
the built-in error a caller would expect, so `except ValueError` goes on working.
"""

import difflib
import dis
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self


class MetablocksError(Exception):
    """Base class of every error raised on purpose by metablocks.

    `block` and `field` name the argument at fault, so that nobody needs to read them out of the message:
    the class or function that was given the value, and its parameter. For blocks that do not go together
    `block` is "MetaLearner" and `field` its argument or a part of it, as attributes and parameters are
    named: "adapt", "order.last", "rule.rules.1.rate.*". Both are None if no argument is known to be at
    fault.

    >>> import metablocks as mb
    >>> try:
    ...     mb.LearningRate(float("nan"))
    ... except mb.MetablocksError as error:
    ...     print(error.block, error.field)
    LearningRate init
    """

    def __init__(self, *args: object, block: str | None = None, field: str | None = None) -> None:
        super().__init__(*args)
        self.block = block
        self.field = field
        self.reported = False
        """True if another process of those that work together has failed before, and says why."""

    @classmethod
    def about(cls, block: str, field: str, words: str) -> Self:
        """The error of a value that an argument was given: `block` and `field` begin its message.

        >>> BlockError.about("MLP", "hidden", "is empty")
        BlockError('MLP hidden is empty')
        """
        return cls(f"{block} {field} {words}", block=block, field=field)


@contextmanager
def concerning(block: str | None, field: str) -> Iterator[None]:
    """Name the argument that errors raised inside are about, unless they name one themselves.

    >>> with concerning("MetaLearner", "adapt"):
    ...     raise SelectionError("patterns leave no parameter selected")
    Traceback (most recent call last):
    metablocks.errors.SelectionError: patterns leave no parameter selected
    """
    try:
        yield
    except MetablocksError as error:
        if error.field is None:
            error.block, error.field = block, field
        raise


class ModuleError(MetablocksError, ValueError):
    """A module cannot be used functionally, or tensors do not fit it."""


class SelectionError(MetablocksError, ValueError):
    """A name pattern selects nothing, or splits a tied parameter."""


class RuleError(MetablocksError, ValueError):
    """An update rule is not set up, does not fit, or returned updates that do not fit."""


class BlockError(MetablocksError, ValueError):
    """A block was given a value outside its range, or a combination of blocks makes no sense."""


class ArgumentError(MetablocksError, TypeError):
    """A block was called with a parameter that it does not have, or without one that it needs."""


class AnswerError(BlockError):
    """A block returned what its protocol does not know."""


class GradientError(MetablocksError, RuntimeError):
    """A declared meta-parameter gets no gradient, or the loss is not a scalar."""


class ExecutorError(MetablocksError, RuntimeError):
    """An executor cannot run the model or the tasks it was given."""


class ProcessError(MetablocksError, RuntimeError):
    """Another process of those that work together has ended, or does not answer."""


class TaskError(MetablocksError, ValueError):
    """Tasks are malformed, or a task source cannot supply what it was asked for."""


class DataError(MetablocksError, OSError):
    """A data set is absent, incomplete or unreadable."""


class RecipeError(MetablocksError, ValueError):
    """A recipe is wrong; the message lists every error of the file with line and column."""


class LawError(MetablocksError, AssertionError):
    """A block breaks a law of its protocol."""


class MissingError(MetablocksError, ImportError):
    """A package that only some parts of metablocks need is not installed."""


class RunError(MetablocksError, RuntimeError):
    """A run directory or checkpoint cannot be written, read or resumed."""


class NonfiniteError(RunError):
    """A loss or meta-gradient is not finite. `step` is the meta-step, counted from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class DamagedError(RunError):
    """A checkpoint is absent, or not the whole file that was written."""


def suggest(given: str, candidates: Iterable[str]) -> str:
    """A `; did you mean "…"?` clause for the nearest candidate, or nothing.

    >>> suggest("leanr", ["learn", "init"])
    '; did you mean "learn"?'
    >>> suggest("xyzzy", ["learn", "init"])
    ''
    """
    near = difflib.get_close_matches(given, list(candidates), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def suggest_then(given: str, candidates: Iterable[str], then: str) -> str:
    """The same, and after it a sentence that says what there is; or that alone, as a clause.

    >>> suggest_then("leanr", ["learn", "init"], "it takes: learn, init")
    '; did you mean "learn"? It takes: learn, init'
    >>> suggest_then("xyzzy", ["learn", "init"], "it takes: learn, init")
    '; it takes: learn, init'
    """
    near = suggest(given, candidates)
    return f"{near} {then[0].upper()}{then[1:]}" if near else f"; {then}"


def command(*words: object) -> str:
    """A command line to try: `metablocks` as it was typed (`tools/metablocks` says how), and the words.

    >>> command("run", "--resume", "runs/my run")
    "metablocks run --resume 'runs/my run'"
    """
    typed = os.environ.get("METABLOCKS_COMMAND") or "metablocks"
    return " ".join(quoted(word) for word in (typed, *words))


def quoted(word: object) -> str:
    r"""A word of a command line, for a shell, in one line of text that can be printed.

    What cannot be printed is written as $'…', which bash, zsh, ksh and the POSIX of 2024 read.

    >>> print(quoted("my run"), quoted("two\nlines"))
    'my run' $'two\012lines'
    """
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    data = text.encode("utf-8", "surrogateescape")
    letters = [chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\{b:03o}" for b in data]
    return f"$'{''.join(letters)}'"


def one_line(text: str) -> str:
    r"""Text without what breaks a line or garbles a terminal: such characters are escaped.

    >>> print(one_line("é\n\x07\u2028"))
    é\n\u0007\u2028
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def caller_stacklevel() -> int:
    """The `stacklevel` by which a warning names the line outside this package that led to it.

    >>> caller_stacklevel()
    1
    """
    package, level = os.path.dirname(__file__), 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def is_stated(error: BaseException) -> bool:
    """True if a `raise` of code outside of PyTorch has raised an error, and not PyTorch or Python.

    >>> try:
    ...     raise ValueError("no such size")
    ... except ValueError as error:
    ...     is_stated(error)
    True
    >>> try:
    ...     int("one")
    ... except ValueError as error:
    ...     is_stated(error)
    False
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    statement = dis.opname[frame.f_code.co_code[trace.tb_lasti]]
    place = str(frame.f_globals.get("__name__"))
    return statement == "RAISE_VARARGS" and place.partition(".")[0] != "torch"


def first_line(error: Exception) -> str:
    """First line of an error's message (torch appends a trace of its C++ code).

    `torch.load` advises to trust a file that holds more than tensors; that advice is left out.

    >>> first_line(RuntimeError("no memory\\nframe #0: …")), first_line(KeyError())
    ('no memory', 'KeyError')
    """
    lines = str(error).splitlines()
    if lines and lines[0].startswith("Weights only load failed"):
        return "it holds more than tensors, and no code of a file is run"
    return lines[0] if lines else type(error).__name__
