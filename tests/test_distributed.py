"""Distributed: over 1, 2 and 3 processes, learners are those of one, and one that ends is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import several_ranks
import torch

import metablocks as mb
from metablocks.processes import check_device

WITHIN = 1e-12  # of float64, after 15 meta-steps
RANKS = [(0, 1), (0, 2), (1, 2), (0, 3), (2, 3)]  # each rank and the number of processes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    script = Path(several_ranks.__file__)
    ended = subprocess.run(
        [sys.executable, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[0]", "[0, 0]", "[0, 0, 0]"], ended.stderr
    return {ranks: torch.load(out / f"{ranks[0]}-of-{ranks[1]}.pt") for ranks in RANKS}


@pytest.fixture(scope="module")
def alone():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        runs = {"five": (5, several_ranks.STEPS), "two": (2, several_ranks.STEPS)}
        runs["few"] = (5, several_ranks.FEW)
        return {name: several_ranks.train(mb.Vmap(), *sizes) for name, sizes in runs.items()}
    finally:
        torch.set_default_dtype(before)


def of_all(state):
    """What all processes have, results by task left out."""
    return {name: t for name, t in state.items() if name not in ("query_losses", "scores")}


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_weights_and_statistics_do_not_depend_on_the_number_of_processes(saved, alone, ranks):
    trained = of_all(saved[ranks]["five"])
    assert any("running_mean" in name for name in trained)
    assert distance(trained, of_all(alone["five"])) < WITHIN


@pytest.mark.parametrize("executor", ["loop", "traced"])
def test_nor_on_the_executor_within_a_process(saved, alone, executor):
    assert distance(of_all(saved[1, 2][executor]), of_all(alone["few"])) < WITHIN


def test_there_may_be_more_processes_than_tasks(saved, alone):
    assert saved[2, 3]["two"]["query_losses"].shape == (0, 3)
    assert saved[2, 3]["two"]["scores"].shape == (0, 3)
    assert distance(of_all(saved[2, 3]["two"]), of_all(alone["two"])) < WITHIN


@pytest.mark.parametrize(("tasks", "count"), [("five", 5), ("two", 2)])
def test_draws_of_models_and_batches_are_those_of_one_process(saved, tasks, count, float64):
    expected = several_ranks.drawing(mb.Loop(), count)
    for rank in (0, 2):
        assert distance(saved[rank, 3][f"drawing {tasks}"], expected) < WITHIN


def test_all_processes_have_the_same_bits(saved):
    for name in ("five", "two"):
        one, other = (of_all(saved[rank, 3][name]) for rank in (0, 2))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_fit_and_train_maml_are_those_of_one_process(saved, float64):
    """Epochs, validations and weights; each process samples its own tasks alone, or none."""
    expected = several_ranks.fitted(mb.Vmap())
    parts = [saved[rank, 3]["fitted"] for rank in (0, 2)]
    for part in parts:
        assert distance(part["results"], expected["results"]) < WITHIN
    first, third = ([{s: len(asked[s]) for s in asked} for asked in p["asked"]] for p in parts)
    steps = 2 * several_ranks.FEW
    assert first == [{"train": steps, "validation": 2 * 50}] * 2
    assert third == [{"train": 0, "validation": 0}] * 2
    assert [len(asked["train"]) for asked in expected["asked"]] == [2 * steps] * 2


def test_numbers_by_task_are_a_process_s_own(saved, alone):
    for number in ("query_losses", "scores"):
        each = [saved[rank, 2]["five"][number] for rank in (0, 1)]
        assert [len(one) for one in each] == [3, 2]
        expected = alone["five"][number]
        torch.testing.assert_close(torch.cat(each), expected, rtol=0, atol=WITHIN, equal_nan=True)


def test_a_parameter_is_reached_if_a_task_of_any_process_reaches_it(saved):
    for rank in (0, 2):  # one with tasks, and one without
        assert saved[rank, 3]["reach"].startswith("the loss does not depend on model.parts in any")


def test_a_process_that_ends_is_noticed_by_the_others_at_once(saved):
    for rank in (0, 2):
        assert saved[rank, 3]["one ends"].startswith("the other processes do not answer: one of")


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_more_processes_than_devices_are_refused(device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    places = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (places | {"LOCAL_WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        mb.MetablocksError, match=r"3 processes on this machine.*--device cuda, and"
    ):
        check_device(torch.device(device))
    check_device(torch.device("cpu"))


def test_without_a_group_it_says_how_to_join_one():
    with pytest.raises(mb.MetablocksError, match="torchrun"):
        several_ranks.train(mb.Distributed(), 1, 1)
