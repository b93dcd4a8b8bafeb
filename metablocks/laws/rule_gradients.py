"""Laws of update rules in a learner: slopes, one gradient everywhere, identities, purity.

`make` makes the rule. Behind a rule that does not descend by itself, such as a transform of the
gradient, goes a rate of 0.1 (`learner_with`).
"""

from typing import Any

import torch

from metablocks.estimators import Adjoint
from metablocks.executors import Vmap
from metablocks.laws import gradients, purity
from metablocks.laws.problem import (
    MakeRule,
    Problem,
    adapted_parameters,
    fixed_draws,
    gradients_like,
    hold,
    perturb,
    tolerance,
)
from metablocks.laws.rules import draws, seeded_rule
from metablocks.learner import MetaLearner
from metablocks.order import Order
from metablocks.rules import Chain, LearningRate, StepInfo
from metablocks.rules.base import members
from metablocks.rules.rates import Granularity
from metablocks.step_loss import StepLoss
from metablocks.types import Tensors


def finite_differences(
    make: MakeRule, problem: Problem, *, step_loss: StepLoss | None = None
) -> None:
    """Law 7: the gradient of every meta-parameter, the rule's own included, is the loss's slope.

    The rule's parameters are moved away from where they start. A rule that declares
    `straight_through` has no slope by its own parameters: they are left out, θ is not.
    """
    learner = perturb(learner_with(make, problem, step_loss=step_loss))
    for member in members(learner.rule):
        if member.straight_through:
            member.requires_grad_(False)
    gradients.slopes_agree(learner, problem)


def plain_autograd(
    make: MakeRule,
    problem: Problem,
    *,
    order: Order | None = None,
    step_loss: StepLoss | None = None,
) -> None:
    """Loss and gradient are those of a hand-written loop in plain autograd, from the same draws.

    The rule's parameters are moved away from where they start. θ ← θ + rule(g): what enters the
    rule, its state and the parameters that it reads, keeps its derivative, under any order.
    """
    learner = perturb(learner_with(make, problem, order=order, step_loss=step_loss))
    gradients.plain_autograd(learner, problem)


def one_gradient(
    make: MakeRule,
    problem: Problem,
    *,
    order: Order | None = None,
    step_loss: StepLoss | None = None,
) -> None:
    """Law 8: `Vmap` and `Adjoint` give the gradient of the plain loop, unrolled.

    Where the rule draws random numbers, those of `Vmap` are others, and `Adjoint` alone is held.
    """

    def learner(**blocks: Any) -> MetaLearner:
        policies = {"order": order, "step_loss": step_loss}
        return perturb(learner_with(make, problem, **policies, **blocks))

    gradients.one_estimator(problem, [Adjoint()], lambda e: learner(estimator=e))
    if not any(draws(make, problem)):
        gradients.one_gradient(
            problem, [Vmap(), Vmap(chunk=2)], lambda executor: learner(executor=executor)
        )


def mean_of_tasks(make: MakeRule, problem: Problem) -> None:
    """Law 13: a batch's gradient is the mean of its tasks', in any order: tasks share no state."""
    learner = perturb(learner_with(make, problem))
    gradients.mean_of_tasks(problem, range(len(problem.tasks))[::-1], learner=learner)


def leaves_no_trace(make: MakeRule, problem: Problem) -> None:
    """Law 9: `meta_gradient`, `evaluate` and `adapt` leave the learner bit for bit as it was."""
    learner = learner_with(make, problem)
    purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(problem.tasks))
    purity.leaves_no_trace(learner, lambda learner: learner.evaluate(problem.tasks))
    purity.leaves_no_trace(learner, lambda learner: learner.adapt(problem.tasks[0].support))


def learner_with(make: MakeRule, problem: Problem, **blocks: Any) -> MetaLearner:
    """A learner that goes by the rule: by itself where it descends, else with a rate of 0.1 behind."""
    params = adapted_parameters(problem)
    trial, steps = seeded_rule(make).setup(params, problem.steps), problem.steps
    gradients = gradients_like(params)
    with fixed_draws(), torch.no_grad():
        updates, _ = trial(gradients, trial.init(params), StepInfo(0, steps, params))
    along = sum(
        float((updates[name] * g).sum()) for name, g in gradients.items() if name in updates
    )
    rule = seeded_rule(make)
    return problem.learner(rule if along < 0 else Chain(rule, LearningRate(0.1)), **blocks)


def equal_rates(
    problem: Problem, granularity: Granularity, *, per_step: bool, rate: float = 0.1
) -> None:
    """Rates of any granularity filled with one value are the scalar rate.

    Law 3: the same query losses and θ-gradient, and the gradients of the rates sum to the scalar
    rate's.
    """
    fine = problem.learner(
        LearningRate(rate, granularity=granularity, per_step=per_step, learn=True)
    ).meta_gradient(problem.tasks)
    scalar = problem.learner(LearningRate(rate, learn=True)).meta_gradient(problem.tasks)
    within = tolerance(problem, float64=1e-10)
    hold("equal rates, loss", {"loss": fine.loss}, {"loss": scalar.loss}, within)
    hold("equal rates, θ", _under(fine.grads, "model."), _under(scalar.grads, "model."), within)
    hold("equal rates, α", _total(fine.grads), _total(scalar.grads), within)


def same_as_without(make: MakeRule, problem: Problem, *, rate: float = 0.1) -> None:
    """A transform at its identity in front of a rate is the rate alone, in loss and θ-gradient.

    Law 4: for KFO, Meta-Curvature, masks and whatever starts as the identity.
    """
    chain = Chain(seeded_rule(make), LearningRate(rate))
    with_rule = problem.learner(chain).meta_gradient(problem.tasks)
    without = problem.learner(LearningRate(rate)).meta_gradient(problem.tasks)
    within = tolerance(problem, float64=1e-10)
    hold("identity, loss", {"loss": with_rule.loss}, {"loss": without.loss}, within)
    hold("identity, θ", _under(with_rule.grads, "model."), without.grads, within)


def _under(grads: Tensors, prefix: str) -> Tensors:
    return {name: grad for name, grad in grads.items() if name.startswith(prefix)}


def _total(grads: Tensors) -> Tensors:
    return {"rate": torch.stack([g.sum() for g in _under(grads, "rule.").values()]).sum()}
