"""I have `higher` code: the same loop side by side, and the same numbers.

| `higher` | metablocks |
|---|---|
| `innerloop_ctx(model, SGD(lr=α))` | `rule=mb.LearningRate(α)` |
| `SGD(lr=α, momentum=μ)` | `rule=mb.Chain(mb.Momentum(μ), mb.LearningRate(α))` |
| `copy_initial_weights=False` | always: the meta-gradient reaches the model's own parameters |
| `track_higher_grads=False` | `order=mb.FirstOrder()`; at test `learner.evaluate(…)` |
| `override={"lr": [rate]}` | `mb.LearningRate(α, learn=True)`: a parameter of the learner |
| `diffopt.step(loss)` | the learner's; of any loss: `mb.adapt(loss_fn, params, batch, …)` |
| `fnet` after the loop | `learner.adapt(task.support)`, a plain module |
| the loop over tasks | gone: `executor=mb.Vmap()` takes them at once |

    python recipes/python/from_higher.py        # needs: pip install higher
"""

import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb


def with_higher(model: nn.Module, batches: list[mb.TaskBatch], rate: float, steps: int) -> None:
    """The loop of the project's README, over tasks."""
    import higher

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for tasks in batches:
        optimizer.zero_grad()
        inner = torch.optim.SGD(model.parameters(), lr=rate)
        for task in (tasks[n] for n in range(len(tasks))):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(steps):
                    diffopt.step(F.mse_loss(fnet(task.support[0]), task.support[1]))
                loss = F.mse_loss(fnet(task.query[0]), task.query[1])
                (loss / len(tasks)).backward()
        optimizer.step()


def with_metablocks(model: nn.Module, batches: list[mb.TaskBatch], rate: float, steps: int) -> None:
    """The same."""
    learner = mb.MetaLearner(
        model, loss=F.mse_loss, steps=steps, rule=mb.LearningRate(rate), executor=mb.Vmap()
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    mb.fit(learner, batches, optimizer=optimizer, progress=False)


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
    for train, model in zip((with_higher, with_metablocks), nets, strict=True):
        train(model, sinusoids(meta_steps), rate=0.01, steps=3)
    ours, theirs = (nn.utils.parameters_to_vector(model.parameters()) for model in nets)
    difference = float((ours - theirs).detach().abs().max())
    print(f"after {meta_steps} meta-steps the parameters differ by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
