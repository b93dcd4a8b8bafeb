"""Small nets, tasks and the hand-written loop that the tests of `train_maml` share."""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import metablocks as mb

X = torch.ones(3, 5, 1)
PAIR = (X, X)
GOOD = (PAIR, PAIR)
NOT_FINITE = (PAIR, (X * torch.nan, X))


def net(width=16):
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


def sinusoids(batches=4, tasks=3):
    source = mb.tasks.Sinusoid(shots=5, queries=6)
    return [source.sample("train", range(i * tasks, (i + 1) * tasks)) for i in range(batches)]


def train(model, tasks, **options):
    return mb.train_maml(model, tasks, progress=False, **{"inner_steps": 2, **options})


def by_hand(learner, batches, progress, *, outer_lr=0.001, cosine=None):
    """The loop of the README, with a schedule where one is given."""
    optimizer = torch.optim.Adam(learner.parameters(), lr=outer_lr)
    schedule = CosineAnnealingLR(optimizer, cosine, outer_lr / 100) if cosine else None
    losses, rates = [], []
    for tasks, now in zip(batches, progress, strict=True):
        while schedule and schedule.last_epoch < int(now):
            schedule.step()
        losses.append(float(learner.backward(tasks, progress=mb.Progress(now)).loss))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
    return losses, rates


def assert_equal(learner, other):
    assert learner.state_dict().keys() == other.state_dict().keys()
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def random_tasks(inputs, tasks=3, outputs=2):
    def batch(examples):
        return torch.randn(tasks, examples, inputs), torch.randn(tasks, examples, outputs)

    return mb.TaskBatch(batch(5), batch(4))


def rows(batch):
    return [batch[index] for index in range(len(batch))]
