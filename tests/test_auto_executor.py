"""The executor that measures: what it chooses, what it tells, and that a run goes on as it began."""

import json

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import sinusoids
from torch import nn

import metablocks as mb
from metablocks import auto_executor
from metablocks.cli import main

pytestmark = pytest.mark.usefixtures("placed")


def learner(executor, model=None):
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return mb.MetaLearner(
        net, loss=F.mse_loss, steps=1, rule=mb.LearningRate(0.1), executor=executor
    )


def batch(count=8):
    return sinusoids(count)


@pytest.fixture
def costs(monkeypatch):
    """Seconds and bytes of every executor, in place of measured ones; what was tried."""
    table = {
        "Loop(workers=1, channels_last=False, compile=False)": (4.0, 10),
        "Loop(workers=2, channels_last=False, compile=False)": (3.5, 20),
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
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return tried


def test_the_fastest_is_chosen_once_and_gives_the_loops_gradient(costs, within):
    executor = mb.AutoExecutor()
    ours, loop = learner(executor), learner(mb.Loop())
    for count in (8, 3, 8):
        got, due = ours.meta_gradient(batch(count)), loop.meta_gradient(batch(count))
        torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-14))
    assert executor.chosen == "Vmap(chunk=4)"
    assert executor.reason == (
        "Vmap(chunk=4) for 8 tasks: Vmap(chunk=4) 1e+03 ms and 3.81e-05 MiB, "
        "Vmap() 2e+03 ms and 7.63e-05 MiB, Vmap(chunk=2) 3e+03 ms and 1.91e-05 MiB, "
        "Loop(workers=2) 3.5e+03 ms and 1.91e-05 MiB, Loop() 4e+03 ms and 9.54e-06 MiB"
    )
    assert len(costs) == 5


def test_images_are_tried_channels_last_on_the_faster_loop(monkeypatch, place, within):
    seconds = {1: 2.0, 2: 1.0}
    tried = []
    measure = auto_executor._measure

    def stand_in(executor, *args):
        tried.append(executor)
        result, _ = measure(executor, *args)
        if isinstance(executor, mb.Vmap):
            return result, (9.0, 10)
        return result, (seconds[executor.workers] - 0.5 * bool(executor.channels_last), 10)

    monkeypatch.setattr(auto_executor, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = problem.classification(tasks=2, **place)
    executor = mb.AutoExecutor()
    got = images.learner(executor=executor).meta_gradient(images.tasks)
    assert executor.chosen == "Loop(workers=2, channels_last='query')"
    assert mb.Loop(channels_last="query") not in tried
    due = images.learner().meta_gradient(images.tasks)
    torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))


def test_a_budget_that_the_estimator_breaks_takes_its_thrifty_twin(monkeypatch, place, within):
    """Four copies of the carry in place of nine, and the gradient of `Unrolled`."""
    measured = []

    def stand_in(executor, device, generators, begin, work, *args):
        measured.append(work.key[1])
        peak = 100 if work.key[1].keep_every == 1 else 60
        return (*executor(work, *args), begin), (1.0, peak)

    monkeypatch.setattr(auto_executor, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    small = problem.regression(steps=9, tasks=1, **place)
    executor = mb.AutoExecutor(memory=70)
    for _ in range(2):
        got = small.learner(executor=executor, estimator=mb.Adjoint()).meta_gradient(small.tasks)
        due = small.learner().meta_gradient(small.tasks)
        torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))
    assert executor.chosen in ("Loop(), thrifty", "Vmap(), thrifty")
    assert executor.record()["thrifty"]
    assert mb.Adjoint(keep_every=3) in measured


@pytest.mark.parametrize(
    ("memory", "chosen", "tried"),
    [
        (1000, "Vmap(chunk=4)", 5),
        (79, "Vmap(chunk=4)", 4),
        (39, "Vmap(chunk=2)", 3),
        (15, "Loop()", 2),
    ],
)
def test_a_budget_rules_out_what_would_break_it_untried(memory, chosen, tried, costs):
    executor = mb.AutoExecutor(memory=memory)
    learner(executor).meta_gradient(batch())
    assert (executor.chosen, len(costs)) == (chosen, tried)


def test_a_budget_that_nothing_keeps_takes_the_least_and_says_so(costs):
    executor = mb.AutoExecutor(memory=5)
    with pytest.warns(
        UserWarning, match=r"no executor keeps to memory=5; Loop\(\) takes the least"
    ):
        learner(executor).meta_gradient(batch())
    assert executor.chosen == "Loop()"


def test_random_draws_go_to_the_loop_and_are_its_draws():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    ours, loop = learner(mb.AutoExecutor(), net), learner(mb.Loop(), net)
    torch.manual_seed(3)
    got = [ours.backward(batch()).grads, torch.rand(2)]
    torch.manual_seed(3)
    due = [loop.backward(batch()).grads, torch.rand(2)]
    torch.testing.assert_close(got, due, rtol=0, atol=0)
    assert ours.executor.chosen.startswith("Loop(")


def test_tasks_of_unequal_size_and_evaluations_do_not_choose():
    executor = mb.AutoExecutor()
    ours = learner(executor)
    ours.evaluate(batch())
    one, other = batch(1)[0], sinusoids(1, shots=2)[0]
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
    record = torch.load(run / "checkpoint.pt", weights_only=True)["executor"]
    again = mb.AutoExecutor()
    again.use(record)
    assert again.record() == record
    assert told.startswith(f"{again.chosen} for 4 tasks: ")
    monkeypatch.setattr(auto_executor, "_measure", None)  # whoever goes on does not measure
    assert main(["run", "--resume", str(run), "--out", str(tmp_path), "--quiet"]) == 0
