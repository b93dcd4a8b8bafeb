"""Is the meta-gradient of a recipe right? Measured, for every meta-parameter, on a small counterpart.

    slope of L along d  =  ⟨gradient, d⟩        by finite differences, for each named parameter
    gradient            =  ∂L/∂φ                by a hand-written loop in plain autograd

L is the weighted query loss with the gradients of those inner steps held constant that the order does
not look through: one definition for second, first and truncated order. Reptile and the implicit
gradient are held to definitions of their own (`gradcheck.references`). All of it is evaluated away from
the start, where factors at the identity and zero biases would hide what they do.
"""

import torch

from metablocks.errors import MetablocksError, first_line
from metablocks.estimators import Implicit, Reptile
from metablocks.gradcheck.check import check_epoch
from metablocks.gradcheck.modules import (
    refused_by_transforms,
    with_wrong_derivative,
    without_second_derivative,
)
from metablocks.gradcheck.report import GradientPart, GradientReport
from metablocks.gradcheck.shrink import Small, build_small
from metablocks.gradcheck.variants import norm, run, through, turning_points
from metablocks.laws.plain_loop import SEED
from metablocks.learner import MetaLearner
from metablocks.recipe.record import Recipe
from metablocks.types import Progress, Tensors

_NOTHING = 1e-12  # a gradient that is zero up to rounding, as a share of the whole
_REMEDY = (
    "what would work: order: {block: first_order}, or an operation that has one: hardswish composed of "
    "relu6, cdist of differences, a function of one's own without once_differentiable"
)


def check_gradients(recipe: Recipe, *, device: str | torch.device | None = None) -> GradientReport:
    """Hold the meta-gradient of a recipe, made small and smooth, to its definition.

    Checked at every epoch from which the order or the step loss decides otherwise, by finite
    differences where the order does. `device` stands in for the recipe's. No data is needed. What is
    wrong is in the report, by the names of parameters and modules; nothing of it is raised.

    Law: the report is ok for every recipe of right blocks.

    >>> from metablocks.recipe import load
    >>> report = check_gradients(load("maml_sinusoid", ["hardware.device=cpu"]))
    >>> report.ok, [row.group for row in report.rows]
    (True, ['model.body', 'model.head'])

    Raises `RecipeError` where the recipe's blocks make no sense together.
    """
    small = build_small(recipe, device=device)
    learner = small.learner
    notes = [f"{name} has kinks, and is kept as it is" for name in small.kinks]
    parts: list[GradientPart] = []
    problems: list[str] = []
    try:
        epochs = turning_points(learner, small.epochs)
        missing = without_second_derivative(learner.model, _inputs(small))
        if _looks_through(learner, epochs):
            problems += [f"no second derivative in {one}; {_REMEDY}" for one in missing]
        else:
            notes += [f"no second derivative in {one}; the recipe needs none" for one in missing]
        if not problems:
            start = [_start(small, epoch) for epoch in epochs]
            _perturb(learner)
            measured: set[tuple[bool, ...]] = set()
            for epoch, before in zip(epochs, start, strict=True):
                looks = through(learner, Progress(epoch=epoch))
                new = looks not in measured
                part, grads, told = check_epoch(
                    learner, small.tasks, epoch, twice=not missing, measure=new
                )
                measured.add(looks)
                parts.append(part)
                notes += [*told, *_zeros(before, grads, learner)]
    except Exception as error:  # whatever a block from outside may raise
        problems += _told(error, small)
    if not all(part.ok for part in parts):
        problems += [str(one) for one in with_wrong_derivative(learner.model, _inputs(small))]
    return GradientReport(
        recipe=recipe.name,
        device=str(next(learner.parameters()).device),
        changes=small.changes,
        parts=tuple(parts),
        problems=tuple(problems),
        notes=tuple(dict.fromkeys(notes)),
    )


def _looks_through(learner: MetaLearner, epochs: list[int]) -> bool:
    """Whether a second derivative of the support loss is ever asked for."""
    if isinstance(learner.estimator, Reptile | Implicit):
        return isinstance(learner.estimator, Implicit)
    return any(any(through(learner, Progress(epoch=epoch))) for epoch in epochs)


def _start(small: Small, epoch: int) -> Tensors:
    """The gradient where training starts. Raises `ArithmeticError` where it is not finite."""
    result, _ = run(small.learner, small.tasks, Progress(epoch=epoch))
    if result.trouble:
        raise ArithmeticError(f"{result.trouble} where training starts")
    return result.grads


@torch.no_grad()
def _perturb(learner: MetaLearner) -> None:
    """Move every meta-parameter by a tenth of its size, or from zero by a tenth."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            size = float(parameter.square().mean().sqrt()) or 1.0
            parameter.add_(0.1 * size * noise.to(parameter))


def _zeros(start: Tensors, grads: Tensors, learner: MetaLearner) -> list[str]:
    """Notes on the parameters whose gradient is zero, which is right where nothing is wrong."""
    first, later = _silent(start), _silent(grads)
    normed = any("Norm" in type(module).__name__ for module in learner.model.modules())
    notes = []
    for when, zero in (
        ("where training starts, and no longer once the others have moved", first - later),
        ("at the start and later, and the loss does not change with it", first & later),
    ):
        names = [name for name in grads if name in zero]
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            shifts = normed and all("bias" in name for name in names)
            why = " (a norm takes away the bias in front of it)" if shifts else ""
            notes.append(f"zero gradient {when}: {shown}{why}")
    return notes


def _silent(grads: Tensors) -> set[str]:
    whole = norm(grads)
    return {name for name, grad in grads.items() if float(grad.norm()) <= _NOTHING * whole}


def _inputs(small: Small) -> object:
    return small.tasks[0].support[0]


def _told(error: Exception, small: Small) -> list[str]:
    """What an error says, with the module that it comes from, where it is one that can be found."""
    if isinstance(error, MetablocksError | ArithmeticError):
        return [str(error)]
    try:
        found = refused_by_transforms(small.learner.model, _inputs(small))
    except Exception:  # the model itself does not run
        found = []
    return [str(one) for one in found] or [f"{type(error).__name__}: {first_line(error)}"]
