"""Gradient-order policies: through which inner steps the meta-gradient looks.

    order(step, steps, progress) -> bool          is step number `step` differentiated through?

A step that is not passes its *gradient* on as a constant, never its parameters or its rate: the
factor I − α ∇²L_s of that step becomes I, and a learned rate still gets its own gradient
−⟨g_k, λ⟩ (FOMAML, Finn, Abbeel, Levine 2017).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from metablocks.checks import CountFrom0, checked, name_of, wrong_answer
from metablocks.types import Progress


@runtime_checkable
class Order(Protocol):
    """A gradient-order policy.

    Law: a function of its arguments alone, and its answer is a `bool`.

    >>> import metablocks as mb
    >>> def every_other(step, steps, progress):          # an order of one's own
    ...     return (steps - step) % 2 == 1
    >>> [every_other(step, 5, mb.Progress()) for step in range(5)]
    [True, False, True, False, True]
    """

    def __call__(self, step: int, steps: int, progress: Progress) -> bool:
        """True if step `step` (0 … steps − 1) is differentiated through."""


@checked()
@dataclass(frozen=True)
class SecondOrder:
    """MAML: every step is differentiated through.

    Source: Finn, Abbeel, Levine 2017.

    >>> import metablocks as mb
    >>> mb.SecondOrder()(0, 5, mb.Progress())
    True
    """

    def __call__(self, step: int, steps: int, progress: Progress) -> bool:
        return True


@checked()
@dataclass(frozen=True)
class FirstOrder:
    """FOMAML: no step is.

    Source: Finn, Abbeel, Levine 2017.

    >>> import metablocks as mb
    >>> mb.FirstOrder()(4, 5, mb.Progress())
    False
    """

    def __call__(self, step: int, steps: int, progress: Progress) -> bool:
        return False


@checked()
@dataclass(frozen=True, kw_only=True)
class TruncatedOrder:
    """The last `last` steps are differentiated through, the ones before are first-order.

    - `last`: steps at the end that are differentiated through, at most those of the learner.

    Law: `last=steps` is second order, `last=0` is first order.
    Source: Shaban, Cheng, Hatch, Boots 2019 (truncated back-propagation for bilevel optimisation).

    >>> import metablocks as mb
    >>> [mb.TruncatedOrder(last=2)(step, 5, mb.Progress()) for step in range(5)]
    [False, False, False, True, True]

    Raises `BlockError` for a negative `last`, and in a learner with fewer steps than `last`.
    """

    last: CountFrom0

    def __call__(self, step: int, steps: int, progress: Progress) -> bool:
        return step >= steps - self.last


@checked()
@dataclass(frozen=True, kw_only=True)
class AnnealedOrder:
    """First order before epoch `first_order_epochs`, second order from it on.

    - `first_order_epochs`: epochs at the beginning that are first-order.

    Source: Antoniou, Edwards, Storkey 2018 (derivative-order annealing, DA).

    >>> import metablocks as mb
    >>> order = mb.AnnealedOrder(first_order_epochs=50)
    >>> order(0, 5, mb.Progress(epoch=49)), order(0, 5, mb.Progress(epoch=50))
    (False, True)

    Raises `BlockError` for a negative number of epochs.
    """

    first_order_epochs: CountFrom0

    def __call__(self, step: int, steps: int, progress: Progress) -> bool:
        return progress.epoch >= self.first_order_epochs


def steps_through(order: Order, steps: int, progress: Progress) -> tuple[bool, ...]:
    """The order's answer for every step.

    >>> steps_through(TruncatedOrder(last=1), 3, Progress())
    (False, False, True)

    Raises `BlockError` for an answer that is not a bool.
    """
    answers = tuple(order(step, steps, progress) for step in range(steps))
    for answer in answers:
        if not isinstance(answer, bool | np.bool_):
            raise wrong_answer("order", name_of(order), answer, "True or False")
    return answers
