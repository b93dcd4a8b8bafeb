"""Laws of purity: calls that only read a learner, or ask a policy, leave it as it was, bit for bit."""

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from metablocks.errors import LawError
from metablocks.laws.cases import Problem
from metablocks.laws.compare import identical, named
from metablocks.learner import MetaLearner
from metablocks.reads import reading

EPOCHS = (0.0, 1.0, 2.5, 100.0)
"""At which policies are asked."""
_TIMES = 300


def is_a_function(
    law: str, policy: Callable[..., Any], questions: Sequence[tuple[Any, ...]]
) -> None:
    """A policy is a function of its arguments: the same answers, however often and in what order.

    Asked all `questions`, and then hundreds of times any of them. Its state (attributes, what a function
    closes over and the globals it names) is compared, too.
    """
    before = reading(policy)
    answers = [copy.deepcopy(policy(*question)) for question in questions]
    draw = random.Random(0)
    for number in draw.choices(range(len(questions)), k=_TIMES) if questions else ():
        if not identical(policy(*questions[number]), answers[number]):
            raise LawError(
                f"{law}: {named(policy)} is not a function of its arguments alone: asked hundreds of "
                "times, out of order, it changed its mind about "
                f"{', '.join(map(repr, questions[number]))}"
            )
    if reading(policy) != before:
        raise LawError(
            f"{law}: {named(policy)} is not a function of its arguments alone: it keeps something of "
            "being asked, in an attribute or in what it closes over"
        )


def leaves_no_trace(learner: MetaLearner, act: Callable[[MetaLearner], Any]) -> None:
    """Law 9: after `act`, also if it raises, nothing of the learner or the generators has changed.

    Compared bit for bit: parameters, buffers, `.grad`, training flags, `requires_grad`, hooks and
    the random states of the CPU and of the learner's devices. An exception of `act` propagates after
    the comparison.
    """
    before = snapshot(learner)
    try:
        act(learner)
    finally:
        after = snapshot(learner)
        changed = [key for key in before if not identical(before[key], after.get(key))]
        changed += [key for key in after if key not in before]
        if changed:
            raise LawError(f"purity: these changed: {', '.join(changed)}")


def calls_leave_no_trace(problem: Problem, make: Callable[..., MetaLearner]) -> None:
    """Law 9: `meta_gradient`, `evaluate` and `adapt` leave the learner bit for bit as it was.

    Also if the loss raises. `make(problem, **blocks)` is a learner of the problem with these blocks.
    """
    learner, tasks = make(problem), problem.tasks
    learner.backward(tasks)  # so that `.grad` is not None
    leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))
    leaves_no_trace(learner, lambda learner: learner.evaluate(tasks))
    leaves_no_trace(learner, lambda learner: learner.adapt(tasks[0].support))
    leaves_no_trace_of_an_error(problem, lambda loss: make(problem, loss=loss))


def leaves_no_trace_of_an_error(
    problem: Problem, make: Callable[[Callable[[Any, Any], Tensor]], MetaLearner]
) -> None:
    """Law 9: if the loss raises, at any call, nothing changes, and the exception propagates.

    `make(loss)` is a learner of the problem, with this loss in place of the problem's.
    """
    left = [10**9]

    def loss(prediction: Any, target: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError("the loss gave up")
        return problem.loss(prediction, target)

    learner = make(loss)
    learner.meta_gradient(problem.tasks)  # the check of the first call has passed
    for calls in range(4):
        left[0] = calls
        try:
            leaves_no_trace(learner, lambda learner: learner.meta_gradient(problem.tasks))
        except ZeroDivisionError:
            continue
        if left[0] < 0:
            raise LawError(f"purity: the loss raised at call {calls + 1}, but no exception came")
    left[0] = 0
    with suppress(ZeroDivisionError):  # nor has a failed `backward` drawn
        leaves_no_trace(learner, lambda learner: learner.backward(problem.tasks))


def snapshot(learner: MetaLearner) -> dict[str, Any]:
    """Copies of everything that purity compares, by name."""
    state: dict[str, Any] = {"random state of cpu": torch.get_rng_state()}
    for name, parameter in learner.named_parameters():
        state[name] = parameter.detach().clone()
        grad = parameter.grad
        state[f"{name}.grad"] = None if grad is None else grad.clone()
        state[f"{name}.requires_grad"] = parameter.requires_grad
        if parameter.device.type != "cpu":
            module = torch.get_device_module(parameter.device.type)
            state[f"random state of {parameter.device}"] = module.get_rng_state(parameter.device)
    for name, buffer in learner.named_buffers():
        state[name] = buffer.clone()
    for name, module in learner.named_modules():
        state[f"{name}.training"] = module.training
        state[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return state
