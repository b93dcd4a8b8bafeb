"""MAML on Omniglot, on one page: a loop to edit.

    python recipes/python/maml_omniglot.py --data FOLDER     # Omniglot in FOLDER (see mb.tasks.Omniglot)
    python recipes/python/maml_omniglot.py                   # drawn characters, nothing to download

Other algorithms are other lines of `learner` below: `order=mb.FirstOrder()` is FOMAML, `adapt="head.*"`
is ANIL, `rule=mb.meta_sgd(0.4)` is Meta-SGD.

Source: Finn, Abbeel, Levine 2017.
"""

import argparse

import torch
import torch.nn.functional as F

import metablocks as mb
from metablocks.models import Conv4


def main(
    data: str | None = None,
    ways: int = 5,
    shots: int = 1,
    filters: int = 64,
    steps: int = 1000,  # meta-steps
    tasks_per_step: int = 16,
    test_tasks: int = 200,
    device: str = "cpu",
) -> float:
    """Train, and return the accuracy on new characters after three inner steps."""
    torch.manual_seed(0)
    source: mb.tasks.TaskSource
    if data is None:
        source = mb.tasks.Strokes(ways=ways, shots=shots, queries=5, device=device)
    else:
        source = mb.tasks.Omniglot(ways=ways, shots=shots, queries=5, data=data, device=device)

    model = Conv4(input_shape=source.input_shape, outputs=ways, filters=filters).to(device)
    learner = mb.MetaLearner(
        model,
        loss=F.cross_entropy,
        steps=1,
        rule=mb.LearningRate(0.4),
        order=mb.SecondOrder(),
        executor=mb.Vmap(),
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)

    for step in range(steps):
        # A task is a function of (seed, split, index): step k always has the same tasks.
        tasks = source.sample("train", range(step * tasks_per_step, (step + 1) * tasks_per_step))
        result = learner.backward(tasks)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  query loss {float(result.loss):.3f}")

    correct = 0.0
    for index in range(test_tasks):
        task = source.sample("test", [index])[0]
        adapted = learner.adapt(task.support, steps=3)  # a plain nn.Module
        inputs, target = task.query
        with torch.no_grad():
            correct += (adapted(inputs).argmax(1) == target).float().mean().item()
    accuracy = correct / test_tasks
    print(f"accuracy on {test_tasks} test tasks after 3 inner steps: {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help="the folder that holds Omniglot; drawn characters without it"
    )
    parser.add_argument("--steps", type=int, default=1000, help="meta-steps")
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    main(**vars(parser.parse_args()))
