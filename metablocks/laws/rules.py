"""Laws of update rules by themselves: what they take and give, remember, draw and read.

`make` makes the rule: laws set it up for the parameters of their problem, each a new one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from metablocks.errors import LawError, RuleError
from metablocks.functional import FunctionalModule
from metablocks.generators import States, generators_of, get_states, same_state
from metablocks.inner import Trajectory, adapt
from metablocks.laws.problem import (
    MakeRule,
    Problem,
    adapted_parameters,
    fixed_draws,
    gradients_like,
    hold,
    tolerance,
)
from metablocks.order import FirstOrder, Order, SecondOrder
from metablocks.rules import Chain, StepInfo, UpdateRule
from metablocks.rules.base import check_updates
from metablocks.types import Tensors


def fits_the_gradients(make: MakeRule, problem: Problem) -> None:
    """Updates have the names, shapes and dtypes of the gradients, and no argument is changed."""
    params, steps = adapted_parameters(problem), max(problem.steps, 1)
    ready = seeded_rule(make).setup(params, steps)
    with fixed_draws():
        state = ready.init(params)
        gradients = gradients_like(params)
        before = {name: g.clone() for name, g in gradients.items()}
        for index in range(steps):
            updates, state = ready(gradients, state, StepInfo(index, steps, params))
            try:
                check_updates(updates, gradients)
            except RuleError as error:
                raise LawError(f"fits the gradients: {error}") from error
            hold("fits the gradients, which a rule leaves as they are", gradients, before, within=0)


def zero_hessian(make: MakeRule, problem: Problem) -> None:
    """With a support loss linear in the parameters, first order is second order.

    Law 1; the loss is ⟨slope, θ⟩ over the problem's parameters, what is differentiated Σ θ_K³, and
    the gradients are those of θ and of all that the rule learns.
    """
    start = adapted_parameters(problem)
    slope = gradients_like(start)

    def linear(params: Tensors, batch: Any) -> torch.Tensor:
        return torch.stack([(params[name] * g).sum() for name, g in batch[0].items()]).sum()

    def gradient(order: Order) -> Tensors:
        rule = seeded_rule(make).setup(start, problem.steps)
        leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
        with fixed_draws():
            trajectory = adapt(
                linear, leaves, (slope, ()), rule=rule, steps=problem.steps, order=order
            )
        end = torch.stack([p.pow(3).sum() for p in trajectory.params[-1].values()]).sum()
        learned = {f"rule.{name}": p for name, p in rule.named_parameters() if p.requires_grad}
        named = leaves | learned
        grads = torch.autograd.grad(end, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(named.items(), grads, strict=True)
        }

    within = tolerance(problem, float64=1e-12)
    first, second = gradient(FirstOrder()), gradient(SecondOrder())
    hold("zero Hessian", first, second, within)


def remembers_nothing(make: MakeRule, problem: Problem) -> None:
    """What a rule remembers within a task is in its state: a task leaves no trace for the next.

    The same task, from the same draws, by a new rule and by one that has seen another task. What a
    task leaves behind in an attribute is shared by all tasks under `vmap`, and wrong.
    """
    params, steps = adapted_parameters(problem), max(problem.steps, 2)
    first, second = gradients_like(params), gradients_like(params, seed=1)

    def task(rule: UpdateRule, gradients: Tensors) -> Tensors:
        seen: Tensors = {}
        with fixed_draws(), torch.no_grad():
            state = rule.init(params)
            for index in range(steps):
                updates, state = rule(gradients, state, StepInfo(index, steps, params))
                seen |= {f"{name} at step {index}": u for name, u in updates.items()}
        return seen

    used = seeded_rule(make).setup(params, steps)
    task(used, second)
    expected = task(seeded_rule(make).setup(params, steps), first)
    hold("remembers nothing from task to task", task(used, first), expected, within=0)


def draws_once_a_task(make: MakeRule, problem: Problem) -> None:
    """Random numbers are drawn in `init`, when a task starts, and kept to its end in the state.

    A rule that is to draw at every step says so: `draws_each_step = True`.
    """
    at_start, at_steps = draws(make, problem)
    if at_steps:
        where = "init and forward both draw" if at_start else "forward draws"
        raise LawError(
            f"draws once a task: {where} random numbers, so that every step has others; draw them in "
            "init and hand them on in the state, or declare draws_each_step = True"
        )


def draws(make: MakeRule, problem: Problem) -> tuple[bool, bool]:
    """Whether `init` draws random numbers, and whether `forward` does."""
    params = adapted_parameters(problem)
    rule, info = seeded_rule(make).setup(params, 1), StepInfo(0, 1, params)
    generators = generators_of(params)
    with fixed_draws():
        before = get_states(generators)
        state = rule.init(params)
        between = get_states(generators)
        rule(gradients_like(params), state, info)
        after = get_states(generators)
    return _moved(before, between), _moved(between, after)


def reads_the_step(make: MakeRule, problem: Problem) -> None:
    """A rule that is made for so many steps (`max_steps`) has something of its own for each.

    With its parameters and buffers moved apart, it makes different updates of one gradient at
    different steps.
    """
    params, steps = adapted_parameters(problem), max(problem.steps, 2)
    rule = seeded_rule(make).setup(params, steps)
    generator = torch.Generator().manual_seed(2)
    for tensor in (*rule.parameters(), *rule.buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(
                tensor.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            tensor.data.add_(noise.to(tensor))
    seen: list[Tensors] = []
    for index in range(steps):
        with fixed_draws(), torch.no_grad():
            updates, _ = rule(
                gradients_like(params), rule.init(params), StepInfo(index, steps, params)
            )
        for earlier, other in enumerate(seen):
            if all(torch.equal(updates[name], other[name]) for name in updates):
                raise LawError(
                    f"reads the step: it is made for {steps} steps, but its updates at step {earlier} "
                    f"and at step {index} are the same, whatever its parameters are"
                )
        seen.append(updates)


def is_the_identity(make: MakeRule, problem: Problem) -> bool:
    """Whether a new rule hands on the gradients of three steps as they are, wherever they lead."""
    params = adapted_parameters(problem)
    rule = seeded_rule(make).setup(params, 3)
    with fixed_draws(), torch.no_grad():
        state = rule.init(params)
        for index in range(3):
            gradients = gradients_like(params, seed=index)
            moved = {name: p + gradients[name] for name, p in params.items()}
            updates, state = rule(gradients, state, StepInfo(index, 3, moved))
            if set(updates) != set(gradients):
                return False
            if not all(torch.equal(updates[name], g) for name, g in gradients.items()):
                return False
    return True


def chain_is_its_loop(rules: Sequence[MakeRule], problem: Problem) -> None:
    """`Chain(a, b)(g)` is `b(a(g))`, states and all."""
    params, steps = adapted_parameters(problem), max(problem.steps, 1)
    chain = Chain(*[seeded_rule(make) for make in rules]).setup(params, steps)
    alone = [seeded_rule(make).setup(params, steps) for make in rules]
    gradients = gradients_like(params)

    def by_chain() -> list[Tensors]:
        state: Any = chain.init(params)
        rows = []
        for index in range(steps):
            updates, state = chain(gradients, state, StepInfo(index, steps, params))
            rows.append(updates)
        return rows

    def by_hand() -> list[Tensors]:
        states: list[Any] = [rule.init(params) for rule in alone]
        rows = []
        for index in range(steps):
            updates = gradients
            for number, rule in enumerate(alone):
                info = StepInfo(index, steps, params)
                updates, states[number] = rule(updates, states[number], info)
            rows.append(updates)
        return rows

    with fixed_draws():
        got = by_chain()
    with fixed_draws():
        expected = by_hand()
    for one, other in zip(got, expected, strict=True):
        hold("a chain is its loop", one, other, within=0)


def adapt_is_its_loop(make: MakeRule, problem: Problem) -> None:
    """`adapt` gives the parameters of the hand-written loop θ ← θ + rule(∇ loss(θ)).

    On the support set of the problem's first task, from the same draws.
    """
    steps, start, batch = problem.steps, adapted_parameters(problem), problem.tasks[0].support
    model = FunctionalModule(problem.model(), norm_statistics="batch")
    frozen = {n: p for n, p in model.state().params.items() if n not in start}

    def loss(params: Tensors, batch: Any) -> torch.Tensor:
        state = model.state()._replace(params={**frozen, **params})
        return problem.loss(model(state, batch[0])[0], batch[1])

    with fixed_draws():
        rule = seeded_rule(make).setup(start, steps)
        trajectory: Trajectory = adapt(loss, start, batch, rule=rule, steps=steps)
    with fixed_draws():
        rule = seeded_rule(make).setup(start, steps)
        theta, state = dict(start), rule.init(start)
        for index in range(steps):
            leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
            grads = torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
            updates, state = rule(
                dict(zip(theta, grads, strict=True)), state, StepInfo(index, steps, theta)
            )
            theta = {name: p + updates[name] for name, p in theta.items()}
            got = trajectory.params[index + 1]
            within = tolerance(problem, float64=1e-12)
            hold(f"adapt is its loop, step {index}", _detached(got), _detached(theta), within)


def _moved(before: States, after: States) -> bool:
    pairs = zip(before, after, strict=True)
    return any(not same_state(one, other) for (_, one), (_, other) in pairs)


def seeded_rule(make: MakeRule) -> UpdateRule:
    """A new rule, the same numbers in it whenever one is made."""
    with fixed_draws():
        return make()


def _detached(params: Tensors) -> Tensors:
    return {name: p.detach() for name, p in params.items()}
