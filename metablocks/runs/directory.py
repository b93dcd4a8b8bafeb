"""The directory of a run, `runs/<name>-<time>/`: what lies in it and how it is written.

    recipe.yaml     the resolved recipe, runnable as it is
    run.json        where, when and with what: recipe hash, commit, versions, device, argv, data, files
                    and hashes of code from outside, and why an executor was chosen, if it was; the
                    weights that it began with, if it is from another run; what was not as before when
                    it went on
    metrics.jsonl   one line an epoch, then one for the test, with what is deployed where layers are
                    taken out for that (see `deployment`); null stands for nan; nothing here depends on
                    the clock
    evaluations.jsonl  one line for each `metablocks eval`
    times.jsonl     what each epoch cost: seconds, memory (see `usage`)
    checkpoint.pt   where training stands; previous.pt: the checkpoint before it, in case that one is
                    damaged; best.pt: where validation was best
    epoch-<n>.pt    the best epochs by validation, where the recipe asks for an ensemble
    log.txt         what the run printed
    *.png           plots, where matplotlib is installed
    .lock           held by the process that trains here

A file is replaced in one go or only appended to, so that a killed run leaves nothing half-written
but at most the last line of a log, which `--resume` drops, and a hidden `*.partial`, which it clears.
`checkpoint.pt` is there before anything else is finished; it is written after every epoch, and within
one after ten minutes, so that what it does not count is at most an epoch, or ten minutes.
"""

import json
import logging
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from filelock import lock_descriptor
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from metablocks.errors import RunError, command, first_line, one_line
from metablocks.runs.files import (
    PARTIAL,
    open_to_append,
    sync_folder,
    write_bytes,
    write_text,
    writing,
)
from metablocks.runs.logs import epochs_of, json_line, read_rows, whole_lines

_log = logging.getLogger(__name__)


class _Resumed(TypedDict):
    time: str
    step: int
    changed: dict[str, tuple[Any, Any]]


class _Data(TypedDict, total=False):
    checksum: str | None
    folder: str | None


@with_config(ConfigDict(extra="allow"))
class _Record(TypedDict):
    """The part of a record that is read; a key that an older version did not write may be absent."""

    recipe: str
    data: _Data
    resumed: NotRequired[list[_Resumed]]
    source: NotRequired[str]
    origins: NotRequired[dict[str, str]]
    device: NotRequired[str]
    threads: NotRequired[int]
    platform: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    commit: NotRequired[str | None]


_RECORD = TypeAdapter(_Record)


