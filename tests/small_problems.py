"""Problems that the tests run laws on, beside the cases of `metablocks.laws.cases`: models that ship.

Each takes `seed`, `tasks`, `steps`, `device` and `dtype`, which is float64 where the device has it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from metablocks.devices import has_float64
from metablocks.generators import kept_draws
from metablocks.laws.cases import Case, Problem
from metablocks.models import MLP, Conv4
from metablocks.rules.base import NamedTensors
from metablocks.types import TaskBatch


def regression(*, hidden=(4, 3), **options: Any) -> Problem:
    """Regression of random targets `[tasks, 5, 2]` on inputs `[tasks, 5, 3]` by a tanh MLP."""
    return _problem(
        lambda: MLP(input_shape=(3,), outputs=2, hidden=hidden, activation="tanh"),
        F.mse_loss,
        lambda draw, examples, device: (draw(examples, 3), draw(examples, 2)),
        **options,
    )


def classification(*, layers=2, filters=3, **options: Any) -> Problem:
    """3-way 2-shot classification of random 8×8 images by a smooth conv net with batch norm."""
    shapes = {"input_shape": (1, 8, 8), "outputs": 3, "filters": filters, "layers": layers}

    def batch(draw, _, device):
        images = draw(6, 1, 8, 8)
        return images, torch.arange(3, device=device).repeat(2).expand(len(images), 6)

    return _problem(
        lambda: Conv4(**shapes, activation="softplus"), F.cross_entropy, batch, **options
    )


def quadratic(*, size=4, device="cpu", dtype=None, tasks=3, steps=3, seed=0) -> Problem:
    """L(θ) = ½ θᵀAθ − bᵀθ, support and query each with their own positive definite A and b."""
    case = Case(kind="quadratic", width=size, tasks=tasks, steps=steps, seed=seed)
    return case.problem(device=device, dtype=dtype)


def shapes(*, tasks=1, steps=2, **options: Any) -> Problem:
    """A model with a parameter of every number of dimensions, from a scalar to a 3D convolution."""
    return _problem(
        EveryShape,
        F.mse_loss,
        lambda draw, examples, device: (draw(examples, 1), draw(examples, len(SHAPES))),
        tasks=tasks,
        steps=steps,
        **options,
    )


SHAPES = {
    "scale": (),
    "norm.bias": (4,),
    "head.weight": (2, 3),
    "conv1.weight": (2, 3, 5),
    "conv2.weight": (2, 3, 2, 2),
    "conv3.weight": (2, 3, 1, 2, 2),
}
"""The parameters of the model of `shapes`."""


class EveryShape(NamedTensors):
    """A parameter of every shape."""

    def __init__(self):
        super().__init__({name: torch.randn(s) for name, s in SHAPES.items()}, learn=True)

    def forward(self, inputs):
        return torch.stack([(p.flatten() * inputs).tanh().mean(1) for p in self.parameters()], 1)


def _problem(model, loss, batch, *, seed=0, tasks=3, steps=3, device="cpu", dtype=None) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    if dtype is None:
        dtype = torch.float64 if has_float64(device) else torch.float32

    def draw(*shape):
        noise = torch.randn(tasks, *shape, generator=generator, dtype=torch.float64, device="cpu")
        return noise.to(device, dtype)

    def seeded() -> nn.Module:
        with kept_draws():
            torch.manual_seed(seed)
            return model().to(device, dtype)

    sets = TaskBatch(support=batch(draw, 5, device), query=batch(draw, 4, device))
    return Problem(seeded, loss, sets, steps)
