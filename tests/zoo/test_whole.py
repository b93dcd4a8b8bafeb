"""Law 16 on every model: a trainable tensor that the loss reads beside its arguments is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_entry import Entry
from zoo_learner import differentiable, each, each_with, learner_of, tasks_of
from zoo_reference import attention

import metablocks as mb
from metablocks.errors import MetablocksError

CALLS = ("meta_gradient", "evaluate", "adapt")


@pytest.mark.parametrize(
    ("entry", "name"), each_with(CALLS, lambda entry, call: call == 0 or entry % 4 == call)
)
def test_a_penalty_over_the_models_parameters(entry: Entry, name: str) -> None:
    """It would be a constant: they are the initial weights, not the adapted ones."""
    model = entry.model()

    def loss(prediction: Any, target: Any) -> Tensor:
        penalty = sum(parameter.abs().square().sum() for parameter in model.parameters())
        return entry.loss(prediction, target) + 1e-3 * penalty

    learner = learner_of(entry, model, loss=loss, order=differentiable(entry))
    with attention(entry), pytest.raises(MetablocksError) as raised:
        _call(learner, entry, name)
    assert any(parameter in str(raised.value) for parameter, _ in model.named_parameters())


@each
def test_a_trainable_teacher(entry: Entry) -> None:
    """It gets no gradient. It has no name that a learner knows, but a shape."""
    teacher = nn.Linear(5, 7).double()
    learner = _taught(entry, teacher)
    with attention(entry), pytest.raises(MetablocksError, match=r"teacher|\[7, 5\]"):
        _call(learner, entry, "meta_gradient")


@pytest.mark.parametrize(
    ("entry", "name"), each_with(["meta_gradient"], lambda entry, _: entry % 4 == 0)
)
def test_a_frozen_teacher_is_a_constant(entry: Entry, name: str) -> None:
    teacher = nn.Linear(5, 7).double().requires_grad_(False)
    learner = _taught(entry, teacher)
    with attention(entry):
        assert _call(learner, entry, name).loss.isfinite()


def _taught(entry: Entry, teacher: nn.Linear) -> mb.MetaLearner:
    def loss(prediction: Any, target: Any) -> Tensor:
        wish = teacher(torch.ones(5, dtype=torch.float64)).square().mean()
        return entry.loss(prediction, target) * wish

    return learner_of(entry, loss=loss, order=differentiable(entry))


def _call(learner: mb.MetaLearner, entry: Entry, name: str) -> Any:
    support, tasks = entry.tasks()[0].support, tasks_of(entry)
    return getattr(learner, name)(support if name == "adapt" else tasks)