class RunDirectory:
    """Paths of a run, and the only functions that write there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.record = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.times = path / "times.jsonl"
        self.test = path / "test.npz"
        self.log = path / "log.txt"
        self.evaluations = path / "evaluations.jsonl"

    def checkpoint(self, which: str) -> Path:
        """`last` is `checkpoint.pt`, `previous` the one before, `best` is `best.pt`."""
        return self.path / ("checkpoint.pt" if which == "last" else f"{which}.pt")

    @property
    def finished(self) -> list[str]:
        """The names of files that hold what was finished, the checkpoints to go on from aside."""
        logs = [path for path in (self.metrics, self.times) if whole_lines(path)]
        files = [self.checkpoint("best"), self.test, *self._members()]
        files += sorted(self.path.glob("*.png"))
        return [path.name for path in [*logs, *files] if path.is_file()]

    def member(self, epoch: int) -> Path:
        """The checkpoint of an epoch that is kept for the ensemble."""
        return self.path / f"epoch-{epoch}.pt"

    def keep_members(self, epochs: Collection[int]) -> None:
        """Delete the checkpoints of all other epochs."""
        kept = {self.member(epoch) for epoch in epochs}
        for path in self._members():
            if path not in kept:
                with writing(path):
                    path.unlink()

    def check_resumable(self) -> None:
        """Raise `RunError` for a bad record, and if the checkpoint is gone and what was finished is not.

        Going on would begin again, and write over it. A run that has finished nothing may begin again.
        """
        self.read_record()
        last = self.checkpoint("last")
        there = any(self.checkpoint(which).is_file() for which in ("last", "previous"))
        if self.finished and not there:
            names = ", ".join(self.finished)
            raise RunError(
                f"{last}: no such checkpoint, but there are {names}; to go on would be to "
                f"begin again and write over them. Put {last.name} back; or train anew, in a directory "
                f"of its own: {command('run', self.recipe)}"
            )

    def check_log(self, epochs: int, used: Path) -> None:
        """Raise `RunError` unless the log fits the checkpoint `used`, after so many epochs.

        It has a line for each of them, and at most one more: of an epoch that was logged when the run
        was killed, and did not count yet; and one more if the checkpoint is the one before the last.
        Going on drops what is beyond.
        """
        lines = read_rows(self.metrics)
        numbers = epochs_of(lines)
        steps = [b - a for a, b in zip([0, *numbers], numbers, strict=False)]
        twice = any(a and b and a.get("epoch", 0) == b.get("epoch") for a, b in pairwise(lines))
        logged = self.epochs_logged
        most = epochs + (not self.tested) + (used != self.checkpoint("last"))
        if twice or not {*steps} <= {0, 1} or not epochs <= logged <= most:
            count = sum(row is None or "epoch" in row for row in lines)
            raise RunError(
                f"{self.metrics}: {count} epochs are logged{' and a test' * self.tested}, but "
                f"{used.name} was written after {epochs}; to go on would lose lines. "
                "Put the two files back as they were at one time; or train anew, in a directory of its "
                f"own: {command('run', self.recipe)}"
            )
        if damaged := [str(number) for number, row in enumerate(lines, 1) if row is None]:
            _log.warning("%s: damaged, and left out: line %s", self.metrics, ", ".join(damaged))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: one process at a time trains in it.

        The lock is the operating system's, on the open file `.lock`, and ends with the process that
        holds it, in whatever way that ends; the file alone locks nothing. It is `flock` (across
        machines where the file system has it), and on Windows a locked byte, for which nobody else can
        read who holds it. A file system without locks is reported in the log, and nothing is locked.

        Raises `RunError`, naming process and machine, while another holds it.

        Law: of two that enter at once, in any processes or threads, one raises.
        """
        path = self.path / ".lock"
        try:
            options = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(path, options, 0o666), "r+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: cannot be opened ({error.strerror})") from error
        with file:  # closing it ends the lock
            if not _lock(file.fileno(), path):
                holder = ""
                with suppress(OSError):
                    holder = file.read(200).strip()
                raise RunError(
                    f"{self.path}: {holder or 'another process'} is training this run, and two at once "
                    "would write over each other's work; wait until it has ended, or stop it first"
                )
            with writing(path):
                for leftover in self.path.glob(f".*{PARTIAL}"):  # of a process that was killed
                    leftover.unlink()
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    @property
    def epochs_logged(self) -> int:
        """The last epoch in the log, a damaged line being taken for one."""
        return max(epochs_of(read_rows(self.metrics)), default=0)

    @property
    def tested(self) -> bool:
        """True once the log is complete: the test is its last line."""
        return bool(lines := read_rows(self.metrics)) and "test" in (lines[-1] or {})

    def read_metrics(self) -> list[dict[str, Any]]:
        """The complete lines of `metrics.jsonl`, except for damaged ones."""
        return [row for row in read_rows(self.metrics) if row is not None]

    def read_record(self) -> dict[str, Any]:
        """The content of `run.json`. Raises `RunError` if it is none."""
        if not self.record.is_file():
            raise RunError(f"{self.record}: no such file; metablocks run writes one")
        try:
            record = _RECORD.validate_python(json.loads(self.record.read_bytes()))
        except OSError as error:
            raise RunError(f"{self.record}: not readable ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            reason = wrong_place(error) if isinstance(error, ValidationError) else first_line(error)
            raise RunError(
                f"{self.record}: not the record of a run, as metablocks run writes one ({reason})"
            ) from error
        return {"resumed": [], **record}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace `run.json`."""
        write_text(self.record, f"{json.dumps(record, indent=1)}\n")

    def keep_epochs(self, epochs: int) -> None:
        """Drop log lines beyond a number of epochs: what a killed run did after its checkpoint."""
        for path in (self.metrics, self.times):
            whole = zip(whole_lines(path), epochs_of(read_rows(path)), strict=True)
            kept = b"".join(line + b"\n" for line, epoch in whole if epoch <= epochs)
            if path.exists() and not path.is_file():
                raise RunError(f"{path}: not a file; take it away, and what was in it is lost")
            if path.exists() and path.read_bytes() != kept:
                write_bytes(path, kept)

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Add a line to a log."""
        with writing(path):
            new = not path.exists()
            with open_to_append(path) as file:
                file.write(json_line(row))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path)

    def _members(self) -> list[Path]:
        numbered = re.compile(r"epoch-[0-9]+\.pt")  # and not a copy that a user keeps beside them
        return sorted(
            path for path in self.path.glob("epoch-*.pt") if numbered.fullmatch(path.name)
        )


def wrong_place(error: ValidationError) -> str:
    """The first value that is not what it should be, and why."""
    wrong = error.errors()[0]
    return one_line("".join(f"{part}: " for part in wrong["loc"]) + wrong["msg"])


def create(out: Path, name: str) -> RunDirectory:
    """A new directory `out/<name>-<time>`, never one that exists.

    Raises `RunError` where it cannot be made.
    """
    stem = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    endings = chain([""], (f"-{attempt}" for attempt in count(2)))
    while True:
        path = out / f"{stem}-{stamp}{next(endings)}"
        with writing(path):
            out.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.mkdir()
                sync_folder(out)
                return RunDirectory(path)


def environment(device: torch.device) -> dict[str, Any]:
    """Code, versions and machine: all that a result may depend on besides the recipe."""
    from metablocks import __version__

    return {
        "commit": _commit(),
        "versions": {
            "metablocks": __version__,
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
    name = getattr(torch.get_device_module(device.type), "get_device_name", None)  # mps has none
    return f"{device} ({name(device)})" if name else str(device)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file without waiting; False while another has locked it."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        _log.warning(
            "%s: this file system has no locks (%s); do not train this run twice at once",
            path,
            error.strerror,
        )
        return True
