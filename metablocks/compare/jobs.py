"""Jobs: commands in processes of their own, a few side by side, shown while they run.

The jobs of a comparison are its runs, one for each recipe and seed; and before them, if training is
limited in minutes, timings.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from metablocks.compare.entries import Entry
from metablocks.compare.request import Request
from metablocks.compare.table import seconds_text
from metablocks.errors import command
from metablocks.runs.directory import RunDirectory
from metablocks.runs.files import write_text, writing
from metablocks.runs.finished import is_run, read_run
from metablocks.runs.scores import MEASURES
from metablocks.runs.tables import place_arguments
from metablocks.runs.train import on_stop_signals, progress_bar

_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
_POLL = 0.1  # seconds between looks at the processes,
_REFRESH = 1.0  # and at the logs of runs
_TAIL = 12  # lines of an error that are shown


@dataclass(eq=False)
class Job:
    """A command to run, and how it ended. Its output goes to `<log>.out` and `<log>.err`."""

    title: str
    command: tuple[str, ...]
    log: Path
    arguments: tuple[str, ...] = ()
    """Of `metablocks`, by which a user trains it."""
    label: str = ""
    """Of the entry that it is a run of."""
    steps: int = 0
    """Meta-steps."""
    runs: Path | None = None
    """The folder that the run directory will be in."""
    recipe_hash: str = ""
    status: int | None = None
    """The exit status; None before the end, or if it was never started."""
    seconds: float = 0.0
    load: float | None = None
    """Load of the machine in the last minute of the job, if known."""

    @property
    def output(self) -> Path:
        return self.log.with_name(f"{self.log.name}.out")

    @property
    def errors(self) -> Path:
        return self.log.with_name(f"{self.log.name}.err")

    @property
    def stopped(self) -> bool:
        """True if it ended as asked to by SIGINT: saved, or before it could begin."""
        return self.status in (130, -signal.SIGINT)

    @property
    def error(self) -> str:
        """The last lines on stderr, or the signal or status that ended it."""
        if self.status == 0:
            return ""
        if self.status is not None and self.status < 0:
            name = signal.Signals(-self.status).name
            hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
            return f"ended by {name}{hint}"
        text = self.errors.read_text(errors="replace") if self.errors.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        if "Traceback (most recent call last):" in lines:
            lines = lines[-1:]
        return "\n".join(lines[-_TAIL:]) or f"exit status {self.status}"

    @property
    def directory(self) -> Path | None:
        """The run directory, once it exists."""
        for record in sorted(self.runs.glob("*/run.json")) if self.runs else ():
            path = record.parent
            if json.loads(record.read_text())["recipe"] == self.recipe_hash and is_run(path):
                return path
        return None

    @property
    def steps_done(self) -> int:
        rows = RunDirectory(self.directory).read_metrics() if self.directory else []
        return max((row["step"] for row in rows if "step" in row), default=0)

    def ending(self) -> str:
        """State at the end in a line, with the score of a run."""
        duration = seconds_text(self.seconds)
        if self.status != 0:
            return f"{'stopped' if self.stopped else 'FAILED'} after {duration}"
        if not self.directory:
            return f"done in {duration}"
        test = read_run(self.directory).test
        return f"done in {duration}, test {MEASURES[test.measure][0]} {test.text(-1)}"


def plan_runs(
    entries: Sequence[Entry], seeds: Sequence[int], folder: Path, request: Request
) -> list[Job]:
    """A job for each recipe and seed that is not finished: all with the first seed, then the next.

    Writes the recipes to `folder/recipes/`.
    """
    recipes, runs = folder / "recipes", folder / "runs"
    with writing(recipes):
        recipes.mkdir(parents=True, exist_ok=True)
    files = {}
    for entry in entries:
        if entry.recipe:
            file, number = recipes / f"{entry.stem}.yaml", 1
            while file.exists():
                number += 1
                file = recipes / f"{entry.stem}-{number}.yaml"
            write_text(file, entry.recipe.to_yaml())
            files[entry.label] = file
    jobs = []
    for seed in seeds:
        for entry in entries:
            if entry.recipe is None or seed in {run.seed for run in entry.finished}:
                continue
            file, seeded = files[entry.label], entry.with_override(f"seed={seed}")
            assert seeded.recipe is not None
            arguments = (str(file), "--set", f"seed={seed}", "--out", str(runs), *place(request))
            jobs.append(
                Job(
                    title=f"{entry.label}, seed {seed}",
                    command=(*python(), "-m", "metablocks", "run", *arguments, "--quiet"),
                    arguments=("run", *arguments),
                    log=folder / "logs" / f"{file.stem}-seed-{seed}",
                    label=entry.label,
                    steps=entry.steps,
                    runs=runs,
                    recipe_hash=seeded.recipe.hash,
                )
            )
    return jobs


def command_to_finish(job: Job, request: Request) -> str:
    """The command that a user finishes an interrupted run with, or trains it with."""
    if job.directory:
        words = ["run", "--resume", job.directory, *place(request)]
        return f"{command(*words)}    # stopped"
    return f"{command(*job.arguments)}    # not begun"


def place(request: Request) -> tuple[str, ...]:
    """The arguments for packages, data and device, for a child process."""
    return place_arguments(request.allow, request.data, request.device)


class Display:
    """Progress of jobs on stderr: a line when one begins and ends, and a bar of all meta-steps."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool = False) -> None:
        self._names = {
            job: f"{number} of {len(jobs)}, {job.title}" for number, job in enumerate(jobs, start=1)
        }
        self._quiet = quiet
        self._running: set[Job] = set()
        self._done = 0
        self._refreshed = time.perf_counter()
        total = sum(job.steps for job in jobs)
        self._bar = progress_bar(total, "step", quiet=quiet or not total)

    def started(self, job: Job) -> None:
        """Show that a job runs."""
        self._running.add(job)
        self._print(f"{self._names[job]} …")

    def ended(self, job: Job) -> None:
        """Show the end of a job, and the error of one that failed."""
        self._running.remove(job)
        self._done += job.steps
        failed = job.status != 0 and not job.stopped
        lines = [f"{self._names[job]}: {job.ending()}"]
        lines += [f"  {line}" for line in job.error.splitlines()] if failed else []
        for line in lines:
            self._print(line, always=failed)

    def tick(self) -> None:
        """Show the progress of running jobs, from time to time."""
        if time.perf_counter() - self._refreshed >= _REFRESH:
            self._refreshed = time.perf_counter()
            steps = self._done + sum(job.steps_done for job in self._running)
            self._bar.update(steps - self._bar.n)

    def close(self) -> None:
        """Take the bar down."""
        self._bar.close()

    def _print(self, line: str, *, always: bool = False) -> None:
        if always or not self._quiet:
            tqdm.write(line, file=sys.stderr)


