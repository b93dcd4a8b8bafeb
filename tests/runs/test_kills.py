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


def test_ten_kills_change_nothing(tmp_path):
    """SIGKILL at ten moments, chosen by progress: in meta-steps, validation, logs and checkpoints."""
    script = Path(__file__).with_name("killed_runs.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * 10 + [0], ended.stderr
    run, whole = only_run(tmp_path / "killed"), only_run(tmp_path / "whole")
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    times = [json.loads(line)["epoch"] for line in (run / "times.jsonl").read_text().splitlines()]
    assert times == list(range(1, 10))
    assert sorted(path.name for path in run.iterdir()) == sorted(p.name for p in whole.iterdir())
    before = torch.load(run / "previous.pt", weights_only=True)["state"]
    assert (before["epochs"], before["step"]) == (8, 27)  # within an epoch, by time
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
