"""Laws of truncated and annealed orders (11) and of annealed and one-hot step losses (5)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from metablocks.errors import LawError
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, named
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.step_loss import FinalStepLoss
from metablocks.types import Progress


def equivalent(
    problem: Problem, one: Order, other: Order, *, progress: Progress | None = None
) -> None:
    """Law 11: two orders that decide alike give one meta-gradient, bit for bit."""
    first = problem.learner(order=one).meta_gradient(problem.tasks, progress=progress)
    second = problem.learner(order=other).meta_gradient(problem.tasks, progress=progress)
    assert_close(f"{named(one)} = {named(other)}", first.grads, second.grads, within=0)


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
            raise LawError(f"truncation: expected the last {last} of {steps} steps, got {answers}")


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


def ends_at_final(step_loss: Any, *, steps: int, later: float) -> None:
    """Law 5: from the end of its annealing on a step loss is the final one, exactly.

    `step_loss` has a field `epochs`, which says where it ends; `later` is how many epochs after.
    """
    progress = Progress(step_loss.epochs + later)
    weights, final = step_loss(steps, progress), FinalStepLoss()(steps, progress)
    if not torch.equal(weights.double(), final):
        raise LawError(
            f"ends at final: {named(step_loss)} at {progress} is {weights.tolist()}, not the final step"
        )


def one_hot_is_final(problem: Problem) -> None:
    """Law 5: all weight on the last step is the final step loss; nothing else is computed."""

    def one_hot(steps: int, progress: Progress) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(steps), steps + 1).double()

    got = problem.learner(step_loss=one_hot).meta_gradient(problem.tasks)
    expected = problem.learner(step_loss=FinalStepLoss()).meta_gradient(problem.tasks)
    assert_close("one-hot at the last step is final", got.grads, expected.grads, within=0)
    if int(torch.isfinite(got.query_losses[0]).sum()) != 1:
        raise LawError(f"a step of weight 0 was computed: {got.query_losses[0].tolist()}")