def run_jobs(jobs: Sequence[Job], *, side_by_side: int, display: Display) -> bool:
    """Run the jobs, at most `side_by_side` at once, each with its share of the cores.

    Returns True if a signal cut it short. On SIGINT, SIGTERM or SIGHUP every child is sent one SIGINT, on
    which a run saves and stops, and is waited for; on a second one they are killed. Children are in
    sessions of their own, so the terminal's Ctrl-C reaches them only from here.
    """
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    waiting = list(jobs)
    environment = child_environment(side_by_side)
    passed_on = 0
    signals: list[int] = []
    with on_stop_signals(lambda number, _: signals.append(number)):
        try:
            while running or (waiting and not signals):
                while waiting and not signals and len(running) < side_by_side:
                    job = waiting.pop(0)
                    running[job] = _start(job, environment), time.perf_counter()
                    display.started(job)
                received = len(signals)
                for process, _ in running.values() if received > passed_on else ():
                    process.kill() if received > 1 else process.send_signal(signal.SIGINT)
                passed_on = received
                time.sleep(_POLL)
                for job, (process, started) in list(running.items()):
                    job.status = process.poll()
                    if job.status is not None:
                        del running[job]
                        job.seconds, job.load = time.perf_counter() - started, _load()
                        display.ended(job)
                display.tick()
        finally:
            display.close()
            for process, _ in running.values():  # only if something went wrong here
                process.kill()
    return bool(signals)


def child_environment(side_by_side: int) -> dict[str, str]:
    """The environment of children: with J side by side, each computes on cores // J threads.

    A smaller `OMP_NUM_THREADS` of the user's own stays.
    """
    if side_by_side == 1:
        return dict(os.environ)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    most = int(threads) if threads.isdecimal() else cores()
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, min(most, cores() // side_by_side)))}


def python() -> tuple[str, ...]:
    """The interpreter of a child: it looks for modules in the working directory if this process does.

    That may be the folder of a run of somebody else's, of which no code is to run.
    """
    here = sys.path[:1] in ([""], [os.getcwd()])
    return (sys.executable,) if here else (sys.executable, "-P")


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
    with writing(job.log):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        out, err = job.output.open("wb"), job.errors.open("wb")
    with out, err:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """On Linux a child is sent SIGTERM, on which a run saves and stops, once this process has ended."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
