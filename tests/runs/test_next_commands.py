"""The commands that a run prints can be given as they stand, from the folder they were printed in."""

import shlex
import sys

import pytest
from small_runs import SMALL, only_run

from metablocks.cli import main
from metablocks.runs import Stopped

OUTSIDE = """
from metablocks.rules import LearningRate

class Halved(LearningRate):
    def __init__(self):
        super().__init__(0.005)
"""
TINY = [
    *SMALL,
    *("--set", "outer.epochs=1"),
    *("--set", "outer.steps_per_epoch=1"),
    *("--set", "inner.rule=[{block: beside_the_run:Halved}]"),
    *("--allow", "beside_the_run"),
    *("--device", "cpu"),
    "--quiet",
]


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A working folder with a space in its name, and a package that lies in it."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "beside_the_run.py").write_text(OUTSIDE)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(folder))])
    return folder


def forget():
    """As a new process: the package is neither loaded nor to be found."""
    sys.modules.pop("beside_the_run", None)
    sys.path[:] = [path for path in sys.path if not path.endswith("my work")]


def commands(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("  metablocks ")]
    return [shlex.split(line.split("    ")[0])[1:] for line in lines]


def test_what_a_run_says_to_try_next_can_be_done(beside, capsys):
    assert main(["run", *TINY, "--out", str(beside / "runs")]) == 0
    evaluate, other, recipes = commands(capsys.readouterr().out)
    assert evaluate[:2] == ["eval", str(only_run(beside / "runs"))]
    for command in (evaluate, [*other, "--quiet"], recipes):
        forget()
        assert main(command) == 0, capsys.readouterr().err
    assert len(list((beside / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("where", "how", "said"),
    [("train", Stopped, "after meta-step 0"), ("_test", KeyboardInterrupt, "before the test")],
)
def test_a_stopped_run_says_all_that_it_needs_to_go_on(
    where, how, said, beside, capsys, monkeypatch
):
    def stop(*_, **__):
        raise how

    with monkeypatch.context() as patch:
        patch.setattr(f"metablocks.runs.commands.{where}", stop)
        assert main(["run", *TINY, "--out", str(beside / "runs")]) == 130
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"stopped {said}; everything is saved. To go on: metablocks run")
    forget()
    assert main([*shlex.split(line.partition("metablocks ")[2]), "--quiet"]) == 0


@pytest.mark.parametrize("record", ["[]", "{}", "half"])
def test_a_damaged_record_is_said_to_be_one(record, beside, capsys):
    assert main(["run", *TINY, "--out", str(beside / "runs")]) == 0
    run = only_run(beside / "runs")
    (run / "run.json").write_text(record)
    assert main(["eval", str(run)]) == 1
    assert f"{run / 'run.json'}: not" in capsys.readouterr().err
