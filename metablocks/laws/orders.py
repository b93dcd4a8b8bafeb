"""Laws of gradient-order policies."""

from metablocks.errors import LawError
from metablocks.laws.compare import named
from metablocks.order import Order
from metablocks.types import Progress


def decides(order: Order, *, steps: int, progress: Progress) -> None:
    """An order answers every step with a `bool`, and the same one when asked again."""
    for step in range(steps):
        answer = order(step, steps, progress)
        if not isinstance(answer, bool):
            raise LawError(
                f"an order answers with a bool; {named(order)} gave {answer!r} at step {step} of {steps}"
            )
        if order(step, steps, progress) != answer:
            raise LawError(
                f"an order is a pure function; {named(order)} changed its mind at step {step} of {steps}"
            )
