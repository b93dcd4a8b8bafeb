"""`--tensorboard` writes the curves of the logs, goes on with them, and says what it needs."""

import json
import sys
from types import SimpleNamespace

import pytest
from small_runs import FEW, only_run

from metablocks.cli import main


class Writer:
    """What `torch.utils.tensorboard.SummaryWriter` is given."""

    made: list["Writer"] = []  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.curves = folder, purge_step, {}
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        self.curves.setdefault(tag, []).append((step, value))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch, without_plots):
    monkeypatch.setattr(Writer, "made", [])
    package = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    return Writer.made


def test_the_curves_are_those_of_the_logs_and_go_on(made, tmp_path):
    assert main(["run", *FEW, "--out", str(tmp_path), "--tensorboard"]) == 0
    run = only_run(tmp_path)
    (writer,) = made
    assert (writer.folder, writer.purge_step) == (str(run / "tensorboard"), 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "epoch" in row]
    assert writer.curves["train/loss"] == [(row["step"], row["train_loss"]) for row in epochs]
    scores = [(row["step"], row["validation"]["mean"][-1]) for row in epochs]
    assert writer.curves["validation/mse"] == scores
    assert len(writer.curves["epoch/seconds"]) == 3
    assert writer.closed

    longer = ["--set", "outer.epochs=4", "--quiet"]
    assert main(["run", "--resume", str(run), *longer, "--tensorboard"]) == 0
    assert made[1].purge_step == 7
    assert [step for step, _ in made[1].curves["train/loss"]] == [8]


def test_without_the_package_it_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["run", *FEW, "--out", str(tmp_path / "runs"), "--tensorboard"]) == 1
    assert "pip install 'metablocks[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
