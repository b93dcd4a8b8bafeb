"""Jobs as processes of their own, a few side by side: started, watched, stopped cleanly."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

_POLL = 0.1
_TAIL = 12  # lines of an error that are shown


@dataclass(frozen=True)
class Job:
    """A command to run. What it prints goes to `<log>.out` and `<log>.err`."""

    title: str
    command: tuple[str, ...]
    log: Path

    @property
    def printed(self) -> Path:
        return self.log.with_name(f"{self.log.name}.out")

    @property
    def errors(self) -> Path:
        return self.log.with_name(f"{self.log.name}.err")


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    status: int | None
    """The exit status; None where it was not started before the interruption."""
    seconds: float = 0.0
    load: float | None = None
    """Processes that wanted a core in the last minute of the job, where that is known."""

    @property
    def stopped(self) -> bool:
        """Whether it ended as asked to by SIGINT: saved, or before it could begin."""
        return self.status in (130, -signal.SIGINT)

    @property
    def error(self) -> str:
        """What the job said on stderr last, or how it ended."""
        if self.status == 0:
            return ""
        if self.status is not None and self.status < 0:
            name = signal.Signals(-self.status).name
            hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
            return f"ended by {name}{hint}"
        said = self.job.errors.read_text(errors="replace") if self.job.errors.exists() else ""
        lines = [line for line in said.splitlines() if line.strip()]
        if "Traceback (most recent call last):" in lines:
            lines = lines[-1:]
        return "\n".join(lines[-_TAIL:]) or f"exit status {self.status}"


class Watcher(Protocol):
    """Is told what goes on, to show it."""

    def started(self, job: Job) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...

    def tick(self) -> None: ...


@dataclass(frozen=True)
class Result:
    """Outcomes in the order of the jobs, and whether Ctrl-C cut it short."""

    outcomes: tuple[Outcome, ...]
    interrupted: bool


def run_jobs(jobs: Sequence[Job], *, side_by_side: int, watcher: Watcher) -> Result:
    """Run the jobs, at most `side_by_side` at once, each with its share of the cores.

    On SIGINT or SIGTERM every child is sent one SIGINT, on which a run saves and stops, and is
    waited for; on a second one they are killed. Children are in sessions of their own, so the
    terminal's Ctrl-C reaches them only from here.
    """
    ended: dict[int, Outcome] = {}
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    waiting = list(range(len(jobs)))
    environment = child_environment(side_by_side)
    with _counted_signals() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and not signals and len(running) < side_by_side:
                    index = waiting.pop(0)
                    running[index] = (_start(jobs[index], environment), time.perf_counter())
                    watcher.started(jobs[index])
                _pass_on(signals, [process for process, _ in running.values()])
                time.sleep(_POLL)
                for index, (process, started) in list(running.items()):
                    status = process.poll()
                    if status is not None:
                        del running[index]
                        seconds = time.perf_counter() - started
                        ended[index] = Outcome(jobs[index], status, seconds, _load())
                        watcher.ended(ended[index])
                watcher.tick()
        finally:
            for process, _ in running.values():  # only where something went wrong here
                process.kill()
    outcomes = tuple(ended.get(index, Outcome(job, None)) for index, job in enumerate(jobs))
    return Result(outcomes, bool(signals))


def child_environment(side_by_side: int) -> dict[str, str]:
    """The environment of children: with J side by side, each computes on cores // J threads.

    A smaller `OMP_NUM_THREADS` of the user's own stays.
    """
    if side_by_side == 1:
        return dict(os.environ)
    own = os.environ.get("OMP_NUM_THREADS", "")
    most = int(own) if re.fullmatch("[1-9][0-9]{0,5}", own) else cores()
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, min(most, cores() // side_by_side)))}


def cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on this platform
        return None


def _start(job: Job, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.printed.open("wb") as out, job.errors.open("wb") as err:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )


def _pass_on(signals: list[int], processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """One SIGINT for the first signal, SIGKILL from the second on."""
    for process in processes:
        if len(signals) > 1:
            process.kill()
        elif signals and signals[0]:
            process.send_signal(signal.SIGINT)
    if signals:
        signals[0] = 0  # passed on


@contextmanager
def _counted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list, where signals are this thread's to take."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
