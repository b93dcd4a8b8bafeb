"""Laws of gradient-order policies."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from metablocks.errors import LawError
from metablocks.estimators import Adjoint
from metablocks.laws import gradients
from metablocks.laws.problem import MakeRule, Problem, hold, named
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.rules import LearningRate
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


def detaches_gradients(
    order: Order, problem: Problem, *, progress: Progress | None = None, rate: float = 0.1
) -> None:
    """Under an order, a step's *gradient* is a constant wherever the order says so, and nothing else.

    The meta-gradient is that of plain autograd, θ ← θ − α g, with g detached where the order answers
    `False`, never θ or α; `rate` is learned.
    """
    learner = problem.learner(LearningRate(rate, learn=True), order=order)
    gradients.plain_autograd(learner, problem, progress=progress)


def one_gradient(
    order: Order, problem: Problem, *, rule: MakeRule, progress: Progress | None = None
) -> None:
    """Law 8: under an order, `Adjoint` gives the gradient of `Unrolled`."""
    gradients.one_estimator(
        problem,
        [Adjoint(), Adjoint(keep_every=2)],
        lambda estimator: problem.learner(rule(), order=order, estimator=estimator),
        progress=progress,
    )


def equivalent(
    problem: Problem, one: Order, other: Order, *, progress: Progress | None = None
) -> None:
    """Two orders give one meta-gradient, bit for bit."""
    first = problem.learner(order=one).meta_gradient(problem.tasks, progress=progress)
    second = problem.learner(order=other).meta_gradient(problem.tasks, progress=progress)
    hold(f"{named(one)} = {named(other)}", first.grads, second.grads, within=0)


def truncation_ends(order: Any, problem: Problem, *, progress: Progress | None = None) -> None:
    """Law 11: truncated at all steps is second order, at none first order, between them between.

    `order` is a dataclass with a field `last`, the number of steps that it looks through.
    """
    steps, progress = problem.steps, progress or Progress()

    def truncated(last: int) -> Order:
        made: Order = replace(order, last=last)
        return made

    equivalent(problem, truncated(steps), SecondOrder(), progress=progress)
    equivalent(problem, truncated(0), FirstOrder(), progress=progress)
    for last in range(steps + 1):
        answers = [truncated(last)(step, steps, progress) for step in range(steps)]
        if answers != [False] * (steps - last) + [True] * last:
            raise LawError(f"truncation: the last {last} of {steps} steps are due, given {answers}")


def annealing_switches(
    order: Any, problem: Problem, *, epoch: int, others: Iterable[float]
) -> None:
    """Law 11: annealed order is first order before its epoch, and second order from it on.

    `order` is a dataclass with a field `first_order_epochs`, the epoch at which it switches.
    """
    order = replace(order, first_order_epochs=epoch)
    for other in others:
        stated: Order = SecondOrder() if other >= epoch else FirstOrder()
        equivalent(problem, order, stated, progress=Progress(epoch=other))
