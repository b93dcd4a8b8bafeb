"""Blocks from outside metablocks, for the tests of `--allow`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from metablocks.checks import Positive, checked
from metablocks.rules import StepInfo, UpdateRule
from metablocks.tasks import Sinusoid, Split
from metablocks.types import Progress, TaskBatch


@checked()
class Sign(UpdateRule):
    """Move by the gradient's sign."""

    def __init__(self, *, rate: Positive) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, updates: dict[str, Tensor], state: Any, step: StepInfo
    ) -> tuple[dict[str, Tensor], Any]:
        return {name: -self.rate * u.sign() for name, u in updates.items()}, state


class FailsLater(UpdateRule):
    """Fails in its first step."""

    def forward(
        self, updates: dict[str, Tensor], state: Any, step: StepInfo
    ) -> tuple[dict[str, Tensor], Any]:
        raise KeyError("by design")


@dataclass(frozen=True)
class NoValidation(Sinusoid):
    """Tasks that are there for training alone."""

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        if split == "validation":
            raise KeyError("by design")
        return super().sample(split, indices)


@dataclass(frozen=True)
class NotARule:
    rate: float = 0.1


class Fails(UpdateRule):
    def __init__(self) -> None:
        raise ZeroDivisionError("by design")


def needs(callback: Callable[[], int], rate: float = 0.1) -> Sign:
    return Sign(rate=rate)


@dataclass
class Made:
    """A factory that is an object, and cannot be hashed."""

    sign: float

    def __call__(self, *, rate: Annotated[float, {"unit": "1"}], times: float = 1) -> Sign:
        return Sign(rate=self.sign * rate * times)


made = Made(1.0)
VALUE = 3


def brighter(*, by: float = 0.1) -> Callable[[Tensor], Tensor]:
    """A transform of one's own."""
    return lambda image: image + by


def pairs(*, examples: int) -> list[tuple[Tensor, int]]:
    """A data set of one's own, of six classes."""
    return [(torch.full((1, 8, 8), float(n)), n % 6) for n in range(examples)]


class OutsideLoss(torch.nn.Module):
    """A loss with a parameter that is learned, and one of the model that it asks for."""

    def __init__(self, *, decay: Positive) -> None:
        super().__init__()
        self.decay = torch.nn.Parameter(torch.tensor(decay))

    def forward(self, prediction: Tensor, target: Tensor, *, params: dict[str, Tensor]) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in params.values()]).sum()
        return (prediction - target).abs().mean() + self.decay * penalty


def every_step(step: int, steps: int, progress: Progress) -> bool:
    """An order itself, which a recipe cannot make."""
    return True


def make_every_step() -> Callable[..., bool]:
    return every_step
