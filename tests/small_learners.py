"""Small learners and tasks that the tests of the learner share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.laws.compare import perturb

EXECUTORS = pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap(), mb.Vmap(chunk=2)], ids=repr)


def learner_of(model, *, loss=F.mse_loss, **blocks):
    blocks = {"steps": 2, "rule": mb.LearningRate(0.1), **blocks}
    return mb.MetaLearner(model, loss=loss, **blocks)


def tasks_of(*shape, tasks=3, outputs=2):
    def batch(examples):
        return torch.randn(tasks, examples, *shape), torch.randn(tasks, examples, outputs)

    return mb.TaskBatch(batch(5), batch(4))


def sinusoids(count=3, first=0, shots=3):
    """Sinusoids with 4 queries, where and how exactly new tensors are."""
    tasks = mb.tasks.Sinusoid(shots=shots, queries=4).sample("train", range(first, first + count))
    return tasks.to(torch.get_default_dtype()).to(torch.get_default_device())


def small(dropout=0.0):
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)
    )


def perturbed(model, part, scale=0.3):
    """The same model, its parameters with `part` in their names moved by noise."""
    return perturb(model, part, scale)


def exchanging(learner, name):
    """Puts one block after another into a learner, whose buffers are each time as they are now.

    The checks of a first call are made once, not for every block.
    """
    before = {key: buffer.clone() for key, buffer in learner.named_buffers()}

    def put(block):
        for key, buffer in learner.named_buffers():
            if not torch.equal(buffer, before[key]):
                buffer.copy_(before[key])
        setattr(learner, name, block)
        return learner

    return put
