"""Rules with hyper-parameters that the outer loop may learn, stored so that every real number is legal.

A momentum or a β in (0, 1) is stored as its logit, a decay above 0 as its logarithm, under the name of
the hyper-parameter. Until `setup`, and in a rule that does not learn, the attribute is the number.
"""

import math
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from metablocks.errors import RuleError
from metablocks.rules.base import UpdateRule, real_full
from metablocks.types import Tensors

Number: TypeAlias = float | Tensor


def logit(share: float) -> float:
    """The real number that `share` gives back as one between 0 and 1.

    >>> logit(0.5), round(logit(0.9), 4)
    (0.0, 2.1972)
    """
    return math.log(share) - math.log1p(-share)


def share(stored: Number) -> Number:
    """A hyper-parameter in (0, 1): the number, or what the stored logit stands for."""
    return torch.sigmoid(stored) if isinstance(stored, Tensor) else stored


def positive(stored: Number) -> Number:
    """A hyper-parameter above 0: the number, or what the stored logarithm stands for."""
    return torch.exp(stored) if isinstance(stored, Tensor) else stored


def like(tensor: Tensor, number: Number) -> Any:
    """The number in the real dtype of a tensor, for arithmetic with it."""
    return number.to(tensor.dtype.to_real()) if isinstance(number, Tensor) else number


class LearnedRule(UpdateRule):
    """A rule of some hyper-parameters, numbers by name, which are learned with `learn`."""

    store: Callable[[float], float] = staticmethod(logit)
    """The number that stands for a hyper-parameter where it is learned."""

    def __init__(self, learn: bool, **numbers: float) -> None:
        super().__init__()
        self.learn = learn
        self._names = tuple(numbers)
        for name, number in numbers.items():
            setattr(self, name, number)
            if learn and not number:
                block = type(self).__name__
                raise RuleError(
                    f"{block} learn is True, but {name} is 0, whose logarithm is not finite; begin "
                    "above 0, or leave learn out",
                    block=block,
                    field=name,
                )

    def _shown(self, name: str) -> str:
        """A hyper-parameter in a `repr`."""
        stored = getattr(self, name)
        return "learned" if isinstance(stored, Tensor) else str(stored)

    @property
    def _learns(self) -> str:
        return ", learn=True" if self.learn else ""

    def setup(self, params: Tensors, steps: int) -> Self:
        """Begin to learn the hyper-parameters, if they are to be learned.

        They are stored as scalars of the precision of `params`, float32 or better.
        """
        for name in self._names if self.learn else ():
            self._check_new(self._parameters.get(name))
            stored = real_full(list(params.values()), (), self.store(getattr(self, name)))
            precise = torch.promote_types(stored.dtype, torch.float32)
            setattr(self, name, nn.Parameter(stored.to(precise)))
        return self
