"""Laws of model surgery: what starts as the identity leaves the learner as it was."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from metablocks.errors import LawError
from metablocks.laws.problem import Problem, hold, tolerance


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
    own = replace(problem, model=lambda: convert(problem.model()), adapt=adapt)
    got = own.learner(**blocks).meta_gradient(problem.tasks)
    within = 0 if exact else tolerance(problem, float64=1e-12)
    each, due = ({"losses": r.query_losses.nan_to_num(-1)} for r in (got, expected))
    hold("identity, losses", each, due, within)
    theta = {name: g for name, g in got.grads.items() if name in expected.grads}
    hold("identity, θ", theta, expected.grads, within)
    for name, grad in got.grads.items():
        if name not in expected.grads and not bool(grad.any()):
            raise LawError(f"identity: {name} has a gradient of zero, and would never be learned")
