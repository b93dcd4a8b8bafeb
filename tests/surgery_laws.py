"""Laws of model surgery: identities (law 4), and collapse of appended linear layers (law 10)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metablocks.errors import LawError
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close
from metablocks.learner import MetaLearner
from metablocks.models.linnet import collapse_linear
from metablocks.rules import LearningRate
from metablocks.types import Tensors, relative_error


def same_as_without(
    convert: Callable[[nn.Module], nn.Module],
    problem: Problem,
    *,
    adapt: str | Sequence[str] = "*",
    exact: bool = False,
    **blocks: Any,
) -> None:
    """Law 4: surgery at its identity changes neither the losses nor the θ-gradient.

    `convert(model)` is the new model, `adapt` selects in it what adapted before; with `exact`, the
    numbers agree to the last bit. What the surgery adds has a gradient from the first meta-step on.
    """
    expected = problem.learner(**blocks).meta_gradient(problem.tasks)
    new = replace(problem, model=lambda: convert(problem.model()), adapt=adapt)
    got = new.learner(**blocks).meta_gradient(problem.tasks)
    within = 0 if exact else 1e-12
    got_losses, expected_losses = (
        {"losses": r.query_losses.nan_to_num(-1)} for r in (got, expected)
    )
    assert_close("identity, losses", got_losses, expected_losses, within)
    theta = {name: g for name, g in got.grads.items() if name in expected.grads}
    assert_close("identity, θ", theta, expected.grads, within)
    for name, grad in got.grads.items():
        if name not in expected.grads and not bool(grad.any()):
            raise LawError(f"identity: {name} has a gradient of zero, and would never be learned")


def collapse_keeps_the_function(problem: Problem) -> None:
    """Law 10: a model with appended layers (`problem.model`) and its collapsed form are one function.

    In `train()` and in `eval()`, on every input of the problem's tasks.
    """
    deep = problem.model()
    flat = collapse_linear(deep)
    for training in (True, False):
        got = _outputs(problem, flat.train(training))
        expected = _outputs(problem, deep.train(training))
        assert_close("collapse keeps the function", got, expected, 1e-12)


def collapse_after_adaptation(
    problem: Problem, *, rate: float = 0.1, apart: float = 1e-3, adapt: str = "*"
) -> None:
    """Law 10: adapted and then collapsed is adapted; collapsed and then adapted is something else.

    `problem.model` makes a model with appended layers. The predictions on the query sets must agree
    in the one case, and differ by more than `apart`, relatively, in the other.
    """
    within = 1e-12
    deep, flat = problem.model(), collapse_linear(problem.model())
    expected, after, before = {}, {}, {}
    for index in range(len(problem.tasks)):
        task = problem.tasks[index]
        inputs = task.query[0]
        learner = problem.learner(LearningRate(rate), adapt=adapt)
        with torch.no_grad():
            adapted = learner.adapt(task.support)
            expected[f"task {index}"] = adapted(inputs)
            after[f"task {index}"] = collapse_linear(adapted)(inputs)
            plain = MetaLearner(
                flat, loss=problem.loss, steps=problem.steps, rule=LearningRate(rate), adapt=adapt
            )
            before[f"task {index}"] = plain.adapt(task.support)(inputs)
    assert_close("collapse after adaptation", after, expected, within)
    assert_close(
        "collapse leaves the model", dict(deep.named_parameters()), _parameters(problem), 0
    )
    error = relative_error(before, expected)
    if not error > apart:
        raise LawError(
            f"collapse before adaptation: the adapted functions differ by {error:.2e} only, "
            f"expected more than {apart:.0e}"
        )


def _outputs(problem: Problem, model: nn.Module) -> Tensors:
    sides = {"support": problem.tasks.support[0], "query": problem.tasks.query[0]}
    with torch.no_grad():
        return {
            f"{side} {index}": model(inputs[index])
            for side, inputs in sides.items()
            for index in range(len(problem.tasks))
        }


def _parameters(problem: Problem) -> Tensors:
    return dict(problem.model().named_parameters())
