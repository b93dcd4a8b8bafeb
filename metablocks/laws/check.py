"""Run the laws of a protocol on a block, each on many small problems that hypothesis draws.

    @parametrize_with_laws([MyRule, lambda: MyRule(rate=0.3)])
    def test_my_rule(law):
        law()

gives one test for each law of each block, as scikit-learn's `parametrize_with_checks` does. A law
that fails is shrunk to the smallest case, for at most `SHRINK_SECONDS`.
"""

import contextlib
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metablocks.errors import (
    AnswerError,
    BlockError,
    DataError,
    LawError,
    MetablocksError,
    first_line,
)
from metablocks.executors import RandomDrawsWarning
from metablocks.laws.blocks import Block, as_block, public_names
from metablocks.laws.compare import fixed_draws

if TYPE_CHECKING:
    from metablocks.laws.table import Law

EXAMPLES = 15
SHRINK_SECONDS = 10.0


@dataclass(frozen=True)
class Result:
    """The result of one law."""

    law: str
    statement: str
    """The law in a sentence."""
    verdict: str
    """One of "holds", "breaks", "crashes", "does not apply"."""
    message: str = ""
    """The error, or the reason why it does not apply."""
    case: str = ""
    """The smallest arguments on which it breaks, in Python."""
    reproduce: str = ""
    """Python that runs the law on them once more."""
    examples: int = 0
    """The number of problems it was run on."""
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        """True if the law holds, or does not apply."""
        return self.verdict in ("holds", "does not apply")


@dataclass(frozen=True, repr=False)
class Check:
    """One law of one block, to be called: it returns, or raises the `LawError` of the smallest case."""

    block: Block
    law: "Law"
    examples: int = EXAMPLES
    device: torch.device | str = "cpu"

    def __repr__(self) -> str:
        return f"{self.block.code}-{self.law.name}"

    def __call__(self) -> None:
        """Raises `LawError` with the arguments on which the law fails and the Python that repeats it.

        A law that does not apply to the block is a skipped test.
        """
        result = self.result()
        if result.verdict == "does not apply":
            import pytest

            pytest.skip(result.message)
        if not result.ok:
            raise LawError(
                f"{self.law.name} {result.verdict} on {result.case}\n{result.message}\n\n"
                f"again, in Python:\n\n{result.reproduce}"
            ) from result.error

    def result(self) -> Result:
        """Run the law on drawn problems.

        Nothing that the block raises propagates, except for the `DataError` of data that is not here.
        """
        result = partial(Result, self.law.name, self.law.statement)
        with contextlib.suppress(Exception), _quiet():  # if asking fails, the law shows it
            reason = self.law.skip and self.law.skip(self.block.argument)
            if reason is not None:
                return result("does not apply", reason)
        tried, refusal, failure = self._search()
        if failure is None:
            if tried:
                return result("holds", examples=tried)
            return result("does not apply", f"refused: {refusal}")
        drawn, error = failure
        crashed = not isinstance(error, MetablocksError)
        return result(
            "crashes" if crashed else "breaks",
            _crash(error) if crashed else str(error),
            ", ".join(f"{name}={value!r}" for name, value in drawn.items()),
            self._reproduce(drawn),
            tried,
            error,
        )

    def run(self, **drawn: Any) -> None:
        """Run the law once, on these arguments."""
        case = drawn.pop("case", None)
        problem = [] if case is None else [case.problem(device=self.device)]
        with _quiet():
            self.law.check(self.block.argument, *problem, **drawn)

    def _search(self) -> tuple[int, str, tuple[dict[str, Any], Exception] | None]:
        """The number of problems tried, the last refusal, and the smallest failure."""
        from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
        from hypothesis.errors import Unsatisfiable

        tried, refused, refusal, deadline = 0, 0, "", float("inf")
        failures: dict[str, tuple[dict[str, Any], Exception]] = {}
        smallest: list[str] = []

        @settings(
            max_examples=self.examples,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(**self.law.drawn)
        def run(**drawn: Any) -> None:
            nonlocal tried, refused, refusal, deadline
            key = repr(drawn)
            if key not in failures:
                # No more than some refusals, of which hypothesis would look for hundreds, and no
                # more than some seconds after the first failure.
                if refused > 10 + 2 * self.examples or time.monotonic() > deadline:
                    return
                try:
                    self.run(**drawn)
                except DataError:
                    raise
                except Exception as error:
                    if isinstance(error, BlockError) and not isinstance(error, AnswerError):
                        refused, refusal = refused + 1, str(error)  # blocks that do not go together
                        reject()
                    failures[key] = drawn, error
                    deadline = min(deadline, time.monotonic() + SHRINK_SECONDS)
                tried += 1
            if key in failures:
                smallest[:] = [key]
                raise failures[key][1]

        try:
            run()
        except Unsatisfiable:
            pass
        except Exception:
            if not smallest:
                raise
        return tried, refusal, failures[smallest[0]] if smallest else None

    def _reproduce(self, drawn: dict[str, Any]) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in drawn.items())
        if torch.device(self.device).type != "cpu":
            arguments = f', device="{self.device}"{arguments}'
        words = set(re.findall(r"(\w+)\(", arguments))
        blocks = sorted(words & public_names())
        lines = [
            self.block.imports,
            f"from metablocks import {', '.join(blocks)}" if blocks else "",
            "from metablocks.laws.cases import Case" if "case" in drawn else "",
            "from metablocks.laws.check import run_law",
            "",
            f'run_law({self.block.code}, "{self.law.name}", protocol="{self.block.protocol}"{arguments})',
        ]
        return "\n".join(line for index, line in enumerate(lines) if line or index == 4)


