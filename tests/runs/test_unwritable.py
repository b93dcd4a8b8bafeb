"""What cannot be written ends a run in one line with place and remedy, and harms nothing saved."""

import errno
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import FEW, only_run

from metablocks.cli import main
from metablocks.errors import DataError, RunError
from metablocks.learner import MetaLearner
from metablocks.runs import checkpoint, directory, log, sealed
from metablocks.runs.directory import RunDirectory
from metablocks.runs.files import write_atomically, write_text
from metablocks.runs.sealed import write_sealed
from metablocks.tasks import Sinusoid
from tools.fuzzing.resume_law import same_checkpoint

pytestmark = pytest.mark.usefixtures("without_plots")


@contextmanager
def failing(monkeypatch, after, number):
    """No room, or no permission, from the `after`-th file on that is made safe."""
    calls, fsync = [], os.fsync

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("after", "number", "remedy"),
    [  # in the first epoch, between two, in the last
        (12, errno.ENOSPC, "(No space left on device); free some space there. What was saved"),
        (
            17,
            errno.EROFS,
            "(Read-only file system); make the folder writable, or give --out another.",
        ),
        (21, errno.EIO, "(Input/output error); --out takes a folder that can be written to."),
    ],
)
def test_a_disk_that_fails_loses_nothing_that_was_saved(
    after, number, remedy, undisturbed, tmp_path, monkeypatch, capsys
):
    with failing(monkeypatch, after, number):
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    run = only_run(tmp_path)
    line = one_line(capsys)
    assert line.startswith(f"{run}/")
    assert remedy in line
    assert not list(run.glob(".*.partial"))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["state"]["epochs"] < 3
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    same_checkpoint(run / "checkpoint.pt", undisturbed / "checkpoint.pt")


ALLOCATOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")
LACKING = [  # in one run, each when it goes on: what fails, at which call, and what is not written then
    (torch, "save", 2, MemoryError(), "best.pt"),
    (sealed._Summing, "write", 250, MemoryError(), "checkpoint.pt"),
    (torch, "save", 2, ALLOCATOR, "checkpoint.pt"),
    (checkpoint, "_random_states", 3, torch.OutOfMemoryError("out of memory"), "checkpoint.pt"),
    (directory, "json_line", 1, MemoryError(), "metrics.jsonl"),
    (directory, "json_line", 2, MemoryError(), "times.jsonl"),
    (np, "savez_compressed", 1, MemoryError(), "test.npz"),
]


@contextmanager
def raising(monkeypatch, owner, name, number, error):
    """An error in the place of the `number`-th call of a function."""
    function, calls = getattr(owner, name), []

    def fail(*args, **options):
        calls.append(name)
        if len(calls) == number:
            raise error
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


