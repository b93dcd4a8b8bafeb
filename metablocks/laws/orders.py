"""Laws of gradient-order policies."""

from metablocks.errors import LawError
from metablocks.laws.compare import named
from metablocks.laws.purity import EPOCHS, is_a_function
from metablocks.order import Order
from metablocks.types import Progress


def decides(order: Order, *, steps: int, progress: Progress) -> None:
    """An order answers every step with a `bool`, a function of step, steps and progress alone.

    Asked hundreds of times and out of order it gives the same answers, and keeps nothing of them.
    """
    for step in range(steps):
        answer = order(step, steps, progress)
        if not isinstance(answer, bool):
            raise LawError(
                f"an order answers with a bool; {named(order)} gave {answer!r} at step {step} of {steps}"
            )
    moments = [progress, *map(Progress, EPOCHS)]
    questions = [(step, steps, moment) for moment in moments for step in range(steps)]
    is_a_function("decides every step", order, questions)
