"""The loop's ways to be faster: tasks side by side in threads, images laid out channels last."""

import threading

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import learner_of, small, tasks_of
from torch import nn

import metablocks as mb
from metablocks.laws import executors

pytestmark = pytest.mark.usefixtures("placed")

FASTER = [
    mb.Loop(workers=2),
    mb.Loop(workers=8),
    mb.Loop(channels_last=True),
    mb.Loop(workers=2, channels_last="query"),
]


@pytest.mark.parametrize(
    ("executor", "estimator", "order"),
    [  # any two go together
        (executor, estimator, orders[(number + turn) % 2])
        for orders in [(mb.SecondOrder(), mb.FirstOrder())]
        for number, executor in enumerate(FASTER)
        for turn, estimator in enumerate((mb.Unrolled(), mb.Adjoint()))
    ],
    ids=repr,
)
def test_no_setting_changes_a_result(executor, estimator, order, place):
    images = problem.classification(tasks=5, **place)
    blocks = {"rule": lambda: mb.meta_sgd(0.1), "estimator": estimator, "order": order}
    executors.equals_the_loop(executor, images, **blocks)


def test_draws_follow_each_other_in_task_order_whatever_the_workers():
    tasks = tasks_of(3, tasks=6)
    results = []
    for executor in (mb.Loop(), mb.Loop(workers=3)):
        torch.manual_seed(5)  # of the net as well
        ours = learner_of(small(dropout=0.5), executor=executor)
        results += [[ours.backward(tasks).grads, ours.backward(tasks).grads, torch.rand(3)]]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_threads_have_the_callers_modes_and_share_its_threads():
    seen = []

    def look(prediction, target):
        alone = threading.current_thread() is threading.main_thread()
        seen.append((alone, prediction.dtype, torch.get_num_threads()))
        return F.mse_loss(prediction.float(), target.float())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        net, tasks = nn.Linear(3, 2).float().cpu(), tasks_of(3).to(torch.float32).to("cpu")
        ours = learner_of(net, loss=look, executor=mb.Loop(workers=2))
        for _ in range(2):  # the first task of all tells, in this thread, what the work draws from
            ours.evaluate(tasks)
        seen.clear()
        ours.evaluate(tasks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours.evaluate(tasks)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {kind for _, kind, _ in seen} == {torch.float32, torch.bfloat16}
    assert {(alone, threads) for alone, _, threads in seen} == {(False, 1)}


def test_an_error_in_a_thread_reaches_the_caller_and_leaves_torchs_threads_as_they_were():
    def fail(prediction, target):
        raise ValueError("no loss today")

    before = torch.get_num_threads()
    ours = learner_of(nn.Linear(3, 2), loss=fail, executor=mb.Loop(workers=2))
    with pytest.raises(ValueError, match="no loss today"):
        ours.evaluate(tasks_of(3))
    assert torch.get_num_threads() == before


def test_images_are_laid_out_channels_last_for_the_passes_asked_for():
    layouts = []

    class Look(nn.Conv2d):
        def forward(self, x):
            layouts.append((len(x), x.stride()[1] == 1))
            return super().forward(x).mean((-1, -2))

    def images(examples):
        return torch.randn(2, examples, 1, 4, 4), torch.randn(2, examples, 2)

    tasks = mb.TaskBatch(images(3), images(5))
    for setting, support, query in (
        (False, False, False),
        ("query", False, True),
        (True, True, True),
    ):
        executor = mb.Loop(channels_last=setting)
        ours = learner_of(Look(1, 2, 3), executor=executor, steps=1)
        ours.evaluate(tasks)  # whose first pass tells what the model writes
        layouts.clear()
        ours.evaluate(tasks)
        assert set(layouts) == {(3, support), (5, query)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers is 0; it takes a whole number, 1 or more"),
        ({"workers": True}, "workers is True; it takes a whole number"),
        (
            {"channels_last": "support"},
            "channels_last is 'support'; it takes True, False or \"query\"",
        ),
    ],
)
def test_other_settings_are_refused(settings, message):
    with pytest.raises(mb.MetablocksError, match=message):
        mb.Loop(**settings)
