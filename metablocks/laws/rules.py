"""Laws of update rules."""

from collections.abc import Callable
from typing import Any

import torch

from metablocks.errors import LawError
from metablocks.inner import Trajectory, adapt
from metablocks.laws.problem import MakeRule, Problem, hold, tolerance
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.rules import Chain, LearningRate, StepInfo, UpdateRule
from metablocks.rules.rates import Granularity
from metablocks.types import Tensors


def fits_the_gradients(rule: MakeRule, params: Tensors, steps: int = 2) -> None:
    """Updates have the names, shapes and dtypes of the gradients, and no argument is changed."""
    ready = rule().setup(params, steps)
    state = ready.init(params)
    gradients = {name: torch.randn_like(p) for name, p in params.items()}
    before = {name: g.clone() for name, g in gradients.items()}
    for index in range(steps):
        updates, state = ready(gradients, state, StepInfo(index, steps, params))
        for name, gradient in gradients.items():
            if name not in updates:
                raise LawError(f"fits the gradients: no update for {name}")
            if updates[name].shape != gradient.shape or updates[name].dtype != gradient.dtype:
                raise LawError(
                    f"fits the gradients: the update of {name} is {list(updates[name].shape)} "
                    f"{updates[name].dtype}, its gradient {list(gradient.shape)} {gradient.dtype}"
                )
        hold("a rule changes none of its arguments", gradients, before, within=0)


def zero_hessian(rule: MakeRule, *, steps: int = 3, seed: int = 0) -> None:
    """With a support loss linear in the parameters, first order is second order.

    Law 1; for every rule that does not read the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def gradient(order: Order) -> Tensors:
        ready = _seeded(rule).setup({"w": start}, steps)

        def outcome(w: torch.Tensor) -> torch.Tensor:
            trajectory = adapt(_linear, {"w": w}, (slope, ()), rule=ready, steps=steps, order=order)
            return trajectory.params[-1]["w"].pow(3).sum()

        return {"w": torch.func.grad(outcome)(start)}

    hold("zero Hessian", gradient(FirstOrder()), gradient(SecondOrder()), within=1e-12)


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


def same_as_without(rule: MakeRule, problem: Problem, *, rate: float = 0.1) -> None:
    """A transform at its identity in front of a rate is the rate alone, in loss and θ-gradient.

    Law 4: for KFO, Meta-Curvature, masks and whatever starts as the identity.
    """
    with_rule = problem.learner(Chain(rule(), LearningRate(rate))).meta_gradient(problem.tasks)
    without = problem.learner(LearningRate(rate)).meta_gradient(problem.tasks)
    within = tolerance(problem, float64=1e-10)
    hold("identity, loss", {"loss": with_rule.loss}, {"loss": without.loss}, within)
    hold("identity, θ", _under(with_rule.grads, "model."), without.grads, within)


def chain_is_its_loop(rules: list[MakeRule], params: Tensors, steps: int = 2) -> None:
    """`Chain(a, b)(g)` is `b(a(g))`, states and all."""
    chain = Chain(*[_seeded(make) for make in rules]).setup(params, steps)
    alone = [_seeded(make).setup(params, steps) for make in rules]
    gradients = {name: torch.randn_like(p) for name, p in params.items()}
    state: Any = chain.init(params)
    states: list[Any] = [rule.init(params) for rule in alone]
    for index in range(steps):
        info = StepInfo(index, steps, params)
        got, state = chain(gradients, state, info)
        expected = gradients
        for number, rule in enumerate(alone):
            expected, states[number] = rule(expected, states[number], info)
        hold("a chain is its loop", got, expected, within=0)


def adapt_is_its_loop(
    loss: Callable[[Tensors, Any], torch.Tensor], params: Tensors, batch: Any, make: MakeRule
) -> None:
    """`adapt` gives the parameters of the hand-written loop θ ← θ + rule(∇ loss(θ))."""
    steps = 3
    rule = _seeded(make).setup(params, steps)
    trajectory: Trajectory = adapt(loss, params, batch, rule=rule, steps=steps)
    theta = dict(params)
    state = rule.init(theta)
    for index in range(steps):
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        grads = torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
        updates, state = rule(
            dict(zip(theta, grads, strict=True)), state, StepInfo(index, steps, theta)
        )
        theta = {name: p + updates[name] for name, p in theta.items()}
        got = trajectory.params[index + 1]
        hold(f"adapt is its loop, step {index}", _detached(got), _detached(theta), within=1e-12)


def _linear(params: Tensors, batch: Any) -> torch.Tensor:
    return torch.sum(params["w"] * batch[0])


def _seeded(make: MakeRule) -> UpdateRule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _under(grads: Tensors, prefix: str) -> Tensors:
    return {name: grad for name, grad in grads.items() if name.startswith(prefix)}


def _total(grads: Tensors) -> Tensors:
    return {"rate": torch.stack([g.sum() for g in _under(grads, "rule.").values()]).sum()}


def _detached(params: Tensors) -> Tensors:
    return {name: p.detach() for name, p in params.items()}
