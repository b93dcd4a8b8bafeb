"""Files of a run that somebody else made: whatever they hold, a command says in a line what is wrong.

Nothing of them reaches a terminal or a page as more than text.
"""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import FEW, only_run

from metablocks.cli import main
from metablocks.errors import RunError, quoted
from metablocks.runs.directory import RunDirectory
from metablocks.runs.examples import read_test
from metablocks.runs.finished import read_run
from metablocks.runs.sealed import write_sealed

pytestmark = pytest.mark.usefixtures("without_plots")
RED = "\x1b[31mred\n  metablocks evil"


@pytest.fixture
def report(run, undisturbed, tmp_path, monkeypatch, capsys):
    """The command, given the run and a twin of another seed: its exit status, and what it printed."""
    twin = Path(shutil.copytree(undisturbed, tmp_path / "twin"))
    recipe = (twin / "recipe.yaml").read_text()
    (twin / "recipe.yaml").write_text(recipe.replace("\nseed: 0\n", "\nseed: 1\n"))
    monkeypatch.setattr("metablocks.runs.drawing.save", lambda *arguments: None)
    monkeypatch.setattr("metablocks.report.commands.library", lambda: "")

    def report() -> tuple[int, str]:
        status = main(["report", str(run), str(twin), "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        assert printed.err.count("\n") == (status != 0), printed.err
        return status, printed.err

    assert report() == (0, "")
    return report


def changed(value, path, new):
    """A copy of JSON with another value at a path of keys."""
    if not path:
        return new
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(value[key] if rest else None, rest, new)
    return copy


RECORD = [
    ("device",),
    ("versions",),
    ("versions", "torch"),
    ("source",),
    ("origins",),
    ("platform",),
]
RECORD += [("data", "checksum"), ("commit",), ("threads",)]
VALUES = [5, "x", [], {}, [[1]], {"a": {"b": None}}, RED, "\ud800"]


@pytest.mark.parametrize("path", RECORD, ids=".".join)
def test_a_record_of_other_values(path, run, report):
    record = json.loads((run / "run.json").read_text())
    for value in VALUES:
        (run / "run.json").write_text(json.dumps(changed(record, path, value)))
        status, message = report()
        if status:
            assert message.startswith(f"{run}/run.json: not the record of a run"), value


TEST = ["tasks", "measure", "mean", "interval", "std", "worst_decile", "loss", "by_task"]
ROWS = [(0, "step"), (0, "train_loss"), (0, "validation"), (0, "validation", "mean"), (0, "lr")]
ROWS += [(-1, "test"), *((-1, "test", name) for name in TEST), (-1, "test", "other")]


@pytest.mark.parametrize("path", ROWS, ids=str)
def test_a_log_of_other_values(path, run, report):
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for value in [*VALUES, None, -1, 10**30, [None], [1.0]]:
        log.write_text("".join(f"{json.dumps(row)}\n" for row in changed(rows, path, value)))
        status, message = report()
        if status:
            assert message.startswith(f"{run}: lacks numbers that are compared (") or not value


@pytest.mark.parametrize(
    "path",
    [("name",), ("seed",), ("tasks",), ("inner",), ("inner", "batches"), ("outer", "epochs")],
)
def test_a_recipe_of_other_values(path, run, report):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    for value in ([], {}, [[1]], "x", -1):
        (run / "recipe.yaml").write_text(yaml.safe_dump(changed(values, path, value)))
        status, message = report()
        assert (status == 2) == ("lacks numbers that are compared" in message), value


def saved(path, arrays):
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def test_arrays_of_other_kinds_are_said_in_a_line(run, report, tmp_path):
    with np.load(run / "test.npz") as stored:
        arrays = dict(stored)
    scripts = np.full(4, "<script>alert(1)</script>")
    for name in [key for key in arrays if not key.startswith("example/1")]:
        for other in (np.zeros(0), np.zeros((2, 2, 2)), scripts, np.array(5), np.zeros(3, "M8[s]")):
            saved(run / "test.npz", {**arrays, name: other})
            status, message = report()
            assert status in (0, 1), message
    for page in (tmp_path / "out").glob("*/report.html"):
        assert "<script>alert" not in page.read_text()


@pytest.mark.parametrize("name", ["an array", "no zip", "an object", "two kinds", "too large"])
def test_a_file_of_arrays_that_is_none(name, tmp_path):
    path = tmp_path / "test.npz"
    if name == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif name == "no zip":
        path.write_bytes(b"PK" * 50)
    elif name == "an object":
        with path.open("wb") as file:
            np.savez(file, scores=np.array([Path()], dtype=object))
    elif name == "two kinds":
        saved(path, {"scores": np.zeros(1), "scores/a": np.zeros(1)})
    else:
        saved(path, {"scores": np.zeros(2**28 // 8)})
    with pytest.raises(RunError, match=r"test\.npz: not readable: "):
        read_test(path)


@pytest.mark.parametrize(
    "counters",
    [{"step": 10**6}, {"step": -1}, {"epochs": -1}, {"epochs": 1}, {"step": 0, "epochs": 3}],
    ids=str,
)
def test_counters_that_no_training_reaches_are_refused(counters, run, capsys):
    """By replay too, which would look for the end of an epoch for ever."""
    for path in run.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        content["state"] |= counters
        with path.open("wb") as file:
            write_sealed(file, content)
    for command in (["run", "--resume", str(run)], ["replay", str(run), "--step", "6"]):
        main(command)
        message = capsys.readouterr().err
        if command[0] == "run":
            assert "a whole checkpoint that does not fit this recipe: state: " in message
            assert message.count("\n") == 1


def test_what_a_checkpoint_says_of_itself_does_not_garble_a_terminal(run, capsys):
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    for change in (
        {"format": RED},
        {"recipe": RED},
        {"recipe": {**content["recipe"], "name": RED, RED: RED}},
        {"learner": {**content["learner"], RED: torch.zeros(1)}},
    ):
        with (run / "checkpoint.pt").open("wb") as file:
            write_sealed(file, {**content, **change})
        assert main(["eval", str(run), "--checkpoint", "last"]) == 1
        message = capsys.readouterr().err
        assert "\x1b" not in message
        assert "metablocks evil" in message or "format" in change or "recipe" in change


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31m", "\udcff\udcfe", "a 'b", "é"])
def test_a_folder_of_any_name(name, tmp_path, capsys):
    """Its commands are one line each, and lead a shell back to it."""
    out = tmp_path / name
    assert main(["run", *FEW, "--out", str(out)]) == 0
    run, printed = only_run(out), capsys.readouterr()
    assert printed.err == ""
    for command in (["eval", str(run)], ["run", "--resume", str(run), "--quiet"]):
        assert main(command) == 0
    assert read_run(run).path == run
    (line,) = (line for line in printed.out.splitlines() if line.startswith("  metablocks eval "))
    word = line.removeprefix("  metablocks eval ").partition(" --steps")[0]
    assert word.isprintable()
    shown = subprocess.run(["bash", "-c", f"ls -d -- {word}"], capture_output=True, check=True)
    assert shown.stdout.rstrip(b"\n") == bytes(run)
    assert word == (quoted(run) if not str(run).isprintable() else shlex.quote(str(run)))


def test_a_path_that_begins_with_a_dash_is_no_option_in_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *FEW, "--out=./-x"]) == 0
    printed = capsys.readouterr().out
    assert f"  metablocks eval {tmp_path}/-x/" in printed
    run = only_run(tmp_path / "-x")
    assert main(["eval", "--", f"-x/{run.name}"]) == 0
    (run / "metrics.jsonl").unlink()
    assert main(["compare", "--", f"-x/{run.name}"]) == 2
    assert f"metablocks run --resume {run} goes on with it" in capsys.readouterr().err


def test_without_a_best_checkpoint_the_last_one_is_pointed_to(run, capsys):
    (run / "best.pt").unlink()
    assert main(["eval", str(run)]) == 1
    message = capsys.readouterr().err
    words = f"metablocks eval {run} --checkpoint last"
    assert message.startswith(f"{run}/best.pt: no such checkpoint, as before a first validation; ")
    assert f"the last is there: {words}, " in message


def test_a_line_of_a_log_that_is_a_test_and_an_epoch_is_damaged(run, capsys):
    log = run / "metrics.jsonl"
    *lines, test = log.read_text().splitlines()
    row = {**json.loads(test), "epoch": "last"}
    log.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(row)]))
    assert RunDirectory(run).epochs_logged == 4
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert "damaged, and left out: line 4" in capsys.readouterr().err


def test_an_older_run_without_a_ranking_has_a_summary(run, capsys):
    for name in ("checkpoint.pt", "previous.pt"):
        content = torch.load(run / name, weights_only=True)
        del content["state"]["ranking"]
        with (run / name).open("wb") as file:
            write_sealed(file, content)
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert "best of 3 epochs by validation" in capsys.readouterr().out