def checks(
    blocks: Iterable[Any],
    *,
    protocol: str | None = None,
    examples: int = EXAMPLES,
    device: torch.device | str = "cpu",
) -> Iterator[Check]:
    """Every law of every block, to be called.

    - `blocks`: classes without required fields, instances, functions that make one.
    - `protocol`: one of `laws.blocks.PROTOCOLS`, if the blocks do not
      tell.

    >>> import metablocks as mb
    >>> [check.law.name for check in mb.laws.checks([mb.UniformStepLoss()])]
    ['a weighting', 'weighted sum', 'one gradient']

    Raises `BlockError` for a value that is not a block, `MissingError` without hypothesis.
    """
    from metablocks.laws import strategies  # noqa: F401  (first: its error says what to install)
    from metablocks.laws.table import LAWS

    for value in blocks:
        block = value if isinstance(value, Block) else as_block(value, protocol=protocol)
        for law in LAWS[block.protocol]:
            yield Check(block, law, examples, device)


def parametrize_with_laws(blocks: Iterable[Any], **options: Any) -> Callable[..., Any]:
    """Run a test once for each law of each block; the test takes `law` and calls it.

    `options` are those of `checks`. A law that does not apply to a block is a skipped test; one that
    fails raises `LawError` with the smallest case and the Python that repeats it.

    >>> import metablocks as mb
    >>> @mb.laws.parametrize_with_laws([mb.Proximal(0.5)])
    ... def test_proximal(law):
    ...     law()
    >>> test_proximal.pytestmark[0].name
    'parametrize'
    """
    import pytest

    return pytest.mark.parametrize("law", list(checks(blocks, **options)), ids=repr)


def run_law(
    block: Any,
    law: str,
    *,
    protocol: str | None = None,
    device: torch.device | str = "cpu",
    **drawn: Any,
) -> None:
    """Run one law of a block once, on stated arguments, as a report prints it.

    >>> import metablocks as mb
    >>> mb.laws.run_law(mb.FinalStepLoss(), "a weighting", steps=3, progress=mb.Progress(epoch=0))

    Raises `LawError` if the law breaks, and whatever the block raises.
    """
    named = {check.law.name: check for check in checks([block], protocol=protocol, device=device)}
    named[law].run(**drawn)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The same random state for every problem, and no warning of `Vmap`'s own draws."""
    with fixed_draws(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomDrawsWarning)
        yield


def _crash(error: Exception) -> str:
    """Type and message of an exception, and the innermost line of the user's own code, if any."""
    import hypothesis

    frames = traceback.extract_tb(error.__traceback__)
    packages = (torch.__file__, hypothesis.__file__)
    library = [*(str(Path(file).parent) for file in packages), str(Path(__file__).parents[1])]
    outside = [f for f in frames if not f.filename.startswith(tuple(library))]
    frame = (outside or frames)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    return f"{type(error).__name__}: {first_line(error) or '(no message)'} — at {where}"
