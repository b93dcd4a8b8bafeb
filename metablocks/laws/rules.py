"""Laws of update rules: their arguments and results, memory, draws, and what a learner makes of them.

`make` makes the rule: laws set it up for the parameters of their problem, each a new one. Behind a
rule whose updates are still a gradient (`negates = False`) goes a rate of 0.1 (`learner_of`).
"""

from functools import partial
from typing import Any

import torch

from metablocks.errors import LawError, RuleError
from metablocks.estimators import Adjoint
from metablocks.executors import Vmap
from metablocks.generators import States, generators_of, get_states, same_state
from metablocks.laws import gradients
from metablocks.laws.cases import MakeRule, Problem
from metablocks.laws.compare import assert_close, fixed_draws, noise_like, perturb
from metablocks.learner import MetaLearner
from metablocks.rules import Chain, LearningRate, StepInfo, UpdateRule
from metablocks.rules.base import check_updates
from metablocks.types import Tensors

_GRADIENTS = 8


def fits_the_gradients(make: MakeRule, problem: Problem) -> None:
    """Updates have the names, shapes and dtypes of the gradients, and no argument is changed."""
    params, steps = problem.adapted_parameters(), max(problem.steps, 1)
    ready = seeded_rule(make).setup(params, steps)
    with fixed_draws():
        state = ready.init(params)
        grads = noise_like(params)
        before = {name: g.clone() for name, g in grads.items()}
        for index in range(steps):
            updates, state = ready(grads, state, StepInfo(index, steps, params))
            try:
                check_updates(updates, grads)
            except RuleError as error:
                raise LawError(f"fits the gradients: {error}") from error
            law = "fits the gradients, which a rule leaves as they are"
            assert_close(law, grads, before, within=0)


def remembers_nothing(make: MakeRule, problem: Problem) -> None:
    """A rule keeps its memory within a task in its state: a task leaves no trace for the next.

    The same task, from the same draws, by a new rule and by one that has seen another task. A value
    that a task leaves in an attribute is shared by all tasks under `vmap`, and wrong.
    """
    params, steps = problem.adapted_parameters(), max(problem.steps, 2)
    first, second = noise_like(params), noise_like(params, seed=1)

    def task(rule: UpdateRule, grads: Tensors) -> Tensors:
        seen: Tensors = {}
        with fixed_draws(), torch.no_grad():
            state = rule.init(params)
            for index in range(steps):
                updates, state = rule(grads, state, StepInfo(index, steps, params))
                seen |= {f"{name} at step {index}": u for name, u in updates.items()}
        return seen

    used = seeded_rule(make).setup(params, steps)
    task(used, second)
    expected = task(seeded_rule(make).setup(params, steps), first)
    assert_close("remembers nothing from task to task", task(used, first), expected, within=0)


def draws_once_a_task(make: MakeRule, problem: Problem) -> None:
    """Random numbers are drawn in `init`, when a task starts, and kept to its end in the state.

    A rule that draws at every step on purpose declares `draws_each_step = True`.
    """
    at_start, at_steps = draws(make, problem)
    if at_steps:
        where = "init and forward both draw" if at_start else "forward draws"
        raise LawError(
            f"draws once a task: {where} random numbers, so that every step has others; draw them in "
            "init and keep them in the state, or declare draws_each_step = True"
        )


def draws(make: MakeRule, problem: Problem) -> tuple[bool, bool]:
    """A pair: `init` draws random numbers, `forward` draws them."""
    params, steps = problem.adapted_parameters(), max(problem.steps, 1)
    rule, info = seeded_rule(make).setup(params, steps), StepInfo(0, steps, params)
    generators = generators_of(params)
    with fixed_draws():
        before = get_states(generators)
        state = rule.init(params)
        between = get_states(generators)
        rule(noise_like(params), state, info)
        after = get_states(generators)
    return _moved(before, between), _moved(between, after)


def reads_the_step(make: MakeRule, problem: Problem) -> None:
    """A rule that is made for so many steps (`max_steps`) makes different updates at each.

    Of one gradient, once its parameters and buffers are moved apart.
    """
    params, steps = problem.adapted_parameters(), max(problem.steps, 2)
    rule = seeded_rule(make).setup(params, steps)
    tensors = dict(rule.named_parameters()) | dict(rule.named_buffers())
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, noise in noise_like(tensors, seed=2).items():
        tensors[name].data.add_(noise)
    seen: list[Tensors] = []
    for index in range(steps):
        with fixed_draws(), torch.no_grad():
            updates, _ = rule(noise_like(params), rule.init(params), StepInfo(index, steps, params))
        for earlier, other in enumerate(seen):
            if all(torch.equal(updates[name], other[name]) for name in updates):
                raise LawError(
                    f"reads the step: it is made for {steps} steps, but its updates at step {earlier} "
                    f"and at step {index} are the same, whatever its parameters are"
                )
        seen.append(updates)


