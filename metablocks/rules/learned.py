"""Hyper-parameters of rules that the outer loop may learn, stored so that every real number is legal.

A momentum or a β in (0, 1) is stored as its logit, a decay above 0 as its logarithm, under the name of
the hyper-parameter. Until `setup`, and in a rule that does not learn, the attribute is the number.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

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


def text(stored: Number) -> str:
    """The hyper-parameter in a `repr`."""
    return "learned" if isinstance(stored, Tensor) else str(stored)


def check_learnable(block: str, **numbers: float) -> None:
    """Raise `RuleError` for a hyper-parameter of 0, from which no learning leads away."""
    for name, number in numbers.items():
        if not number:
            raise RuleError(
                f"{block} learn is True, but {name} is 0, whose logarithm is not finite; begin above 0, "
                "or leave learn out",
                block=block,
                field=name,
            )


def begin_learning(
    rule: UpdateRule, names: Iterable[str], params: Tensors, store: Callable[[float], float]
) -> None:
    """Replace hyper-parameters of a rule, numbers, by parameters that store them; once.

    They are scalars of the precision of `params`, float32 or better.
    """
    for name in names:
        number = getattr(rule, name)
        if isinstance(number, Tensor):
            block = type(rule).__name__
            raise RuleError(f"this {block} is set up already; make a new one for each learner")
        stored = real_full(list(params.values()), (), store(number))
        precise = torch.promote_types(stored.dtype, torch.float32)
        setattr(rule, name, nn.Parameter(stored.to(precise)))
