"""What a comparison was measured on, in a line."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metablocks.compare.processes import cores
from metablocks.compare.results import FinishedRun


def machine_line(record: Mapping[str, Any]) -> str:
    """This machine, with what a run on it recorded."""
    return f"machine: {cpu_name()}, {cores()} cores; {_software(record)}"


def recorded_line(runs: Sequence[FinishedRun]) -> str:
    """What runs recorded that may be of other machines and times."""
    records = dict.fromkeys(
        f"{_software(run.record)}, {run.record.get('platform')}" for run in runs
    )
    return f"recorded by the runs: {' | '.join(records)}" if records else "machine: none; no run"


def cpu_name() -> str:
    """The processor's name, as far as it is told."""
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
