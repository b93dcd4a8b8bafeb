"""Choosing an executor by measuring: which candidates are tried, which one wins, what it costs."""

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import sinusoids
from torch import nn

import metablocks as mb
from metablocks import tuning

pytestmark = pytest.mark.usefixtures("placed")


def learner(model=None, **blocks):
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return mb.MetaLearner(net, loss=F.mse_loss, steps=1, rule=mb.LearningRate(0.1), **blocks)


@pytest.fixture
def costs(monkeypatch):
    """Seconds and bytes of every executor, in place of measured ones; what was tried."""
    table = {
        mb.Loop(): (4.0, 10),
        mb.Loop(workers=2): (3.5, 20),
        mb.Vmap(chunk=2): (3.0, 20),
        mb.Vmap(chunk=4): (1.0, 40),
        mb.Vmap(): (2.0, 80),
    }
    tried = []

    def stand_in(candidate, *args):
        tried.append(candidate.executor)
        return tuning.Cost(*table[candidate.executor])

    monkeypatch.setattr(tuning, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return tried


def test_the_fastest_of_all_candidates_is_chosen_and_the_reason_says_what_each_took(costs):
    choice = mb.choose_executor(learner(), sinusoids(8))
    assert (choice.executor, choice.estimator) == (mb.Vmap(chunk=4), mb.Unrolled())
    assert len(costs) == len(choice.costs) == 5
    assert choice.reason.startswith("Vmap(chunk=4): Vmap(chunk=4) with Unrolled() 1e+03 ms")


@pytest.mark.parametrize("fastest", [False, "trace", True])
def test_auto_compiles_what_was_chosen_as_far_as_it_pays(fastest, costs, monkeypatch):
    measured, stand_in = [], tuning._measure

    def measure(candidate, *args):
        if candidate.executor not in (mb.Vmap(chunk=4, compile=c) for c in ("trace", True)):
            return stand_in(candidate, *args)
        measured.append(candidate.executor)
        return tuning.Cost(0.5 if candidate.executor.compile == fastest else 1.5, 40)

    monkeypatch.setattr(tuning, "_measure", measure)
    choice = tuning.AutoExecutor(compile="auto").choose(learner(), sinusoids(8))
    assert choice.executor == mb.Vmap(chunk=4, compile=fastest)
    assert len(measured) == 2


def test_measuring_leaves_the_learner_as_it_was_and_the_choice_gives_its_gradient(within):
    ours, tasks = learner(), sinusoids(3)
    expected, state = ours.meta_gradient(tasks).grads, torch.get_rng_state()
    choice = mb.choose_executor(ours, tasks)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.executor == mb.Loop()
    assert all(p.grad is None for p in ours.parameters())
    ours.executor, ours.estimator = choice.executor, choice.estimator
    actual = ours.meta_gradient(tasks).grads
    torch.testing.assert_close(actual, expected, rtol=within(1e-10), atol=within(1e-14))
    assert all(cost.seconds > 0 for cost in choice.costs.values())


def test_images_are_tried_channels_last_on_the_faster_loop(monkeypatch, place):
    tried = []

    def stand_in(candidate, *args):
        executor = candidate.executor
        tried.append(executor)
        if isinstance(executor, mb.Vmap):
            return tuning.Cost(9.0, 10)
        return tuning.Cost(
            {1: 2.0, 2: 1.0}[executor.workers] - 0.5 * bool(executor.channels_last), 10
        )

    monkeypatch.setattr(tuning, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = problem.classification(tasks=2, **place)
    choice = mb.choose_executor(images.learner(), images.tasks)
    on_cpu = torch.device(place["device"]).type == "cpu"
    best = mb.Loop(workers=2, channels_last="query") if on_cpu else mb.Loop()
    assert choice.executor == best
    assert mb.Loop(channels_last="query") not in tried


def test_a_budget_that_the_estimator_breaks_takes_its_low_memory_form(monkeypatch, place):
    """Four copies of the carry in place of nine."""

    def stand_in(candidate, *args):
        least = 100 if candidate.estimator.keep_every == 1 else 60
        return tuning.Cost(1.0, least + 20 * candidate.estimator.graphs)

    monkeypatch.setattr(tuning, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    small = problem.regression(steps=9, tasks=1, **place)
    choice = mb.choose_executor(small.learner(estimator=mb.Adjoint()), small.tasks, memory=70)
    assert choice.estimator == mb.Adjoint(keep_every=3)


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [
        (200, mb.Unrolled()),
        (90, mb.Adjoint(graphs=4)),
        (65, mb.Adjoint(graphs=1)),
        (55, mb.Adjoint()),
        (45, mb.Adjoint(keep_every=3)),
    ],
)
def test_a_budget_keeps_the_graphs_of_as_many_steps_as_it_has_room_for(
    memory, chosen, monkeypatch, place
):
    def stand_in(candidate, *args):
        estimator = candidate.estimator
        if estimator == mb.Unrolled():
            return tuning.Cost(1.0, 140)
        least = 50 if estimator.keep_every == 1 else 40
        seconds = 2.0 + 0.01 * estimator.graphs  # a clock that is a little wrong
        return tuning.Cost(seconds, least + 10 * estimator.graphs)

    monkeypatch.setattr(tuning, "_measure", stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    small = problem.regression(steps=9, tasks=1, **place)
    choice = mb.choose_executor(small.learner(), small.tasks, memory=memory)
    assert choice.estimator == chosen


@pytest.mark.parametrize(
    ("memory", "chosen", "tried"),
    [
        (1000, mb.Vmap(chunk=4), 5),
        (79, mb.Vmap(chunk=4), 4),
        (39, mb.Vmap(chunk=2), 3),
        (15, mb.Loop(), 2),
    ],
)
def test_a_budget_rules_out_what_would_break_it_untried(memory, chosen, tried, costs):
    choice = mb.choose_executor(learner(), sinusoids(8), memory=memory)
    assert (choice.executor, len(costs)) == (chosen, tried)


def test_a_budget_that_nothing_keeps_takes_the_least_and_says_so(costs):
    with pytest.warns(UserWarning, match=r"no executor keeps to memory=5; Loop\(\) .* the least"):
        choice = mb.choose_executor(learner(), sinusoids(8), memory=5)
    assert choice.executor == mb.Loop()


def test_a_model_that_draws_goes_to_loops_and_unequal_tasks_too():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    assert isinstance(mb.choose_executor(learner(net), sinusoids(4)).executor, mb.Loop)
    unequal = [sinusoids(1)[0], sinusoids(1, shots=2)[0]]
    assert isinstance(mb.choose_executor(learner(), unequal).executor, mb.Loop)


@pytest.mark.parametrize("memory", ["four", "4 gigs", 0, "-1GiB"])
def test_invalid_sizes_are_refused(memory):
    with pytest.raises(
        mb.MetablocksError, match=r"memory is .*; it takes bytes, or a size such as"
    ):
        mb.choose_executor(learner(), sinusoids(1), memory=memory)