def test_nor_does_a_lack_of_memory(undisturbed, tmp_path, monkeypatch, capsys):
    arguments = [*FEW, "--out", str(tmp_path)]
    for *failure, file in LACKING:
        with raising(monkeypatch, *failure):
            assert main(["run", *arguments]) == 1
        run = only_run(tmp_path)
        assert one_line(capsys) == (
            f"{run / file}: cannot be written (out of memory); free some memory on this machine. What "
            "was saved before is as it was"
        )
        assert not list(run.glob(".*.partial"))
        arguments = ["--resume", str(run), "--quiet"]
    assert main(["run", *arguments]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    same_checkpoint(run / "checkpoint.pt", undisturbed / "checkpoint.pt")


def test_an_evaluation_is_printed_even_if_it_cannot_be_saved(run, monkeypatch, capsys):
    with raising(monkeypatch, directory, "json_line", 1, MemoryError()):
        assert main(["eval", str(run), "--tasks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "test, 2 tasks: mean" in printed
    assert f"not saved: {run / 'evaluations.jsonl'}: cannot be written (out of memory)" in printed


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(run, monkeypatch, capsys):
    def full(path):
        return Path("/dev/full").open("ab")

    monkeypatch.setattr(log, "open_to_append", full)
    assert main(["run", "--resume", str(run), "--set", "outer.epochs=4", "--quiet"]) == 0
    line = one_line(capsys)
    assert line.endswith("log.txt: cannot be written (No space left on device); it lacks the rest")


@pytest.mark.parametrize("name", ["a file", "a link to nowhere"])
def test_a_folder_of_runs_that_is_none_is_named(name, tmp_path, capsys):
    out = tmp_path / name
    out.touch() if name == "a file" else out.symlink_to("nowhere")
    for folder in (out, out / "below"):
        assert main(["run", *FEW, "--out", str(folder)]) == 1
        assert "; --out takes a folder that can be written to. " in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [MemoryError(), ALLOCATOR], ids=type)
def test_a_lack_of_memory_in_training_is_one_line(error, tmp_path, monkeypatch, capsys):
    with raising(monkeypatch, MetaLearner, "backward", 3, error):
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    assert one_line(capsys).startswith("out of memory (")
    assert main(["run", "--resume", str(only_run(tmp_path)), "--quiet"]) == 0


def test_a_run_that_cannot_write_its_first_files_leaves_no_directory(tmp_path, monkeypatch, capsys):
    with failing(monkeypatch, 3, errno.ENOSPC):
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    assert "free some space" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_is_deleted_under_way_is_named(tmp_path, monkeypatch, capsys):
    append = RunDirectory.append

    def delete_and_append(directory, *args):
        shutil.rmtree(directory.path)
        append(directory, *args)

    monkeypatch.setattr(RunDirectory, "append", delete_and_append)
    assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    line = one_line(capsys)
    assert (
        "metrics.jsonl: cannot be written (No such file or directory); the folder was moved" in line
    )


def test_a_path_that_is_too_long_is_named(tmp_path, capsys):
    out = tmp_path / ("long" * 70)
    assert main(["run", *FEW, "--out", str(out)]) == 1
    assert "(File name too long); --out takes a folder with a shorter path" in one_line(capsys)


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    """At whatever byte it strikes: torch has words of its own for what a failed write leaves."""
    path = tmp_path / "checkpoint.pt"
    content = {"format": checkpoint.FORMAT, "weights": [torch.zeros(9) for _ in range(9)]}
    write_atomically(path, lambda file: write_sealed(file, content))
    length = path.stat().st_size
    path.write_text("the one before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(100, length, length // 7):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(RunError, match=r"checkpoint\.pt: cannot be .*\(ulimit -f\)"):
                write_atomically(path, lambda file: write_sealed(file, content))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert path.read_text() == "the one before"


def test_two_processes_share_no_file_name_and_the_leftovers_of_the_dead_are_cleared(tmp_path):
    names = []
    for _ in range(2):
        write = lambda file: names.append(Path(file.name).name)  # noqa: E731
        write_atomically(tmp_path / "run.json", write)
    for name in names:
        assert re.fullmatch(rf"\.run\.json\.{os.getpid()}-[0-9a-f]{{8}}\.partial", name)
    assert names[0] != names[1]
    (tmp_path / names[0]).write_text("of a process that was killed")
    (tmp_path / ".mine").write_text("the user's")
    with RunDirectory(tmp_path).locked():
        write_text(tmp_path / "run.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine", "run.json"]


def test_folders_are_synced_after_their_files(tmp_path, monkeypatch):
    """A name, too, outlives a loss of power: the folder is synced once it is in it."""
    synced, fsync = [], os.fsync

    def record(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.is_dir(), sorted(each.name for each in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", record)
    write_text(tmp_path / "run.json", "{}")
    RunDirectory(tmp_path).append(tmp_path / "metrics.jsonl", {"epoch": 1})
    (first, _), named, log, both = synced
    assert not first
    assert named == (True, ["run.json"])
    assert (log[0], both) == (False, (True, ["metrics.jsonl", "run.json"]))


def test_a_run_that_fails_for_its_data_leaves_no_directory(tmp_path, monkeypatch, capsys):
    def sample(self, split, indices):
        raise DataError("cat/1.png: not an image")

    monkeypatch.setattr(Sinusoid, "sample", sample)
    assert main(["run", *FEW, "--out", str(tmp_path / "runs")]) == 2
    assert one_line(capsys) == "cat/1.png: not an image"
    assert not (tmp_path / "runs").exists()


def test_a_first_checkpoint_that_is_damaged_is_begun_again(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(undisturbed / name, run / name)
    (run / "checkpoint.pt").write_bytes(b"PK")
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert one_line(capsys).endswith("nothing was finished, and the run begins again")
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
