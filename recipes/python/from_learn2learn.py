"""I have learn2learn code: the same loop side by side, and the same numbers.

| learn2learn | metablocks |
|---|---|
| `l2l.algorithms.MAML(model, lr=α)` | `mb.MetaLearner(model, rule=mb.LearningRate(α), …)` |
| `first_order=True` | `order=mb.FirstOrder()` |
| `MetaSGD(model, lr=α)` | `rule=mb.meta_sgd(α)` |
| `GBML(model, KroneckerTransform(…), lr=α)` | `rule=mb.Chain(mb.KFO(), mb.LearningRate(α))` |
| `allow_unused=True` | `allow_unused="experts.*"`: which may stay unused |
| `maml.clone()`, `learner.adapt(loss)` | within `backward`; for a model `learner.adapt(support)` |
| `TaskDataset`, `NWays`, `KShots` | `mb.tasks.Episodes(dataset, ways=…, shots=…, queries=…)` |
| `learner.module` | `learner.model`: the model is never cloned or patched |

    python recipes/python/from_learn2learn.py   # needs: pip install learn2learn
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb


def with_learn2learn(
    model: nn.Module, batches: list[mb.TaskBatch], rate: float, steps: int
) -> None:
    """The loop of the project's examples (`examples/vision/maml_omniglot.py`)."""
    import learn2learn as l2l

    maml: Any = l2l.algorithms.MAML(model, lr=rate, first_order=False)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for tasks in batches:
        optimizer.zero_grad()
        for task in (tasks[n] for n in range(len(tasks))):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(F.mse_loss(learner(task.support[0]), task.support[1]))
            F.mse_loss(learner(task.query[0]), task.query[1]).backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1.0 / len(tasks))
        optimizer.step()


def with_metablocks(model: nn.Module, batches: list[mb.TaskBatch], rate: float, steps: int) -> None:
    """The same, written out; `mb.fit` is this loop with validation, the best weights and callbacks."""
    learner = mb.MetaLearner(
        model, loss=F.mse_loss, steps=steps, rule=mb.LearningRate(rate), executor=mb.Vmap()
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for tasks in batches:
        optimizer.zero_grad()
        learner.backward(tasks)  # the mean over tasks
        optimizer.step()


def net() -> nn.Module:
    """A net for sinusoids, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)).double()


def sinusoids(meta_steps: int) -> list[mb.TaskBatch]:
    """So many batches of ten tasks."""
    source = mb.tasks.Sinusoid(shots=5, queries=10)
    batches = [source.sample("train", range(10 * n, 10 * n + 10)) for n in range(meta_steps)]
    return [batch.to(torch.float64) for batch in batches]


def main(meta_steps: int = 100) -> float:
    """Train by both; return the largest difference between their parameters."""
    nets = net(), net()
    for train, model in zip((with_learn2learn, with_metablocks), nets, strict=True):
        train(model, sinusoids(meta_steps), rate=0.01, steps=3)
    ours, theirs = (nn.utils.parameters_to_vector(model.parameters()) for model in nets)
    difference = float((ours - theirs).detach().abs().max())
    print(f"after {meta_steps} meta-steps the parameters differ by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
