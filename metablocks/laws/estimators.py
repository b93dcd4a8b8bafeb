"""Laws of estimators: of every one, and of those that claim the exact gradient."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.errors import GradientError, LawError
from metablocks.estimators import Estimator
from metablocks.laws import gradients
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, noise_like, perturb
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.rules import LearningRate
from metablocks.types import Progress, TaskBatch, Tensors


def names_what_is_idle(estimator: Estimator, problem: Problem) -> None:
    """Law 16: a meta-parameter that no loss depends on is named in an error, and no other is."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = problem.model()
            like = next(self.used.parameters())
            self.idle = nn.Parameter(torch.ones(2).to(like))

        def forward(self, inputs: Any) -> Any:
            return self.used(inputs)

    learner = replace(problem, model=Idle, adapt="*").learner(estimator=estimator)
    try:
        learner.meta_gradient(problem.tasks)
    except GradientError as error:
        names = [n for n, p in learner.named_parameters() if p.requires_grad and n in str(error)]
        if names != ["model.idle"]:
            raise LawError(f"names what is idle: {names}, expected model.idle") from error
    else:
        raise LawError(
            "names what is idle: the loss does not depend on model.idle; no error said so"
        )


def equals_unrolled(
    estimator: Estimator, problem: Problem, *, progress: Progress | None = None, **blocks: Any
) -> None:
    """Law 8: an exact estimator gives `Unrolled`'s loss, gradient and buffers, from the same draws."""
    gradients.one_estimator(
        problem,
        [estimator],
        lambda estimator: perturb(problem.learner(estimator=estimator, **blocks), "rule."),
        progress=progress,
    )


def zero_hessian(estimator: Estimator, problem: Problem) -> None:
    """Law 1: with a support loss linear in the parameters, first order is second order.

    First order makes a constant of a step's gradient. An estimator that makes one of the parameters
    loses what they came from, and θ its gradient.
    """
    linear = _linear_support(problem)

    def gradient(order: Order) -> Tensors:
        rule = LearningRate(0.1, learn=True)
        return (
            linear.learner(rule, order=order, estimator=estimator).meta_gradient(linear.tasks).grads
        )

    assert_close("zero Hessian", gradient(FirstOrder()), gradient(SecondOrder()), 1e-12)


def closed_form(estimator: Estimator, problem: Problem, *, rate: float = 0.1) -> None:
    """Law 6: on `Case(kind="quadratic")` an exact gradient is Π(I − αA) …, to both orders."""
    gradients.quadratic(problem, rate=rate, estimator=estimator)
    first = FirstOrder()
    gradients.quadratic(problem, rate=rate, order_two=False, order=first, estimator=estimator)


def _linear_support(problem: Problem) -> Problem:
    """The same parameters and number of tasks under another loss: linear on support, cubic on query."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.model()

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([p.flatten() for p in self.parameters()])

    def loss(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        slope, cubic = target
        return slope @ prediction + cubic * prediction.pow(3).sum()

    flat = torch.cat([p.detach().flatten() for p in problem.model().parameters()])
    count = len(problem.tasks)
    slope = noise_like({"slope": flat.expand(count, -1)})["slope"]
    zero, one, nothing = flat.new_zeros(count), flat.new_ones(count), flat.new_zeros(count, 1)
    tasks = TaskBatch((nothing, (slope, zero)), (nothing, (slope, one)))
    return Problem(Flat, loss, tasks, problem.steps)
