"""The directory of a run, `runs/<name>-<time>/`: what lies in it and how it is written.

    recipe.yaml     the resolved recipe, runnable as it is
    run.json        where, when and with what: recipe hash, commit, versions, device, argv, data, files
                    and hashes of code from outside, and why an executor was chosen, if it was
    metrics.jsonl   one line an epoch, then one for the test, with what is deployed where layers are
                    taken out for that (see `deployment`); nothing here depends on the clock
    evaluations.jsonl  one line for each `metablocks eval`
    times.jsonl     what each epoch cost: seconds, memory (see `usage`)
    checkpoint.pt   where training stands; best.pt: where validation was best
    epoch-<n>.pt    the best epochs by validation, where the recipe asks for an ensemble
    *.png           plots, where matplotlib is installed
    .lock           held by the process that trains here

A file is replaced in one go or only appended to, so that a killed run leaves nothing half-written
but at most the last line of a log, which `--resume` drops. `checkpoint.pt` is there before anything
else is finished, and what it does not count is at most one epoch.
"""

import errno
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metablocks.errors import RunError

_log = logging.getLogger(__name__)


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

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    def checkpoint(self, which: str) -> Path:
        """`last` is `checkpoint.pt`, `best` is `best.pt`."""
        return self.path / ("checkpoint.pt" if which == "last" else f"{which}.pt")

    def member(self, epoch: int) -> Path:
        """The checkpoint of an epoch that is kept for the ensemble."""
        return self.path / f"epoch-{epoch}.pt"

    def keep_members(self, epochs: Collection[int]) -> None:
        """Delete the checkpoints of all other epochs."""
        kept = {self.member(epoch) for epoch in epochs}
        for path in self._members():
            if path not in kept:
                path.unlink()

    def check_resumable(self) -> None:
        """Raise `RunError` where the checkpoint is gone and what was finished is not.

        Going on would begin again, and write over it. A run that has finished nothing may begin again.
        """
        last = self.checkpoint("last")
        logs = [path for path in (self.metrics, self.times) if _read_whole_lines(path)]
        files = [self.checkpoint("best"), *self._members(), *sorted(self.path.glob("*.png"))]
        finished = [path.name for path in [*logs, *files] if path.is_file()]
        if finished and not last.is_file():
            raise RunError(
                f"{last}: no such checkpoint, but there are {', '.join(finished)}; to go on would be to "
                f"begin again and write over them. Put {last.name} back; or train anew, in a directory "
                f"of its own: {self._train_anew()}"
            )

    def check_log(self, epochs: int) -> None:
        """Raise `RunError` unless the log fits a checkpoint after so many epochs.

        It has a line for each of them, and at most one more: of an epoch that was logged when the run
        was killed, and did not count yet. Going on drops what is beyond.
        """
        logged = [row["epoch"] for row in self.read_metrics() if "epoch" in row]
        most = epochs if self.tested else epochs + 1
        if logged != list(range(1, len(logged) + 1)) or not epochs <= len(logged) <= most:
            raise RunError(
                f"{self.metrics}: {len(logged)} epochs are logged{' and a test' * self.tested}, but "
                f"{self.checkpoint('last').name} was written after {epochs}; to go on would lose lines. "
                "Put the two files back as they were at one time; or train anew, in a directory of its "
                f"own: {self._train_anew()}"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: one process at a time trains in it.

        The lock is the operating system's, on the open file `.lock`, and ends with the process that
        holds it, in whatever way that ends; the file alone locks nothing. It is `flock` (across
        machines where the file system has it), and on Windows a locked byte. A file system without
        locks is reported in the log, and nothing is locked.

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
                holder = file.read(200).strip()
                raise RunError(
                    f"{self.path}: {holder or 'another process'} is training this run, and two at once "
                    "would write over each other's work; wait until it has ended, or stop it first"
                )
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    @property
    def tested(self) -> bool:
        """True once the log is complete: the test is its last line."""
        return any("test" in row for row in self.read_metrics())

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

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Add a line to a log."""
        with path.open("ab") as file:
            file.write(_jsonl([row]).encode())
            file.flush()
            os.fsync(file.fileno())

    def _members(self) -> list[Path]:
        numbered = re.compile(r"epoch-[0-9]+\.pt")  # and not a copy that a user keeps beside them
        return sorted(
            path for path in self.path.glob("epoch-*.pt") if numbered.fullmatch(path.name)
        )

    def _train_anew(self) -> str:
        return command("run", self.recipe)


def command(*words: object) -> str:
    """A command line to try: `metablocks` as it was typed (`tools/metablocks` says how), and the words.

    >>> command("run", "--resume", "runs/my run")
    "metablocks run --resume 'runs/my run'"
    """
    return shlex.join([os.environ.get("METABLOCKS_COMMAND") or "metablocks", *map(str, words)])


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
    partial.unlink(
        missing_ok=True
    )  # of a killed process, or a link to where nothing is to be written
    with partial.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go."""
    write_atomically(path, lambda file: file.write(text.encode()))


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
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # far from the text: nobody else can read it
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        _log.warning(
            "%s: this file system has no locks (%s); do not train this run twice at once",
            path,
            error.strerror,
        )
    return True


def _read_whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read_whole_lines(path)]


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
