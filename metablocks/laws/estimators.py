"""Laws of estimators: what every one obeys, and what those do that claim the exact gradient."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.errors import GradientError, LawError
from metablocks.estimators import Estimator
from metablocks.executors import Vmap
from metablocks.laws import gradients, purity
from metablocks.laws.problem import (
    MakeRule,
    Problem,
    hold,
    perturb,
    tolerance,
)
from metablocks.learner import MetaLearner
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.rules import Chain, LearningRate, Momentum
from metablocks.step_loss import StepLoss
from metablocks.types import Progress, TaskBatch, Tensors

# ---- every estimator


def one_executor(estimator: Estimator, problem: Problem) -> None:
    """Law 8: it composes with `torch.func.vmap`: every executor gives the loop's gradient."""
    gradients.one_gradient(
        problem,
        [Vmap(), Vmap(chunk=2)],
        lambda executor: problem.learner(estimator=estimator, executor=executor),
    )


def mean_of_tasks(estimator: Estimator, problem: Problem) -> None:
    """Law 13: a batch's gradient is the mean of its tasks' gradients, in any order of tasks."""
    gradients.mean_of_tasks(problem, range(len(problem.tasks))[::-1], estimator=estimator)


def leaves_no_trace(estimator: Estimator, problem: Problem) -> None:
    """Law 9: parameters, buffers, flags and random states stay, also when the loss raises."""
    learner = problem.learner(estimator=estimator)
    purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(problem.tasks))
    purity.leaves_no_trace_of_an_error(
        problem, lambda loss: problem.learner(loss=loss, estimator=estimator)
    )


def names_what_is_idle(estimator: Estimator, problem: Problem) -> None:
    """A meta-parameter that no loss depends on is named in a `GradientError`, and no other is."""

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
            raise LawError(f"names what is idle: model.idle is, given {names}") from error
    else:
        raise LawError(
            "names what is idle: the loss does not depend on model.idle; nothing was said"
        )


# ---- exact estimators


def equals_unrolled(
    estimator: Estimator,
    problem: Problem,
    *,
    rule: MakeRule | None = None,
    order: Order | None = None,
    step_loss: StepLoss | None = None,
    progress: Progress | None = None,
) -> None:
    """Law 8: an exact estimator gives `Unrolled`'s loss, gradient and buffers, from the same draws."""

    def learner(estimator: Estimator) -> MetaLearner:
        made = rule() if rule else LearningRate(0.1)
        policies = {"order": order, "step_loss": step_loss}
        return perturb(problem.learner(made, estimator=estimator, **policies))

    gradients.one_estimator(problem, [estimator], learner, progress=progress)


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

    within = tolerance(problem, float64=1e-12)
    hold("zero Hessian", gradient(FirstOrder()), gradient(SecondOrder()), within)


def closed_form(estimator: Estimator, problem: Problem, *, rate: float = 0.1) -> None:
    """Law 6: on `laws.problem.quadratic` an exact gradient is Π(I − αA) …, to both orders."""
    gradients.quadratic(problem, rate=rate, estimator=estimator)
    first = FirstOrder()
    gradients.quadratic(problem, rate=rate, order_two=False, order=first, estimator=estimator)


def finite_differences(
    estimator: Estimator,
    problem: Problem,
    *,
    step_loss: StepLoss | None = None,
    progress: Progress | None = None,
) -> None:
    """Law 7: an exact gradient is the loss's slope, for every meta-parameter."""
    rule = Chain(Momentum(0.5), LearningRate(0.1, granularity="tensor", per_step=True, learn=True))
    learner = problem.learner(rule, step_loss=step_loss, estimator=estimator)
    gradients.slopes_agree(learner, problem, progress=progress)


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
    count, generator = len(problem.tasks), torch.Generator().manual_seed(0)
    slope = torch.randn(
        count, len(flat), generator=generator, dtype=torch.float64, device="cpu"
    ).to(flat)
    zero, one, nothing = flat.new_zeros(count), flat.new_ones(count), flat.new_zeros(count, 1)
    tasks = TaskBatch((nothing, (slope, zero)), (nothing, (slope, one)))
    return Problem(Flat, loss, tasks, problem.steps)
