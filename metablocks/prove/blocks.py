"""Is this block right? The laws of its protocol, run on many small problems, as a report.

    report = verify(MyRule)
    print(report)

Hypothesis draws the problems and shrinks what breaks a law to the smallest case; the report has the
few lines of Python that show it again.
"""

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import metablocks
from metablocks.errors import BlockError, LawError, MetablocksError, MissingError
from metablocks.executors import RandomDrawsWarning
from metablocks.laws.cases import Case
from metablocks.prove.block_report import BlockReport, LawRow, Verdict
from metablocks.prove.subjects import Subject, subject

EXAMPLES, THOROUGH = 15, 200


def verify(
    block: Any,
    *,
    protocol: str | None = None,
    device: torch.device | str = "cpu",
    examples: int = EXAMPLES,
    progress: Callable[[str], None] | None = None,
) -> BlockReport:
    """Hold a block to every law of its protocol, on `examples` drawn problems each, in float64.

    - `block`: a class without required fields, an instance, a function that makes one, or a
      `Subject`. Protocols are rule, order, step loss, estimator, executor and norm; `protocol` says
      which where that cannot be told.
    - `progress`: called with the name of each law before it is run.

    The problems are small nets with smooth activations: dense and convolutional, deep and flat, with
    batch norm, tied or frozen parameters, over several tasks and steps, with other blocks of every
    axis. Draws are the same at every call.

    >>> import metablocks as mb
    >>> report = verify(mb.FinalStepLoss(), examples=3)
    >>> report.ok, report.protocol, [row.law for row in report.rows][:2]
    (True, 'step_loss', ['a weighting', 'weighted sum'])

    Raises `BlockError` for what is no block, `MissingError` without hypothesis.
    """
    given = block if isinstance(block, Subject) else subject(block, protocol=protocol)
    try:
        from metablocks.laws import strategies  # noqa: F401  (first: it says what to install)
        from metablocks.prove.laws_of import LAWS
    except MissingError as error:
        raise MissingError(f"metablocks verify: {error}") from error.__cause__
    rows = []
    made = given.make()
    for law in LAWS[given.protocol]:
        if law.kind is not None and not isinstance(made, law.kind):
            continue
        if progress is not None:
            progress(law.name)
        rows.append(_row(given, law, torch.device(device), examples))
    return BlockReport(given.code, given.protocol, tuple(rows))


def _row(given: Subject, law: Any, device: torch.device, examples: int) -> LawRow:
    """One law on one block."""
    with contextlib.suppress(Exception), _quietly():  # where asking fails, the law shows it
        excuse = law.excuse(given.argument)
        if excuse is not None:
            return LawRow(law.name, law.says, "does not apply", excuse)
    search = _Search(given, law, device)
    found = search(examples)
    if found is None and not search.tried:
        return LawRow(law.name, law.says, "does not apply", f"refused: {search.refusal}")
    if found is None:
        return LawRow(law.name, law.says, "holds", cases=search.tried)
    drawn, error = found
    verdict: Verdict = "breaks" if isinstance(error, MetablocksError) else "crashes"
    found_text = str(error) if verdict == "breaks" else _crash(error, given)
    code = _reproduce(given, law, drawn, device)
    shown = [f"{name}={value!r}" for name, value in drawn.items() if name != "case"]
    drawn_case: Case | None = drawn.get("case")
    return LawRow(
        law.name,
        law.says,
        verdict,
        found_text,
        case=", ".join([repr(drawn_case)] * (drawn_case is not None) + shown),
        words="" if drawn_case is None else drawn_case.says,
        reproduce=code,
        cases=search.tried,
    )


class _Search:
    """Runs a law on drawn problems; finds the smallest on which it breaks."""

    def __init__(self, given: Subject, law: Any, device: torch.device) -> None:
        self.given = given
        self.law = law
        self.device = device
        self.tried = 0
        self.refused = 0
        self.refusal = ""
        self._known: dict[str, Exception | None] = {}
        self._smallest: tuple[dict[str, Any], Exception] | None = None

    def __call__(self, examples: int) -> tuple[dict[str, Any], Exception] | None:
        from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
        from hypothesis.errors import Flaky, Unsatisfiable

        most_refused = 10 + 2 * examples

        @settings(
            max_examples=examples,
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
            if self.refused > most_refused:  # hypothesis would look for hundreds that go together
                return
            error = self.outcome(drawn)
            if isinstance(error, BlockError):  # the blocks do not go together, and say so
                self.refused += 1
                self.refusal = str(error)
                reject()
            if error is not None:
                self._smallest = drawn, error
                raise error

        try:
            run()
        except Unsatisfiable:
            return None
        except Flaky:
            drawn, error = self._smallest or ({}, LawError(""))
            return drawn, LawError(f"not the same when asked again; at first: {error}")
        except Exception:
            if self._smallest is None:
                raise
        return self._smallest

    def outcome(self, drawn: dict[str, Any]) -> Exception | None:
        """What the law raises on a drawn problem; nothing is run twice."""
        key = repr(drawn)
        if key not in self._known:
            self._known[key] = self.run(drawn)
        return self._known[key]

    def run(self, drawn: dict[str, Any]) -> Exception | None:
        """What the law raises on a drawn problem."""
        rest = dict(drawn)
        try:
            with _quietly():
                case: Case | None = rest.pop("case", None)
                problem = [] if case is None else [case.problem(device=self.device)]
                self.law.check(self.given.argument, *problem, **rest)
        except BlockError as error:
            return error
        except Exception as error:
            self.tried += 1
            return error
        self.tried += 1
        return None


@contextlib.contextmanager
def _quietly() -> Any:
    """The same random state for every problem, and no word of `Vmap`'s own draws."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomDrawsWarning)
        torch.manual_seed(0)
        yield


def _crash(error: Exception, given: Subject) -> str:
    """Type, message, and the line of the user's own file where it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if given.file is not None and Path(f.filename) == Path(given.file)]
    frame = (own or frames)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else '(no message)'} — at {where}"


def _reproduce(given: Subject, law: Any, drawn: dict[str, Any], device: torch.device) -> str:
    """Python that calls the law on the case once more."""
    module = law.check.__module__.rpartition(".")[2]
    told = [given.argument_code]
    if "case" in drawn:
        place = "" if device.type == "cpu" else f'device="{device}"'
        told.append(f"{drawn['case']!r}.problem({place})")
    told += [f"{name}={value!r}" for name, value in drawn.items() if name != "case"]
    call = f"{module}.{law.check.__name__}(\n" + "".join(f"    {part},\n" for part in told) + ")"
    words = set(re.findall(r"(\w+)\(", " ".join(told[1:])))
    blocks = sorted(words & set(metablocks.__all__))
    laws = sorted({module, *(["norms"] if "norms." in told[0] else [])})
    lines = [
        given.imports,
        f"from metablocks import {', '.join(blocks)}" if blocks else "",
        f"from metablocks.laws import {', '.join(laws)}",
        "from metablocks.laws.cases import Case" if "case" in drawn else "",
        "",
        call,
    ]
    return "\n".join(line for index, line in enumerate(lines) if line or index == 4)
