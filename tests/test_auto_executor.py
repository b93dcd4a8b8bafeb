"""The executor that measures: what it chooses, what it tells, and that a run goes on as it began."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks import auto_executor
from metablocks.cli import main
from metablocks.tasks import Sinusoid

pytestmark = pytest.mark.usefixtures("float64")


def learner(executor, model=None):
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return mb.MetaLearner(
        net, loss=F.mse_loss, steps=1, rule=mb.LearningRate(0.1), executor=executor
    )


def batch(count=8):
    return Sinusoid(shots=3, queries=4).sample("train", range(count)).to(torch.float64)


@pytest.fixture
def costs(monkeypatch):
    """Seconds and bytes of every executor, in place of measured ones; what was tried."""
    table = {
        "Loop(compile=False)": (4.0, 10),
        "Vmap(chunk=2, compile=False)": (3.0, 20),
        "Vmap(chunk=4, compile=False)": (1.0, 40),
        "Vmap(chunk=None, compile=False)": (2.0, 80),
    }
    tried = []
    measure = auto_executor._measure

    def stand_in(executor, *args):
        result, _ = measure(executor, *args)
        tried.append(repr(executor))
        return result, table[repr(executor)]

    monkeypatch.setattr(auto_executor, "_measure", stand_in)
    return tried


def test_the_fastest_is_chosen_once_and_gives_the_loops_gradient(costs):
    executor = mb.AutoExecutor()
    ours, loop = learner(executor), learner(mb.Loop())
    for count in (8, 3, 8):
        got, due = ours.meta_gradient(batch(count)), loop.meta_gradient(batch(count))
        torch.testing.assert_close(got.grads, due.grads, rtol=1e-10, atol=1e-14)
    assert executor.chosen == "vmap 4"
    assert executor.reason == (
        "vmap 4 for 8 tasks: vmap 4 1e+03 ms and 3.81e-05 MiB, vmap 2e+03 ms and 7.63e-05 MiB, "
        "vmap 2 3e+03 ms and 1.91e-05 MiB, loop 4e+03 ms and 9.54e-06 MiB"
    )
    assert len(costs) == 4


@pytest.mark.parametrize(
    ("memory", "chosen", "tried"),
    [(1000, "vmap 4", 4), (79, "vmap 4", 3), (39, "vmap 2", 2), (15, "loop", 1)],
)
def test_a_budget_rules_out_what_would_break_it_untried(memory, chosen, tried, costs):
    executor = mb.AutoExecutor(memory=memory)
    learner(executor).meta_gradient(batch())
    assert (executor.chosen, len(costs)) == (chosen, tried)


def test_a_budget_that_nothing_keeps_takes_the_least_and_says_so(costs):
    executor = mb.AutoExecutor(memory=5)
    with pytest.warns(UserWarning, match="no executor keeps to memory=5; loop takes the least"):
        learner(executor).meta_gradient(batch())
    assert executor.chosen == "loop"


def test_random_draws_go_to_the_loop_and_are_its_draws():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    ours, loop = learner(mb.AutoExecutor(), net), learner(mb.Loop(), net)
    torch.manual_seed(3)
    got = [ours.backward(batch()).grads, torch.rand(2)]
    torch.manual_seed(3)
    due = [loop.backward(batch()).grads, torch.rand(2)]
    torch.testing.assert_close(got, due, rtol=0, atol=0)
    assert ours.executor.chosen == "loop"


def test_tasks_of_unequal_size_and_evaluations_do_not_choose():
    executor = mb.AutoExecutor()
    ours = learner(executor)
    ours.evaluate(batch())
    one, other = batch(1)[0], Sinusoid(shots=2, queries=4).sample("train", [1]).to(torch.float64)[0]
    ours.meta_gradient([one, other])
    assert executor.chosen is None


@pytest.mark.parametrize("memory", ["four", "4 gigs", 0, "-1GiB"])
def test_sizes_that_are_none_are_refused(memory):
    with pytest.raises(
        mb.MetablocksError, match=r"memory is .*; it takes bytes, or a size such as"
    ):
        mb.AutoExecutor(memory=memory)


def test_a_run_records_its_choice_and_goes_on_with_it(tmp_path, capsys, monkeypatch):
    small = [
        *("maml_sinusoid", "--memory", "2 GiB", "--out", str(tmp_path), "--quiet"),
        *("--set", "outer.epochs=1", "--set", "outer.steps_per_epoch=2"),
        *("--set", "outer.tasks_per_step=4", "--set", "evaluation.tasks=4"),
        *("--set", "evaluation.inner_steps=1", "--set", "hardware.device=cpu"),
    ]
    assert main(["run", *small]) == 0
    (run,) = tmp_path.iterdir()
    told = json.loads((run / "run.json").read_text())["executor"]
    chosen = torch.load(run / "checkpoint.pt", weights_only=True)["executor"]
    assert told.startswith(f"{chosen} for 4 tasks: ")
    monkeypatch.setattr(auto_executor, "_measure", None)  # whoever goes on does not measure
    assert main(["run", "--resume", str(run), "--out", str(tmp_path), "--quiet"]) == 0


def test_a_wrong_budget_on_the_command_line_is_an_error_with_its_place(capsys):
    assert main(["run", "maml_sinusoid", "--memory", "lots"]) == 2
    error = capsys.readouterr().err
    assert "memory is 'lots'; it takes bytes, or a size such as \"4GiB\"" in error
    assert "Traceback" not in error
