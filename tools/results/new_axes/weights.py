"""The weights that a run of `reweighting_strokes` gives right and wrong support labels, as a picture.

    python tools/results/new_axes/weights.py RUN PICTURE

Before the first and after the last inner step, over 40 test tasks. Prints the mean weight of each, and
the share of pairs (a right label, a wrong one of the same task) in which the right one weighs more.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F

import metablocks as mb

TASKS = 40


def weights(learner: mb.MetaLearner, source: Any, steps: int) -> list[tuple[Any, Any]]:
    """Weights of the right and of the wrong examples, for each task."""
    clean = replace(source, wrong_labels=0.0)
    pairs = []
    net: Any = learner.support_loss
    for number in range(TASKS):
        inputs, labels = source.sample("test", [number])[0].support
        right = labels == clean.sample("test", [number])[0].support[1]
        adapted = learner.adapt((inputs, labels), steps=steps).train()
        with torch.no_grad():
            losses = F.cross_entropy(adapted(inputs), labels, reduction="none")
            weight = net.net(losses[:, None])[:, 0].sigmoid()
        pairs.append((weight[right], weight[~right]))
    return pairs


def main(run: str, picture: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    learner, source, _ = mb.load_run(Path(run), device="cpu")
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, steps in zip(axes, (0, learner.steps), strict=True):
        pairs = weights(learner, source, steps)
        right, wrong = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        above = sum((r[:, None] > w).double().mean().item() for r, w in pairs) / len(pairs)
        print(
            f"{steps} steps: right {right.mean():.3f}, wrong {wrong.mean():.3f}, above {above:.3f}"
        )
        bins = torch.linspace(0, 1, 41).tolist()
        axis.hist([right.numpy(), wrong.numpy()], bins, label=["right label", "wrong label"])
        axis.set_title(f"after {steps} inner steps")
        axis.set_xlabel("weight")
    axes[0].set_ylabel("support examples")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
