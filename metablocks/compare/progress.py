"""What is shown while runs train: a bar on a terminal, plain lines elsewhere, on stderr."""

import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from metablocks.compare.processes import Job, Outcome
from metablocks.compare.table import seconds_text

_LOOK = 1.0  # seconds between looks at the logs of runs
_SPEAK = 30.0  # seconds between lines where there is no terminal


class Display:
    """Shows which job of how many runs, how far it is, and how it ended.

    `steps` says how many meta-steps a job takes, `reached` how many it has taken so far, `result`
    what to say about it at the end; nothing is known of a job they do not know.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        quiet: bool = False,
        steps: Callable[[Job], int] = lambda job: 0,
        reached: Callable[[Job], int] = lambda job: 0,
        result: Callable[[Job], str] = lambda job: "",
    ) -> None:
        self._numbers = {job: number for number, job in enumerate(jobs, start=1)}
        self._quiet = quiet
        self._steps, self._reached, self._result = steps, reached, result
        self._running: dict[Job, float] = {}
        self._done = 0
        self._looked = self._spoken = time.perf_counter()
        total = sum(steps(job) for job in jobs)
        terminal = sys.stderr.isatty() and not quiet and total > 0
        self._bar = tqdm(total=total, unit="step", dynamic_ncols=True) if terminal else None

    def started(self, job: Job) -> None:
        self._running[job] = time.perf_counter()
        if self._bar is None:
            self._say(f"{self._name(job)} …")
        else:
            self._bar.set_description(" + ".join(map(self._name, self._running)))

    def ended(self, outcome: Outcome) -> None:
        del self._running[outcome.job]
        self._done += self._steps(outcome.job)
        told = f"{self._name(outcome.job)}: {_ending(outcome)}"
        result = self._result(outcome.job) if outcome.status == 0 else ""
        failed = outcome.status != 0 and not outcome.stopped
        self._say(f"{told}, {result}" if result else told, always=failed)
        if failed:
            for line in outcome.error.splitlines():
                self._say(f"  {line}", always=True)
        self._show()

    def tick(self) -> None:
        if time.perf_counter() - self._looked >= _LOOK:
            self._looked = time.perf_counter()
            self._show()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.n = self._done + sum(map(self._reached, self._running))
            self._bar.refresh()
        elif time.perf_counter() - self._spoken >= _SPEAK and self._running:
            for job, started in self._running.items():
                elapsed = seconds_text(time.perf_counter() - started)
                steps = f"{self._reached(job):,} of {self._steps(job):,} meta-steps, "
                self._say(f"{self._name(job)}: {steps * bool(self._steps(job))}{elapsed}")

    def _name(self, job: Job) -> str:
        return f"{self._numbers[job]} of {len(self._numbers)}, {job.title}"

    def _say(self, line: str, *, always: bool = False) -> None:
        self._spoken = time.perf_counter()
        if always or not self._quiet:
            tqdm.write(line, file=sys.stderr)


def _ending(outcome: Outcome) -> str:
    took = seconds_text(outcome.seconds)
    if outcome.status == 0:
        return f"done in {took}"
    return f"stopped after {took}" if outcome.stopped else f"FAILED after {took}"
