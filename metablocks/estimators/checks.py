"""What estimators that do not look through the inner loop refuse, by name, when a learner is built."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from metablocks.errors import BlockError
from metablocks.inner import InnerLoop
from metablocks.order import FirstOrder, SecondOrder
from metablocks.step_loss import FinalStepLoss
from metablocks.types import Batch, Tensors

if TYPE_CHECKING:
    from metablocks.learner import MetaLearner


def check_last_step_alone(block: str, learner: "MetaLearner") -> None:
    """Raise `BlockError` unless the learner takes inner steps, and only the last one counts.

    Of orders, `FirstOrder` and `SecondOrder` (the learner's default) say nothing of single steps,
    and stand for "not asked"; any other would be passed over in silence.
    """
    if not learner.steps:
        raise BlockError(
            f"{block} goes by where the inner loop ends; give it steps: 1 or more, not 0"
        )
    if not isinstance(learner.step_loss, FinalStepLoss):
        raise BlockError(
            f"{block} knows the end of the inner loop alone, so that {learner.step_loss!r} would say "
            "nothing; use FinalStepLoss()"
        )
    if not isinstance(learner.order, FirstOrder | SecondOrder):
        raise BlockError(
            f"{block} looks through no inner step, so that {learner.order!r} would say nothing; use "
            "FirstOrder()"
        )


def unreached(
    inner: InnerLoop, meta: Tensors, buffers: Tensors, batches: Iterable[Batch]
) -> list[str]:
    """The meta-parameters that the loss depends on for none of the batches, before any step."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in meta.items()}
    found: set[str] = set()
    with torch.enable_grad():
        carry = inner.start(leaves, buffers)
        for batch in batches:
            loss = inner.query(leaves, carry, batch, 0).loss
            if not loss.requires_grad:
                continue
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            found |= {name for name, grad in zip(meta, grads, strict=True) if grad is not None}
    return [name for name in meta if name not in found]


def first_order(inner: InnerLoop) -> InnerLoop:
    """The same inner loop, differentiated through nowhere."""
    return replace(inner, through=(False,) * inner.steps)
