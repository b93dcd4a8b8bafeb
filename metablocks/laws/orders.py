"""Laws of gradient-order policies."""

from collections.abc import Iterable

from metablocks.errors import LawError
from metablocks.laws.problem import Problem, hold
from metablocks.order import AnnealedOrder, FirstOrder, Order, SecondOrder, TruncatedOrder
from metablocks.types import Progress


def decides(order: Order, steps: int, progress: Progress) -> None:
    """An order answers every step with a `bool`, and the same one when asked again."""
    for step in range(steps):
        answer = order(step, steps, progress)
        if not isinstance(answer, bool):
            raise LawError(
                f"an order answers with a bool; {order!r} gave {answer!r} at step {step}"
            )
        if order(step, steps, progress) != answer:
            raise LawError(
                f"an order is a pure function; {order!r} changed its mind at step {step}"
            )


def equivalent(
    problem: Problem, one: Order, other: Order, *, progress: Progress | None = None
) -> None:
    """Two orders give one meta-gradient, bit for bit."""
    first = problem.learner(order=one).meta_gradient(problem.tasks, progress=progress)
    second = problem.learner(order=other).meta_gradient(problem.tasks, progress=progress)
    hold(f"{one!r} = {other!r}", first.grads, second.grads, within=0)


def truncation_ends(problem: Problem) -> None:
    """Law 11: truncated at all steps is second order, at none first order."""
    equivalent(problem, TruncatedOrder(last=problem.steps), SecondOrder())
    equivalent(problem, TruncatedOrder(last=0), FirstOrder())


def annealing_switches(problem: Problem, epoch: int, others: Iterable[float]) -> None:
    """Law 11: annealed order is first order before its epoch, and second order from it on."""
    order = AnnealedOrder(first_order_epochs=epoch)
    for other in others:
        stated: Order = SecondOrder() if other >= epoch else FirstOrder()
        equivalent(problem, order, stated, progress=Progress(epoch=other))
