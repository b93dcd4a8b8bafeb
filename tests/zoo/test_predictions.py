"""`evaluate` and `adapt` on every model: the losses and predictions of plain autograd."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_entry import Entry, seed
from zoo_learner import each, learner_of, tasks_of
from zoo_reference import arguments, batch_norms, evaluation, tensors_in

import metablocks as mb
from metablocks.errors import ExecutorError

known = cache(evaluation)

executors = pytest.mark.parametrize(
    "executor",
    [mb.Loop(), pytest.param(mb.Vmap(), marks=pytest.mark.long)],
    ids=lambda executor: type(executor).__name__,
)


@each
@executors
def test_evaluate(entry: Entry, executor: mb.Executor) -> None:
    """Query losses after every step; dropout is off, batch norms go by their input."""
    learner = learner_of(entry, executor=executor)
    seed(3)  # nothing is drawn
    result = _evaluated(learner, tasks_of(entry))
    if isinstance(result, ExecutorError):  # what vmap refuses in train() it may run in eval()
        assert isinstance(executor, mb.Vmap)
        assert entry.no_vmap or entry.no_vmap_evaluate
        assert "Loop()" in str(result)
        return
    losses, predictions = known(entry)
    assert _off(result.query_losses, losses) < entry.tolerance
    if isinstance(result.predictions, Tensor):
        assert _off(result.predictions, torch.stack(predictions)) < entry.tolerance


@each
def test_adapt(entry: Entry) -> None:
    """A plain module that predicts what the reference does after the last step.

    Its batch norms carry the support set's statistics; in `train()` they go by their input, which is
    what the reference does.
    """
    learner = learner_of(entry)
    task = entry.tasks()[0]
    adapted = learner.adapt(task.support)
    assert not any(module.training for module in adapted.modules())
    for norm in batch_norms(adapted):
        norm.train()
    args, kwargs = arguments(task.query[0])
    output = adapted(*args, **kwargs)
    _, predictions = known(entry)
    pairs = list(zip(tensors_in(output), tensors_in(predictions[0]), strict=True))
    assert pairs
    for actual, expected in pairs:
        assert _off(actual, expected) < entry.tolerance


@each
def test_adapting_changes_the_prediction(entry: Entry) -> None:
    """A test that cannot fail is a bug: the losses move from step to step."""
    losses, _ = known(entry)
    assert losses.isfinite().all()
    assert (losses.diff(dim=1).abs() > 1e-6).all()


def _evaluated(learner: mb.MetaLearner, tasks: Any) -> mb.Evaluation | ExecutorError:
    try:
        return learner.evaluate(tasks)
    except ExecutorError as error:
        return error


def _off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())
