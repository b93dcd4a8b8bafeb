"""What a run has finished is not written over: not without its checkpoint, and not by two at once."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from small_runs import SMALL, finish, only_run

from metablocks.cli import main
from metablocks.errors import RunError
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.files import write_text
from metablocks.runs.tensorboard import curves
from tools.fuzzing.resume_law import same_checkpoint

FEW = [
    *SMALL,
    *("--set", "outer.epochs=4"),
    *("--set", "outer.steps_per_epoch=2"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.ensemble=2"),
    "--quiet",
]
STOPS = """
import os, signal, sys
from metablocks.cli import main
from metablocks.runs.directory import RunDirectory

keep, calls = RunDirectory.keep_members, []

def keep_and_stop(directory, epochs):
    keep(directory, epochs)
    calls.append(epochs)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)

RunDirectory.keep_members = keep_and_stop
sys.exit(main(sys.argv[1:]))
"""


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def start_and_stop(*arguments: str) -> "subprocess.Popen[str]":
    """A process that trains, and that stops itself (SIGSTOP) in the middle; it has when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS, "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process


def assert_same_run(run: Path, other: Path) -> None:
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert sorted(contents(run)) == sorted(contents(other))
    for path in other.glob("*.pt"):
        same_checkpoint(run / path.name, path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", *FEW, "--out", str(out)]) == 0
    return only_run(out)


@pytest.fixture
def run(undisturbed, tmp_path):
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def only(run: Path, *names: str) -> None:
    for path in run.iterdir():
        if path.name not in ("recipe.yaml", "run.json", *names):
            path.unlink()


@pytest.mark.parametrize(
    "left", ["all", "metrics.jsonl", "times.jsonl", "best.pt", "epoch-*.pt", "training.png"]
)
def test_without_its_checkpoint_what_is_finished_stays_as_it_is(left, run, capsys):
    if left == "all":
        for name in ("checkpoint.pt", "previous.pt"):
            (run / name).unlink()
    else:
        only(run, *(path.name for path in run.glob(left)))
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"{run}/checkpoint.pt: no such checkpoint, but there are ")
    for path in run.glob("*" if left == "all" else left):
        if path.name not in ("recipe.yaml", "run.json", ".lock", "log.txt"):
            assert path.name in message
    assert f"train anew, in a directory of its own: metablocks run {run}/recipe.yaml" in message
    assert contents(run) == before


def test_a_run_that_has_finished_nothing_may_begin_again(run, undisturbed):
    only(run)
    (run / "metrics.jsonl").write_text('{"epoch": 1, "st')  # nothing but half a line
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert_same_run(run, undisturbed)


def test_a_run_killed_before_its_first_epoch_counts_goes_on(undisturbed, tmp_path, monkeypatch):
    """Its log has a line then, and it has a best checkpoint."""
    save = checkpoint.save

    def save_or_die(path, experiment, state, **options):
        if path.name == "checkpoint.pt" and state.epochs == 1:
            raise KeyboardInterrupt
        save(path, experiment, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_or_die)
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 130
    run = only_run(tmp_path)
    assert {"best.pt", "epoch-1.pt", "metrics.jsonl"} <= contents(run).keys()
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (slice(0, 3), "3 epochs are logged, but checkpoint.pt was written after 4"),
        (slice(1, 4), "3 epochs are logged, but checkpoint.pt was written after 4"),
        (slice(0, 0), "0 epochs are logged, but checkpoint.pt was written after 4"),
    ],
)
def test_a_log_that_lacks_epochs_is_not_gone_on_with(kept, message, run, capsys):
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[kept]))
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    assert f"{log}: {message}" in capsys.readouterr().err
    assert contents(run) == before


