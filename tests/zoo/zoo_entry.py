"""An entry of the zoo: a public model at tiny size, its tasks, what PyTorch cannot do with it.

    support and query: (inputs, target), each leaf [tasks, examples, ...]

Models have random weights and are float64. Everything that an entry makes follows from `SEED`: two
models of one entry are equal and share no tensor, so that one may be held to the other.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metablocks as mb

SEED = 0
TASKS, SUPPORT, QUERY, CLASSES = 2, 3, 2, 3
STEPS, RATE = 2, 0.1

NO_SAVED_TENSOR_HOOKS = "torch.func.grad has no hooks on saved tensors, which checkpoints are"

Batch = tuple[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model, its tasks and its loss."""

    name: str
    kind: str
    """What no other entry has: the reason that this one is in the zoo."""
    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    """`batch(n, task)` is a batch of n examples of the task of that number."""
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    plain: Callable[[], nn.Module] | None = None
    """The same function as a model that plain autograd is right about, where `make`'s is not."""
    fused_attention: bool = False
    """Second derivatives exist in PyTorch's math attention only."""
    no_second: str = ""
    """The name of the module without a second derivative; the class, if it is the model itself."""
    no_vmap: str = ""
    """Why `torch.func.vmap` cannot run it."""
    no_vmap_evaluate: str = ""
    """Why `torch.func.vmap` cannot run or return it in `eval()`, though it can in `train()`."""
    stacked: bool = True
    """Tasks may be stacked along a new first dimension; else they are given as a list."""
    random: bool = False
    """Draws random numbers: under `vmap` others than in a loop, by PyTorch's definition."""
    tolerance: float = 1e-9
    """Of a gradient, relative to its norm. See `close`."""

    def model(self) -> nn.Module:
        """A new model, in `train()` mode."""
        return self._build(self.make)

    def plain_model(self) -> nn.Module:
        """A new model for the reference."""
        return self._build(self.plain or self.make)

    def tasks(self) -> list[mb.Task]:
        """The tasks one by one."""
        seed(SEED + 1)
        return [mb.Task(self.batch(SUPPORT, t), self.batch(QUERY, t)) for t in range(TASKS)]

    def _build(self, make: Callable[[], nn.Module]) -> nn.Module:
        seed(SEED)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return make().double().train()
        finally:
            torch.set_default_dtype(default)


def seed(number: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def images(size: int, channels: int = 3) -> Callable[[int, int], Batch]:
    """Square images and classes."""

    def batch(n: int, _: int) -> Batch:
        return normal(n, channels, size, size), torch.randint(0, CLASSES, (n,))

    return batch


def vectors(*shape: int, outputs: int = CLASSES) -> Callable[[int, int], Batch]:
    """Inputs of one shape and targets of a regression."""
    return lambda n, _: (normal(n, *shape), normal(n, outputs))


def tokens(length: int, words: int = 20) -> Callable[[int, int], Batch]:
    """Words by number, and classes."""

    def batch(n: int, _: int) -> Batch:
        return torch.randint(0, words, (n, length)), torch.randint(0, CLASSES, (n,))

    return batch


def normal(*shape: int) -> Tensor:
    """Normal draws in float64."""
    return torch.randn(*shape, dtype=torch.float64)
