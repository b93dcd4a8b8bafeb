"""The directory of a run, `runs/<name>-<time>/`: what lies in it and how it is written.

    recipe.yaml     the resolved recipe, runnable as it is
    run.json        where, when and with what: recipe hash, commit, versions, device, argv, data, and
                    what an executor that chooses has chosen, and why
    metrics.jsonl   one line an epoch, then one for the test, with what is deployed where layers are
                    taken out for that (see `deployment`); nothing here depends on the clock
    times.jsonl     what each epoch cost: seconds, memory (see `usage`)
    checkpoint.pt   where training stands; best.pt: where validation was best
    epoch-<n>.pt    the best epochs by validation, where the recipe asks for an ensemble
    *.png           plots, where matplotlib is installed

A file is replaced in one go or only appended to, so that a killed run leaves nothing half-written
but at most the last line of a log, which `--resume` drops.
"""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metablocks
from metablocks.errors import RunError


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and the only functions that write there."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def times(self) -> Path:
        return self.path / "times.jsonl"

    def checkpoint(self, which: str) -> Path:
        """`last` is `checkpoint.pt`, `best` is `best.pt`."""
        return self.path / ("checkpoint.pt" if which == "last" else f"{which}.pt")

    def member(self, epoch: int) -> Path:
        """The checkpoint of an epoch that is kept for the ensemble."""
        return self.path / f"epoch-{epoch}.pt"

    def keep_members(self, epochs: Collection[int]) -> None:
        """Delete the checkpoints of all other epochs."""
        kept = {self.member(epoch) for epoch in epochs}
        for path in self.path.glob("epoch-*.pt"):
            if path not in kept:
                path.unlink()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The complete lines of `metrics.jsonl`."""
        return _read_lines(self.metrics)

    def read_times(self) -> list[dict[str, Any]]:
        """The complete lines of `times.jsonl`."""
        return _read_lines(self.times)

    def keep_epochs(self, epochs: int) -> None:
        """Drop log lines beyond a number of epochs: what a killed run did after its checkpoint."""
        for path in (self.metrics, self.times):
            rows = [row for row in _read_lines(path) if row.get("epoch", epochs + 1) <= epochs]
            write_text(path, _jsonl(rows))

    def note(self, key: str, value: Any) -> None:
        """Add to `run.json` what is known only once the run is under way."""
        record = json.loads(self.record.read_text(encoding="utf-8"))
        write_text(self.record, f"{json.dumps(record | {key: value}, indent=1)}\n")

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Add a line to a log."""
        with path.open("ab") as file:
            file.write(_jsonl([row]).encode())
            file.flush()
            os.fsync(file.fileno())


def create(out: Path, name: str) -> RunDirectory:
    """A new directory `out/<name>-<time>`, never one that exists.

    Raises `RunError` where it cannot be made.
    """
    stem = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        path = out / (f"{stem}-{stamp}" + (f"-{attempt}" if attempt > 1 else ""))
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if path.is_dir():
                continue
            raise RunError(
                f"cannot make {path}: {error.strerror}; --out takes a folder that can be written to"
            ) from error
        return RunDirectory(path)
    raise RunError(f"{out} holds too many runs called {stem}-{stamp}; give another --out")


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Replace a file in one go: whoever reads it sees the old or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go."""
    write_atomically(path, lambda file: file.write(text.encode()))


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides the recipe: code, versions, machine."""
    return {
        "commit": _commit(),
        "versions": {
            "metablocks": metablocks.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """The commit of the metablocks in use, with a + where it was changed; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", __file__):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.get_device_module(device.type).get_device_name(device)})"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
