"""Runs that are killed at any moment go on, and end as those that never were."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import FEW, only_run

from metablocks.cli import main
from metablocks.runs.directory import RunDirectory
from tools.fuzzing.resume_law import same_checkpoint


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.long)])
def test_kills_change_nothing(kills, tmp_path):
    """SIGKILL in meta-steps, validation, logs and checkpoints; the hundred also anywhere."""
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    _, epochs, statuses = zip(*json.loads(done.stdout), strict=True)
    assert statuses == (-signal.SIGKILL,) * kills + (0,), done.stderr
    assert epochs[0] == 1
    last = 6 + 3 * kills // 10
    run, whole = only_run(tmp_path / "killed"), only_run(tmp_path / "whole")
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    times = [json.loads(line)["epoch"] for line in (run / "times.jsonl").read_text().splitlines()]
    assert times == list(range(1, last + 1))
    assert sorted(path.name for path in run.iterdir()) == sorted(p.name for p in whole.iterdir())
    before = torch.load(run / "previous.pt", weights_only=True)["state"]
    assert (before["epochs"], before["step"]) == (last - 1, 3 * last)  # within an epoch, by time
    for name in ("checkpoint.pt", "best.pt", *(path.name for path in whole.glob("epoch-*.pt"))):
        same_checkpoint(run / name, whole / name)


@pytest.mark.usefixtures("without_plots")
def test_a_signal_while_the_last_epoch_is_logged_is_not_lost(
    undisturbed, tmp_path, monkeypatch, capsys
):
    append = RunDirectory.append

    def append_and_stop(directory, path, row):
        append(directory, path, row)
        if row.get("epoch") == 3 and path.name == "metrics.jsonl":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", append_and_stop)
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 130
    assert "stopped before the test; everything is saved" in capsys.readouterr().out
    run = only_run(tmp_path)
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