def goes_down(make: MakeRule, problem: Problem) -> None:
    """A small step of an untrained rule goes down: at no step does the loss rise along its updates.

    By ⟨gradient, update⟩, summed over several gradients and draws. A rule that declares
    `negates = False` is one to put a learning rate behind, and its updates point up.
    """
    params, steps = problem.adapted_parameters(), max(problem.steps, 1)
    rule = seeded_rule(make).setup(params, steps)
    for index in range(steps):
        along = 0.0
        with fixed_draws(), torch.no_grad():
            for seed in range(_GRADIENTS):
                grads, info = noise_like(params, seed), StepInfo(index, steps, params)
                along += _along(grads, rule(grads, rule.init(params), info)[0])
        if rule.negates is False and not along >= 0:
            raise LawError(
                f"goes down: at step {index} ⟨gradient, update⟩ is {along:.3g}; a rule with negates = "
                "False leaves what is still a gradient, for a learning rate behind it to negate"
            )
        if rule.negates is not False and not along <= 0:
            raise LawError(
                f"goes down: at step {index} ⟨gradient, update⟩ is {along:.3g}, and updates are added "
                "to the parameters: the loss goes up; negate the updates, or, if a learning rate is "
                "to stand behind the rule, declare negates = False"
            )


def is_the_identity(make: MakeRule, problem: Problem) -> bool:
    """True if a new rule returns the gradients of three steps unchanged, at any parameters."""
    params = problem.adapted_parameters()
    rule = seeded_rule(make).setup(params, 3)
    with fixed_draws(), torch.no_grad():
        state = rule.init(params)
        for index in range(3):
            grads = noise_like(params, seed=index)
            moved = {name: p + grads[name] for name, p in params.items()}
            updates, state = rule(grads, state, StepInfo(index, 3, moved))
            if updates.keys() != grads.keys():
                return False
            if not all(torch.equal(updates[name], g) for name, g in grads.items()):
                return False
    return True


def _moved(before: States, after: States) -> bool:
    pairs = zip(before, after, strict=True)
    return any(not same_state(one, other) for (_, one), (_, other) in pairs)


def seeded_rule(make: MakeRule) -> UpdateRule:
    """A new rule, the same numbers in it whenever one is made."""
    with fixed_draws():
        return make()


# ---- in a learner


def learner_of(make: MakeRule, problem: Problem, **blocks: Any) -> MetaLearner:
    """A learner with the rule: alone if it negates, else with a rate of 0.1 behind it.

    If it does not say (`negates`), its first update does.
    The rule's parameters are moved away from their start, where an identity hides its faults.
    """
    rule = seeded_rule(make)
    negates = rule.negates
    if negates is None:
        params, steps = problem.adapted_parameters(), problem.steps
        trial, grads = seeded_rule(make).setup(params, steps), noise_like(params)
        with fixed_draws(), torch.no_grad():
            updates, _ = trial(grads, trial.init(params), StepInfo(0, steps, params))
        negates = _along(grads, updates) < 0
    rule = rule if negates else Chain(rule, LearningRate(0.1))
    return perturb(problem.learner(rule, **blocks), "rule.")


def _along(gradients: Tensors, updates: Tensors) -> float:
    """⟨gradient, update⟩ over the names that both have."""
    both = [name for name in gradients if name in updates]
    return sum(float((updates[name] * gradients[name]).sum()) for name in both)


def one_gradient(make: MakeRule, problem: Problem, **blocks: Any) -> None:
    """Law 8: `Vmap` and `Adjoint` give the gradient of the plain loop, unrolled.

    If the rule draws random numbers, `Vmap` draws others, and `Adjoint` alone is compared.
    """

    vmaps = [] if any(draws(make, problem)) else [Vmap(), Vmap(chunk=2)]
    learner = partial(learner_of, make)
    gradients.alike(problem, learner, executors=vmaps, estimators=[Adjoint()], **blocks)


def same_as_without(make: MakeRule, problem: Problem, *, rate: float = 0.1) -> None:
    """Law 4: a transform at its identity in front of a rate is the rate alone, in loss and θ-gradient.

    For KFO, Meta-Curvature, masks and whatever starts as the identity.
    """
    chain = Chain(seeded_rule(make), LearningRate(rate))
    with_rule = problem.learner(chain).meta_gradient(problem.tasks)
    without = problem.learner(LearningRate(rate)).meta_gradient(problem.tasks)
    assert_close("identity, loss", {"loss": with_rule.loss}, {"loss": without.loss}, 1e-10)
    theta = {name: grad for name, grad in with_rule.grads.items() if name.startswith("model.")}
    assert_close("identity, θ", theta, without.grads, 1e-10)
