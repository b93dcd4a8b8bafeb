"""Notes beside the table: machine and software, and differences that make numbers incomparable."""

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metablocks.compare.jobs import child_environment, cores
from metablocks.runs.finished import FinishedRun
from metablocks.runs.plots import Runs
from metablocks.runs.tables import TRANSDUCTIVE

_SYSTEM_LOAD = 0.5  # beyond a thread on every core: this process, the system

_SETTINGS: dict[str, Callable[[FinishedRun], object]] = {
    "meta-steps": lambda run: f"{run.steps:,}",
    "tasks a meta-step": lambda run: run.values["outer"]["tasks_per_step"],
    "inner steps before the test": lambda run: run.inner_steps,
}
_CIRCUMSTANCES: dict[str, Callable[[FinishedRun], object]] = {
    "the device": lambda run: run.record.get("device"),
    "the number of threads": lambda run: run.record.get("threads"),
    "the platform": lambda run: run.record.get("platform"),
    "torch": lambda run: run.record.get("versions", {}).get("torch"),
}


def notes_on(runs: Runs, *, jobs: int, load: float | None = None) -> list[str]:
    """Notes that a reader of the table must know, a line each.

    `jobs` is how many runs were trained side by side, 1 if none was trained; `load` the highest load
    of the machine meanwhile.
    """
    runs = {label: group for label, group in runs.items() if group}
    notes = [_unlike(runs, name, value) for name, value in _SETTINGS.items()]
    seeds = {label: sorted(run.seed for run in group) for label, group in runs.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        words = "; ".join(f"{label} {', '.join(map(str, each))}" for label, each in seeds.items())
        notes.append(f"seeds differ, and with them the test tasks: {words}")
    notes += [
        _unlike(runs, name, value, "; times and memory may not compare")
        for name, value in _CIRCUMSTANCES.items()
    ]
    notes.append(_unlike(runs, "the commit of metablocks", lambda run: _short_commit(run.record)))
    norms = [
        label for label, group in runs.items() if any(r.record.get("transductive") for r in group)
    ]
    if norms:
        notes.append(TRANSDUCTIVE + f" (in {', '.join(norms)})" * (len(norms) < len(runs)))
    every = [run for group in runs.values() for run in group]
    members = sorted({run.ensemble.checkpoints for run in every if run.ensemble})
    if members:
        notes.append(
            f"ensemble: {' or '.join(map(str, members))} checkpoints predict together, at as many "
            "times the work; the recommendation goes by the best checkpoint alone"
        )
    if jobs > 1:
        threads = child_environment(jobs)["OMP_NUM_THREADS"]
        notes.append(
            f"times were measured with {jobs} runs side by side, each on {threads} "
            f"{'thread' if threads == '1' else 'threads'}"
        )
    if load is not None and load > cores() + _SYSTEM_LOAD:
        notes.append(
            f"the machine was busy with other work meanwhile (a load of {load:.1f} on {cores()} "
            "cores): times are longer than they need be, and not equally so"
        )
    return [note for note in notes if note]


def machine_text(runs: Sequence[FinishedRun], *, trained_here: bool) -> str:
    """The machine and software of runs, in a line: this machine, or as they recorded it."""
    if trained_here:
        return f"machine: {_cpu_name()}, {cores()} cores; {_software(runs[0].record)}"
    records = dict.fromkeys(
        f"{_software(run.record)}, {run.record.get('platform')}" for run in runs
    )
    return f"recorded by the runs: {' | '.join(records)}" if records else "machine: none; no run"


def _unlike(
    runs: Runs, name: str, value: Callable[[FinishedRun], object], consequence: str = ""
) -> str:
    """A note that runs, of one row too, differ in something; empty if they do not."""
    words = {
        label: ", ".join(sorted({str(value(run)) for run in group}))
        for label, group in runs.items()
    }
    if len({str(value(run)) for group in runs.values() for run in group}) < 2:
        return ""
    return f"{name}: {'; '.join(f'{label} {word}' for label, word in words.items())}{consequence}"


def _cpu_name() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _software(record: Mapping[str, Any]) -> str:
    versions = record.get("versions", {})
    threads = record.get("threads")
    return (
        f"device {record.get('device')}, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"torch {versions.get('torch')}, metablocks {versions.get('metablocks')} "
        f"at commit {record.get('commit') or 'unknown'}"
    )


def _short_commit(record: Mapping[str, object]) -> str:
    commit = str(record.get("commit") or "unknown")
    return commit[:10] + ("+" if commit.endswith("+") else "")
