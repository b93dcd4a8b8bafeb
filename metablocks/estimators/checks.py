"""What estimators that do not look through the inner loop refuse, by name, when a learner is built."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metablocks.errors import BlockError
from metablocks.estimators.unrolled import each_carry
from metablocks.inner import InnerLoop, QueryPass
from metablocks.order import FirstOrder, SecondOrder
from metablocks.step_loss import FinalStepLoss

if TYPE_CHECKING:
    from metablocks.learner import MetaLearner


def check_last_step_alone(block: str, learner: "MetaLearner") -> None:
    """Raise `BlockError` unless the learner takes inner steps, and only the last one counts.

    Of orders, `FirstOrder` and `SecondOrder` (the learner's default) say nothing of single steps,
    and stand for "not asked"; any other would be passed over in silence.
    """
    if not learner.steps:
        raise BlockError(
            f"{block} goes by where the inner loop ends; give it steps: 1 or more, not 0",
            block="MetaLearner",
            field="steps",
        )
    if not isinstance(learner.step_loss, FinalStepLoss):
        raise BlockError(
            f"{block} knows the end of the inner loop alone, so that {learner.step_loss!r} would say "
            "nothing; use FinalStepLoss()",
            block="MetaLearner",
            field="step_loss",
        )
    if not isinstance(learner.order, FirstOrder | SecondOrder):
        raise BlockError(
            f"{block} looks through no inner step, so that {learner.order!r} would say nothing; use "
            "FirstOrder()",
            block="MetaLearner",
            field="order",
        )


def first_order(inner: InnerLoop) -> InnerLoop:
    """The same inner loop, differentiated through nowhere."""
    return replace(inner, through=(False,) * inner.steps)


def at_the_end(inner: InnerLoop, query: QueryPass) -> dict[str, Any]:
    """Losses and scores `[steps + 1]` of the last carry alone, for a `TaskGradient`."""
    score = None if query.score is None else each_carry(inner, {inner.steps: query.score})
    return {"query_losses": each_carry(inner, {inner.steps: query.loss}), "scores": score}
