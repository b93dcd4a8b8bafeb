"""Law 9 on every model: what looks at it leaves it as it was, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_entry import QUERY, SEED, STEPS, TASKS, Entry, seed
from zoo_learner import differentiable, each_with, learner_of, tasks_of
from zoo_reference import attention, distance
from zoo_state import changes, snapshot

CALLS = ("meta_gradient", "evaluate", "adapt")
LOSSES = TASKS * (STEPS + 1)
"""How often a loop asks for the loss, once the checks of the first call are over."""


@pytest.mark.parametrize(("entry", "name"), each_with(CALLS, lambda *_: True))
def test_a_call_leaves_no_trace(entry: Entry, name: str) -> None:
    """Parameters, `.grad`, buffers, attributes, flags, generators; making the learner included."""
    model = entry.model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    support, tasks = entry.tasks()[0].support, tasks_of(entry)
    before = snapshot(model)
    learner = learner_of(entry, model, order=differentiable(entry))
    with attention(entry):
        getattr(learner, name)(support if name == "adapt" else tasks)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("entry", "number"), each_with(range(LOSSES), lambda entry, number: number == entry % LOSSES)
)
def test_an_exception_leaves_no_trace(entry: Entry, number: int) -> None:
    """Where the loss raises at its call of this number, it is heard, and the next call is right."""
    left = [10**9]

    def loss(prediction: Any, target: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError
        return entry.loss(prediction, target)

    learner = learner_of(entry, loss=loss, order=differentiable(entry))
    tasks = tasks_of(entry)
    with attention(entry):
        seed(SEED)
        result = learner.meta_gradient(tasks)
        before = snapshot(learner.model)
        left[0] = number
        with pytest.raises(ZeroDivisionError):
            learner.meta_gradient(tasks)
        assert changes(before, snapshot(learner.model)) == []
        left[0] = 10**9
        again = learner.meta_gradient(tasks)
    assert distance(again.grads, result.grads) < entry.tolerance


def test_the_snapshot_sees_what_it_is_to_see() -> None:
    """A test that cannot fail is a bug."""
    from zoo_torch import Remembers

    model = Remembers()
    before = snapshot(model)
    assert changes(before, snapshot(model)) == []
    model(torch.zeros(QUERY, 4))
    assert any("history" in path for path in changes(before, snapshot(model)))
    assert any("features" in path for path in changes(before, snapshot(model)))
    before = snapshot(model)
    with torch.no_grad():
        model.body.weight[0, 0] += 1e-7
    torch.rand(1)
    model.head.eval()
    found = changes(before, snapshot(model))
    assert [path for path in found if "weight" in path]
    assert "torch's generator" in found
    assert "head.training" in found
