"""Runs over processes are those of one: tasks divided, one writes, all stop alike, one reports."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import several_ranks
import torch
from small_runs import only_run

WITHIN = 1e-12  # of float64, after 12 meta-steps
SCRIPT = Path(__file__).with_name("ranks_of_runs.py")


def environment():
    paths = [str(Path(several_ranks.__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(out):
    """Of every run: exit statuses by rank, what was printed, and what went to stderr."""
    command = [sys.executable, str(SCRIPT), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (statuses, printed, errors) for name, statuses, printed, errors in lines}


def assert_same_training(run, whole):
    """The last checkpoints, and the logs but for rounding."""
    one, other = (torch.load(each / "checkpoint.pt", weights_only=True) for each in (run, whole))
    for part in ("learner", "random"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            difference = (tensor.double() - other[part][name].double()).abs().max()
            assert float(difference) <= (WITHIN if part == "learner" else 0), name
    texts = [(each / "metrics.jsonl").read_text() for each in (run, whole)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for row, expected in zip(*logs, strict=True):
        assert flat(row) == pytest.approx(flat(expected), rel=1e-9, nan_ok=True)


def flat(tree, path=""):
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{path}.{key}").items()}
    return {path: tree}


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_run_does_not_depend_on_the_number_of_processes(out, ended, processes):
    """Uneven division, more processes than tasks, validation, test and ensemble over processes."""
    name = f"of {processes}"
    statuses, printed, errors = ended[name]
    assert (statuses, errors) == ([0] * processes, "")
    assert printed.count("epoch 3/3") == 1
    run, whole = only_run(out / name), only_run(out / "alone")
    assert_same_training(run, whole)
    files, expected = ({path.name for path in each.iterdir()} for each in (run, whole))
    assert files - {"evaluations.jsonl"} == expected
    assert json.loads((run / "run.json").read_text())["processes"] == processes


def test_one_that_is_killed_ends_all_with_one_error_and_a_whole_checkpoint(out, ended):
    statuses, _, errors = ended["killed"]
    assert statuses == [1, -signal.SIGKILL, 1]
    (line,) = errors.splitlines()
    assert "the other processes do not answer: one of them has ended" in line
    statuses, printed, errors = ended["killed, on 2"]
    assert (statuses, errors) == ([0, 0], "")
    assert "going on after meta-step 5 of epoch 2" in printed
    assert re.search(r"note: not as before: .*processes.*3 → 2", printed)
    assert_same_training(only_run(out / "killed"), only_run(out / "alone"))


def test_nor_is_anything_lost_with_the_one_that_writes(out, ended):
    statuses, _, errors = ended["first killed"]
    assert statuses == [-signal.SIGKILL, 1]
    assert errors.count("the other processes do not answer: one of them has ended") == 1
    statuses, _, errors = ended["first killed, on 3"]
    assert (statuses, errors) == ([0, 0, 0], "")
    assert_same_training(only_run(out / "first killed"), only_run(out / "alone"))


def test_an_error_in_one_ends_all_and_loses_nothing(out, ended):
    for name, count in (("broken", 3), ("first broken", 2)):
        statuses, _, errors = ended[name]
        assert statuses == [1] * count
        assert errors.count("ZeroDivisionError: of one process") == 1
        lines = re.findall(
            r"^the other processes do not answer: one of them has ended.*$", errors, re.M
        )
        assert len(lines) == 1, errors
    assert ended["broken, on 2"][::2] == ([0, 0], "")
    assert_same_training(only_run(out / "broken"), only_run(out / "alone"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_says_is_all_that_is_said(out, ended, rank):
    """Whichever process it is; data that is never there leaves no directory behind."""
    for name, epochs in ((f"without data in {rank}", 1), (f"without any data in {rank}", 0)):
        statuses, printed, errors = ended[name]
        assert errors == "cat/1.png: not an image\n"
        assert statuses == ([2, 1] if rank == 0 else [1, 2])
        assert printed.count("\nepoch ") == epochs
    assert not list((out / name).glob("*"))


def test_a_signal_to_one_stops_all_at_the_same_meta_step(out, ended):
    statuses, printed, errors = ended["stopped"]
    assert (statuses, errors) == ([130, 130], "")
    assert "stopped after meta-step 6; everything is saved" in printed
    assert ended["stopped, on 1"][::2] == ([0], "")
    assert_same_training(only_run(out / "stopped"), only_run(out / "alone"))


def test_evaluations_are_over_processes_too(out, ended):
    assert ended["eval"][::2] == ended["eval last"][::2] == ([0, 0], "")
    run = only_run(out / "of 2")
    tested = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    text = (run / "evaluations.jsonl").read_text()
    ensemble, last = (json.loads(line)["scores"] for line in text.splitlines())
    assert ensemble["mean"] == pytest.approx(tested["ensemble"]["mean"], rel=1e-9)
    assert last["tasks"] == 1  # fewer than processes


def test_what_is_not_finite_is_so_for_all_and_said_once(out, ended):
    for name, word in (("far", "stop"), ("skipped", "skip")):
        statuses, _, errors = ended[name]
        assert statuses == [1, 1], word
        tasks = re.findall(r"at meta-step (\d), .*by itself, too, task (0, 1, 2|3, 4, 5)", errors)
        assert tasks[:1] == [("1", "0, 1, 2")], errors
        assert len(errors.splitlines()) == {"stop": 1, "skip": 5}[word], errors
    assert "no meta-step of epoch 1 was taken: all skipped" in ended["skipped"][2]


def test_an_executor_is_chosen_by_the_first_for_all(out, ended):
    statuses, _, errors = ended["measured"]
    assert statuses == [0, 0]
    assert errors.count("executor:") == 1
    assert "block: auto" not in (only_run(out / "measured") / "recipe.yaml").read_text()


def test_what_is_wrong_for_all_is_said_once(ended):
    statuses, _, errors = ended["no such"]
    assert statuses == [2, 2]
    assert errors.count("no recipe of that name") == 1


def test_other_commands_do_not_run_beside_each_other(ended):
    statuses, printed, errors = ended["check"]
    assert (statuses, printed) == ([2, 2], "")
    assert errors.startswith("metablocks check works in one process: start it without torchrun")
    assert len(errors.splitlines()) == 1


def test_what_torchrun_starts_again_goes_on_from_the_last_checkpoint(out, ended, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "--max-restarts", "1", str(SCRIPT), "restarted", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    assert "going on after meta-step 5 of epoch 2" in done.stdout
    assert_same_training(only_run(tmp_path), only_run(out / "alone"))
