"""A ResNet-18 from torchvision as a meta-learner: its head adapts, its batch norms keep what they know.

Any `nn.Module` is a model, as it is. What to decide for one with batch norm is what normalises:

- `norm_statistics="running"`: the stored statistics of a pre-trained net, left as they are (here);
- `"batch"`, the default: the statistics of the batch at hand, as in the few-shot literature;
- `mb.per_step_batch_norm(model, steps)`: statistics, γ and β of their own for each inner step (MAML++).

    python recipes/python/torchvision_model.py               # weights from torchvision, downloaded once
"""

import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.torchvision_import import (
    torchvision_module,
)  # runs beside a CPU build of torch, too


def main(
    weights: str | None = "DEFAULT", per_step: bool = False, size: int = 84, steps: int = 100
) -> float:
    """Meta-learn 5-way 1-shot tasks of drawn characters; return the last query loss."""
    torch.manual_seed(0)
    # `import torchvision` would do, too, except beside a CPU build of torch.
    model = torchvision_module("models").resnet18(weights=weights)
    model.fc = nn.Linear(model.fc.in_features, 5)
    if per_step:
        model = mb.per_step_batch_norm(model, 2)
    learner = mb.MetaLearner(
        model,
        loss=F.cross_entropy,
        steps=2,
        rule=mb.LearningRate(0.1, learn=True),
        adapt="fc.*",  # ANIL: the body is learned in the outer loop alone
        norm_statistics="batch" if per_step else "running",
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-4)
    source = mb.tasks.Strokes(ways=5, shots=1, queries=3, size=size)

    def colour(batch: mb.Batch) -> mb.Batch:
        images, target = batch
        return images.expand(-1, 3, -1, -1), target

    for step in range(steps):
        tasks = source.sample("train", range(2 * step, 2 * step + 2))
        drawn = [tasks[k] for k in range(len(tasks))]
        result = learner.backward([mb.Task(colour(t.support), colour(t.query)) for t in drawn])
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:4d}  query loss {float(result.loss):.3f}")
    return float(result.loss)


if __name__ == "__main__":
    main()
