"""A run while it trains: a bar on a terminal, whole lines elsewhere, and all lines in `log.txt`."""

import io
import sys

import pytest
from small_runs import only_run

from metablocks.cli import main

TINY = [
    "maml_sinusoid",
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "outer.steps_per_epoch=2"),
    *("--set", "outer.epochs=3"),
    *("--set", "evaluation.tasks=4"),
    *("--set", "evaluation.every=2"),
    *("--set", "hardware.device=cpu"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("metablocks.runs.plots.draw", lambda directory: [])


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_without_a_terminal_there_are_whole_lines_and_the_log_has_them(quiet, tmp_path, capsys):
    assert main(["run", *TINY, *quiet, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = [line for line in printed.out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert ["validation mse" in line for line in lines] == [False, True, True]
    assert all("loss " in line and " tasks/s, " in line for line in lines)
    log = only_run(tmp_path) / "log.txt"
    assert log.read_text() == printed.out
    assert main(["run", "--resume", str(log.parent)]) == 0
    assert log.read_text() == printed.out + capsys.readouterr().out


@pytest.mark.parametrize("quiet", [False, True])
def test_on_a_terminal_a_bar_tells_loss_score_and_speed(quiet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["run", *TINY, *["--quiet"] * quiet, "--out", str(tmp_path)]) == 0
    bar = sys.stderr.getvalue()
    assert bool(bar) != quiet
    if not quiet:
        last = bar.split("\r")[-1]
        assert "12/12" in last
        assert "loss=" in last
        assert "validation mse=" in last
    assert capsys.readouterr().out.count("epoch ") >= 3
