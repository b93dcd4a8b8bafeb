"""The order of measurements: contenders interleaved over rounds, each in a fresh process.

A machine that slows down half-way then slows every contender, and no contender inherits another's
memory, caches or threads. The disk cache of compiled code is empty at a case's start: its first round
pays for compiling in full, later ones less.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tools.benchmarks.lineup import CONTENDERS, Case, Contender

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1800
"""Seconds after which a measurement is given up."""

TOLERANCE = 1e-9
"""Largest relative error in float64 of a gradient that counts as right: rounding is below 1e-12."""


Freed: TypeAlias = Literal["kept", "as-is", "as-run"]


@dataclass(frozen=True)
class Settings:
    device: str
    dtype: str
    threads: int
    rounds: int
    quick: bool
    repeats: int | None
    """None: as often as the case says."""
    freed_memory: Freed = "kept"
    """On the CPU; "as-run" is kept in the processes of ours alone, where `metablocks run` keeps it."""

    def request(self, contender: Contender) -> dict[str, bool]:
        """The settings of a contender's process: its allocator, and the order of its net."""
        others = self.freed_memory == "as-run" and contender.role != "ours"
        kept = self.freed_memory != "as-is" and not others
        return {"keep_freed_memory": kept, "as_published": others}


@dataclass
class Score:
    """What the rounds of one contender gave."""

    contender: Contender
    medians: list[float] = field(default_factory=list)
    """Seconds, one a round."""
    peaks: list[int] = field(default_factory=list)
    """Bytes of the process, one a round."""
    tensors: int | None = None
    """Bytes of tensors at the peak, in the first round."""
    weights: int = 0
    """Bytes of the model's parameters, frozen ones too, which `peaks` and `tensors` leave out."""
    first: float | None = None
    """Seconds of the first call in the first round."""
    compiling: int | None = None
    """Bytes at the peak of that call, where it compiles."""
    parts: list[dict[str, float]] = field(default_factory=list)
    """Seconds of the parts of a whole meta-iteration, one a round."""
    error: float | None = None
    device: str | None = None
    failure: str | None = None

    @property
    def wrong(self) -> bool:
        claims = self.error is not None and not self.contender.bfloat16
        return claims and not self.error <= TOLERANCE

    @property
    def ranked(self) -> bool:
        return self.failure is None and not self.wrong

    @property
    def seconds(self) -> float:
        return statistics.median(self.medians)

    @property
    def peak(self) -> float:
        return statistics.median(self.peaks)


def measure_case(case: Case, names: Sequence[str], settings: Settings) -> list[Score]:
    """One score for each of the contenders `names`; their order changes from round to round."""
    scores = {name: Score(CONTENDERS[name]) for name in names}
    with tempfile.TemporaryDirectory() as cache:
        for index in range(settings.rounds):
            turn = index % len(names)
            for name in (*names[turn:], *names[:turn]):
                if scores[name].failure is None:
                    _progress(f"{case.name}, round {index + 1} of {settings.rounds}: {name}")
                    check = index == 0
                    _take(scores[name], _run_worker(case, name, settings, cache, check=check))
    _progress("")
    return list(scores.values())


def _take(score: Score, result: dict[str, Any]) -> None:
    """Adds a round's result to the score."""
    score.failure = result.get("failure")
    if score.failure is None:
        if not score.medians:
            score.first = result["first"]
            score.compiling = result.get("compiling")
            score.tensors = result.get("tensors")
            score.weights = result["weights"]
        score.medians.append(statistics.median(result["times"]))
        score.peaks.append(result["peak"])
        score.parts += [result["parts"]] if "parts" in result else []
        score.error = result.get("error", score.error)
        score.device = result["device"]


def _run_worker(
    case: Case, name: str, settings: Settings, cache: str, *, check: bool
) -> dict[str, Any]:
    request = {
        "case": asdict(case),
        "contender": name,
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "repeats": settings.repeats or case.repeats,
        "check": check,
        "folder": str(Path(cache, "images")),
        **settings.request(CONTENDERS[name]),
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(settings.threads),
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }
    argv = [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.worker", json.dumps(request)]
    try:
        done = subprocess.run(
            argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {LIMIT} s"}
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        hint = ": out of memory?" if killer == "SIGKILL" else ""
        return {"failure": f"its process was ended by {killer}{hint}"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failure": f"its process exited with {done.returncode}: {last}"}


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