def test_nor_is_one_that_has_an_epoch_twice(run, capsys):
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], *lines]))
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    assert "5 epochs are logged and a test, but checkpoint.pt was" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("tested", [True, False])
def test_an_older_checkpoint_does_not_undo_epochs(tested, run, capsys):
    """`best.pt` and `epoch-<n>.pt` are whole checkpoints, too."""
    older = min(run.glob("epoch-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))
    epoch = int(older.stem.partition("-")[2])
    assert epoch < 4
    older.replace(run / "checkpoint.pt")
    log = run / "metrics.jsonl"
    if not tested:
        row = {**json.loads(log.read_text().splitlines()[3]), "epoch": 5}
        lines = log.read_text().splitlines(keepends=True)[:4]
        log.write_text("".join([*lines, f"{json.dumps(row)}\n"]))
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    message = f"{4 + (not tested)} epochs are logged{' and a test' * tested}, but checkpoint.pt was"
    assert f"{log}: {message} written after {epoch}" in capsys.readouterr().err
    assert contents(run) == before


def test_a_finished_run_keeps_its_log_whatever_it_would_score_now(run):
    log = run / "metrics.jsonl"
    *lines, last = log.read_text().splitlines()
    row = json.loads(last)
    row["test"]["mean"][-1] = 0.125  # on another machine
    log.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(row)]))
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    after = contents(run)
    for name in before.keys() - {"adaptation.png", "log.txt"}:  # drawn by the log; printed again
        assert after[name] == before[name], name
    assert after["log.txt"].startswith(before["log.txt"])


def test_only_its_own_members_are_deleted(run):
    for name in ("epoch-1-kept.pt", "epoch-best.pt"):
        (run / name).write_text("the user's")
    RunDirectory(run).keep_members([])
    assert sorted(path.name for path in run.glob("epoch-*")) == ["epoch-1-kept.pt", "epoch-best.pt"]


def test_what_is_written_follows_no_link_out_of_the_run(tmp_path):
    """A run from somebody else may hold links to files of the user's."""
    mine = tmp_path / "mine.txt"
    mine.write_text("the user's")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.partial").symlink_to(mine)
    (run / ".lock").symlink_to(mine)
    write_text(run / "run.json", "{}")
    assert (run / "run.json").read_text() == "{}"
    with pytest.raises(RunError, match=r"\.lock: cannot be opened"), RunDirectory(run).locked():
        pass
    assert mine.read_text() == "the user's"


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *product(["log.txt", "evaluations.jsonl"], [os.mkfifo, Path.mkdir, "a link"]),
        ("tensorboard", "a link"),
    ],
)
def test_nor_does_what_is_appended_and_no_pipe_is_waited_for(name, make, run, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir() if name == "tensorboard" else mine.write_text("the user's")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine) if make == "a link" else make(run / name)
    if name == "evaluations.jsonl":
        assert main(["eval", str(run), "--tasks", "1"]) == 0
        printed = capsys.readouterr().out
        assert f"not saved: {run / name}: cannot be written (a link, pipe or folder" in printed
    elif name == "log.txt":
        assert main(["run", "--resume", str(run), "--quiet"]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"{run / name}: cannot be written (a link, pipe or folder, not a file); it lacks the rest"
        )
    else:
        with pytest.raises(RunError, match="tensorboard: cannot be written"), curves(run / name, 0):
            pass
    assert not any(mine.iterdir()) if mine.is_dir() else mine.read_text() == "the user's"


def test_a_second_process_is_refused_and_the_lock_of_a_killed_one_is_gone(
    undisturbed, tmp_path, capsys
):
    first = start_and_stop(*FEW, "--out", str(tmp_path))
    run = only_run(tmp_path)
    before = contents(run)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    holder = f"process {first.pid} on {socket.gethostname()}"
    assert capsys.readouterr().err.startswith(f"{run}: {holder} is training this run, and two at")
    assert contents(run) == before
    first.kill()
    finish(first)
    assert (run / ".lock").read_text()  # says who held it, and locks nothing
    resumed = start_and_stop("--resume", str(run), "--quiet")
    with pytest.raises(RunError, match=f"process {resumed.pid} on "), RunDirectory(run).locked():
        pass
    resumed.send_signal(signal.SIGCONT)  # the refused did it no harm
    status, _, stderr = finish(resumed)
    assert status == 0, stderr
    assert_same_run(run, undisturbed)


def test_of_two_in_one_process_one_is_refused(run):
    directory = RunDirectory(run)
    for _ in range(2):
        with (
            directory.locked(),
            pytest.raises(RunError, match=f"process {os.getpid()} on "),
            directory.locked(),
        ):
            pass
    assert (run / ".lock").read_text() == ""


def test_a_file_system_without_locks_is_reported_and_trained_on(run, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err
