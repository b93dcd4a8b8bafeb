"""Logs and records that are damaged, deleted or of other types end in a line, or do not matter."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from small_runs import FEW, only_run

from metablocks.cli import main
from metablocks.runs import Scores, scores
from metablocks.runs.directory import RunDirectory
from metablocks.runs.finished import read_run


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plots" not in request.node.name:
        monkeypatch.setattr("metablocks.runs.plots.draw", lambda directory: [])


def resume(run: Path, *arguments: str) -> int:
    return main(["run", "--resume", str(run), "--quiet", *arguments])


DAMAGE = [b"{", b"\xff\xfe\r\x00", b"null", b"[1]", b'{"epoch": "two"}', b"", b"[" * 5000]


@pytest.mark.parametrize(
    ("number", "damage"),
    [*((0, each) for each in DAMAGE), (2, b"{"), (3, b"{"), (3, b"")],
    ids=repr,
)
def test_one_damaged_line_does_not_stop_a_resume(number, damage, run, capsys):
    """The others stay as they were; a damaged test is made again, being the last line."""
    log = run / "metrics.jsonl"
    whole = log.read_bytes().split(b"\n")[:-1]
    damaged = [*whole[:number], damage, *whole[number + 1 :]]
    log.write_bytes(b"".join(line + b"\n" for line in damaged))
    assert resume(run) == 0
    message = f"{log}: damaged, and left out: line {number + 1}\n"
    assert capsys.readouterr().err == message
    expected = whole if number == 3 else damaged
    assert log.read_bytes() == b"".join(line + b"\n" for line in expected)


def test_a_run_of_a_damaged_log_goes_on(run):
    log = run / "metrics.jsonl"
    first, _, third, test = log.read_text().splitlines(keepends=True)
    log.write_text(f"{first}{{\n{third}{test}")
    assert resume(run, "--set", "outer.epochs=4") == 0
    assert log.read_text().startswith(f"{first}{{\n{third}{test}")
    assert [row.get("epoch") for row in RunDirectory(run).read_metrics()] == [1, 3, None, 4, None]
    assert read_run(run).steps == 8


@pytest.mark.parametrize("name", ["metrics.jsonl", "times.jsonl"])
def test_a_deleted_log_is_said_in_a_line(name, run, capsys):
    (run / name).unlink()
    status = resume(run)
    printed = capsys.readouterr()
    if name == "times.jsonl":  # is no result
        assert (status, printed.err) == (0, "")
    else:
        assert status == 1
        assert printed.err.startswith(f"{run / name}: 0 epochs are logged, but checkpoint.pt was")
        assert printed.err.count("\n") == 1
    assert main(["compare", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_times_there_are_no_plots_but_a_summary(run, capsys):
    (run / "times.jsonl").unlink()
    assert resume(run) == 0
    printed = capsys.readouterr().out
    assert f"no plots: {run}: lacks numbers that are compared" in printed
    assert "best of 3 epochs by validation" in printed


@pytest.mark.parametrize(
    "record",
    [
        "5",
        "null",
        '{"recipe": 5, "data": {}}',
        '{"recipe": "x", "data": []}',
        '{"recipe": "x", "data": {}, "resumed": 5}',
        '{"recipe": "x", "data": {}, "resumed": [5]}',
        '{"recipe": "x", "data": {}, "resumed": [{"time": "", "step": 1, "changed": {"a": [1]}}]}',
        "\ud800",
        "[" * 5000,
    ],
)
def test_a_record_of_other_types_is_said_to_be_none(record, run, capsys):
    (run / "run.json").write_bytes(record.encode("utf-8", "surrogatepass"))
    for command in (["eval", str(run)], ["run", "--resume", str(run)], ["compare", str(run)]):
        assert main(command) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"{run}/run.json: not the record of a run")
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"test": 5},
        {"test": {"mean": "high"}},
        {"test": {"split": "test", "mean": [{}]}},
        {"epoch": 3, "step": 6, "train_loss": []},
        {"epoch": 3, "validation": 7, "step": 6, "train_loss": 0.5},
    ],
    ids=str,
)
def test_a_log_of_other_types_is_said_in_a_line(change, run, capsys):
    log = run / "metrics.jsonl"
    *lines, test = log.read_text().splitlines()
    lines = (
        [*lines, json.dumps(change)] if "test" in change else [lines[0], json.dumps(change), test]
    )
    log.write_text("".join(f"{line}\n" for line in lines))
    assert main(["compare", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{run}: lacks numbers that are compared")
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "times.jsonl", "run.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_neither_waited_for_nor_a_traceback(make, name, run, capsys):
    (run / name).unlink()
    make(run / name)
    assert resume(run, "--set", "outer.epochs=4") == 1
    message = capsys.readouterr().err
    assert message.startswith(f"{run / name}: ")
    assert message.count("\n") == 1


def test_a_run_of_before_a_field_was_there_has_its_default(run, undisturbed):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  nonfinite: stop\n", ""))
    assert read_run(run).values == read_run(undisturbed).values


def strict(text: str) -> object:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_in_json_and_nan_when_it_is_read(tmp_path, monkeypatch, capsys):
    """And no epoch is called the best where none has a finite score."""
    pool = scores.pool

    def diverged(split, measure, values, losses):
        return pool(split, measure, values * math.nan, losses * math.inf)

    monkeypatch.setattr(scores, "pool", diverged)
    assert main(["run", *FEW, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no epoch of 3 has a finite score; tested is epoch 1" in printed
    assert "best" not in printed
    run = only_run(tmp_path)
    for name in ("metrics.jsonl", "times.jsonl", "run.json"):
        text = (run / name).read_text()
        for line in [text] if name == "run.json" else text.splitlines():
            strict(line)
    finished = read_run(run)
    assert all(map(math.isnan, finished.test.mean))
    assert all(math.isnan(validation.mean) for validation in finished.validations)
    assert resume(run) == 0


def test_scores_are_read_as_they_were_written():
    values = torch.tensor([[1.0, math.nan], [3.0, 2.0]])
    written = scores.pool("test", "mse", values, values)
    again = Scores.from_dict(json.loads(json.dumps(written.as_dict()).replace("NaN", "null")))
    assert str(again) == str(written)
