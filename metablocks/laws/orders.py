"""Laws of gradient-order policies."""

from metablocks.errors import LawError
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, named
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


def equivalent(
    problem: Problem, one: Order, other: Order, *, progress: Progress | None = None
) -> None:
    """Law 11: two orders that decide alike give one meta-gradient, bit for bit."""
    first = problem.learner(order=one).meta_gradient(problem.tasks, progress=progress)
    second = problem.learner(order=other).meta_gradient(problem.tasks, progress=progress)
    assert_close(f"{named(one)} = {named(other)}", first.grads, second.grads, within=0)
