"""Weights of tasks: a meta-gradient is the weighted mean of its tasks', whatever runs them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.laws import gradients
from metablocks.train_maml import train_maml

WEIGHTS = [0.5, 0.0, 2.0, 1.0]
EXECUTORS = [mb.Loop(workers=2), mb.Vmap(), mb.Vmap(chunk=3), mb.Vmap(compile="trace")]
ESTIMATORS = [mb.Unrolled(), mb.Adjoint(), mb.Reptile(), mb.Implicit()]
COMPILED = [mb.Unrolled(), mb.Implicit()]


def half(*lead):
    return torch.randn(*lead, 4, 3, dtype=torch.float64), torch.randn(*lead, 4, 2).double()


def tasks(weight=None):
    torch.manual_seed(0)
    return mb.TaskBatch(half(4), half(4), weight)


def learner(**blocks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    if blocks.pop("plain", False):
        model = nn.Linear(3, 2).double()
    elif isinstance(blocks.get("estimator"), mb.Unrolled | mb.Adjoint):
        model = mb.per_step_batch_norm(model, 2).double()
    blocks = {"loss": F.mse_loss, "steps": 2, "rule": mb.LearningRate(0.1), **blocks}
    return mb.MetaLearner(model, **blocks)


@pytest.mark.parametrize(
    ("executor", "estimator"),
    [
        (executor, estimator)
        for executor in EXECUTORS
        for estimator in (COMPILED if executor.compile else ESTIMATORS)
    ],
    ids=repr,
)
def test_the_gradient_is_the_weighted_mean(executor, estimator):
    blocks = {"estimator": estimator, "plain": bool(executor.compile)}
    ours = learner(executor=copy.deepcopy(executor), **blocks)
    got = ours.meta_gradient(tasks(WEIGHTS), metric=F.mse_loss)
    alone = [learner(**blocks).meta_gradient(tasks()[i : i + 1]) for i in range(4)]

    def mean(values):
        return sum(w * v for w, v in zip(WEIGHTS, values, strict=True)) / sum(WEIGHTS)

    torch.testing.assert_close(got.loss, mean([one.loss for one in alone]))
    for name, grad in got.grads.items():
        torch.testing.assert_close(grad, mean([one.grads[name] for one in alone]))
    for name, change in got.buffer_changes.items():
        expected = mean([one.buffer_changes[name] for one in alone])
        torch.testing.assert_close(change, expected.to(change.dtype))
    for name, value in got.metrics.items():
        torch.testing.assert_close(value, mean([one.metrics[name] for one in alone]))
    each = torch.cat([one.query_losses for one in alone])
    torch.testing.assert_close(got.query_losses, each, equal_nan=True)
    torch.testing.assert_close(got.scores, each, equal_nan=True)
    plain = ours.evaluate(tasks()).query_losses
    torch.testing.assert_close(ours.evaluate(tasks(WEIGHTS)).query_losses, plain)


def test_plain_autograd_agrees_and_equal_weights_are_none():
    gradients.plain_autograd(learner(), tasks(WEIGHTS))
    equal = learner().meta_gradient(tasks([3.0] * 4))
    for name, grad in learner().meta_gradient(tasks()).grads.items():
        torch.testing.assert_close(equal.grads[name], grad)


def test_weights_go_with_their_tasks():
    whole = tasks(WEIGHTS)
    assert whole[1:3].weight.tolist() == WEIGHTS[1:3]
    assert float(whole[2].weight) == 2.0
    assert mb.TaskBatch.stack([whole[0], tasks()[1]]).weight.tolist() == [0.5, 1.0]
    assert whole.to(torch.float64).weight.dtype == torch.float64
    listed = [whole[index] for index in range(4)]
    got, expected = (learner().meta_gradient(some).grads for some in (listed, whole))
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name])


def test_train_maml_keeps_weights():
    """A task of no weight leaves no trace."""

    def weights_after(batch):
        torch.manual_seed(2)
        model = nn.Linear(3, 2).double()
        train_maml(model, [batch], loss=F.mse_loss, inner_steps=1, progress=False)
        return model.weight.detach()

    whole = tasks([1.0, 0.0, 0.0, 0.0])
    expected = weights_after(tasks()[:1])
    torch.testing.assert_close(weights_after(whole), expected)
    torch.testing.assert_close(weights_after([whole[index] for index in range(4)]), expected)
