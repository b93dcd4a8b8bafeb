"""The check of a learner's meta-gradient at one epoch: references, comparisons, rows."""

from dataclasses import replace
from typing import NamedTuple

import torch

from metablocks.estimators import Implicit, Reptile, Unrolled
from metablocks.executors import Loop, Vmap
from metablocks.gradcheck.groups import Comparison, by_group
from metablocks.gradcheck.references import (
    implicit,
    least_curvature,
    plain_query_gradient,
    reptile,
    systems,
)
from metablocks.gradcheck.report import Agreement, GradientPart
from metablocks.gradcheck.variants import brief, distance, norm, run, through, with_blocks
from metablocks.laws.gradients import slopes
from metablocks.laws.plain_loop import PlainLoop, Tape
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.step_loss import step_weights
from metablocks.types import Progress, TaskBatch, Tensors

_WITHIN = (
    1e-5  # of finite differences: their rounding is 1e-12 / width, over a thousandth of the whole
)
_ALIKE = 1e-8  # of two ways to one number in float64, over up to three inner steps
_SOLVED = 1e-6  # of conjugate gradients with as many steps as they need
_CG_STEPS = 40
_WIDTHS = (1e-4, 1e-5, 1e-6)


class Checked(NamedTuple):
    """What `check_epoch` returns."""

    part: GradientPart
    grads: Tensors
    notes: list[str]


class _Reference(NamedTuple):
    """What a gradient is held to."""

    held: Tensors
    """The gradient that is compared."""
    comparisons: list[Comparison]
    orders: dict[str, Tensors]
    """The gradient to "first" order and, where there is one, to "second"."""
    agreements: tuple[Agreement, ...] = ()


def check_epoch(
    learner: MetaLearner,
    tasks: TaskBatch,
    epoch: int,
    *,
    twice: bool = True,
    measure: bool = True,
) -> Checked:
    """Hold the meta-gradient, at the learner's present parameters, to its definition.

    `twice` says whether the model has second derivatives, `measure` whether to take finite differences
    besides plain autograd.
    """
    progress = Progress(epoch=epoch)
    estimator, notes = learner.estimator, []
    looped = with_blocks(learner, executor=Loop())
    got, own_draws = run(learner, tasks, progress)
    base, _ = run(with_blocks(looped, estimator=_exact(learner)), tasks, progress)
    other = f"{brief(_exact(learner))} under Loop()"
    agreements: list[Agreement] = []
    if own_draws:
        text = (
            f"{brief(learner.executor)} makes random draws of its own, so the table is of Loop()'s"
        )
        if isinstance(learner.executor, Vmap):
            one_by_one = replace(learner.executor, chunk=1)
            alone, _ = run(with_blocks(learner, executor=one_by_one), tasks, progress)
            what = f"{brief(estimator)} under {brief(one_by_one)} = {other}, draws and all"
            agreements.append(Agreement(what, _apart(alone, base), _ALIKE))
        notes.append(text)
        got, _ = run(looped, tasks, progress)
    executor = looped.executor if own_draws else learner.executor
    if estimator != _exact(learner) or executor != Loop():
        what = f"{brief(estimator)} under {brief(executor)} = {other}"
        agreements.append(Agreement(what, _apart(got, base), _ALIKE))
    reference = _reference(looped, tasks, progress, got.grads, twice, measure)
    agreements += reference.agreements
    rows, problems = by_group(
        learner, got.grads, reference.held, reference.comparisons, reference.orders
    )
    problems += [f"{one.what}: {one.error:.1e} apart" for one in agreements if not one.ok]
    if got.trouble:
        problems.insert(0, got.trouble)
    part = GradientPart(epoch, _words(learner, progress), rows, tuple(agreements), tuple(problems))
    return Checked(part, got.grads, notes)


def _reference(
    looped: MetaLearner,
    tasks: TaskBatch,
    progress: Progress,
    grads: Tensors,
    twice: bool,
    measure: bool,
) -> _Reference:
    plain = PlainLoop(looped, tasks)
    estimator = looped.estimator
    if isinstance(estimator, Reptile):
        due = Comparison("φ − φ̃ in plain autograd", reptile(plain, estimator), _ALIKE)
        return _Reference(grads, [due], {})
    if isinstance(estimator, Implicit):
        return _implicit(plain, looped, estimator, progress, grads)
    looks = through(looped, progress)
    exact = plain.gradient(looks, progress)
    orders = {"first": plain.gradient((False,) * len(looks), progress)}
    if twice:
        orders["second"] = plain.gradient((True,) * len(looks), progress)
    comparisons = [Comparison("plain autograd", exact, _ALIKE)]
    if measure:
        directions, found = _finite_differences(plain, looks, progress, grads)
        comparisons.append(Comparison("finite differences", found, _WITHIN, directions))
    return _Reference(grads, comparisons, orders)


def _implicit(
    plain: PlainLoop,
    looped: MetaLearner,
    estimator: Implicit,
    progress: Progress,
    grads: Tensors,
) -> _Reference:
    """The gradient with its system solved to the end, against the dense solution.

    Where I + H/λ is not well above zero, so that the solver would stop on purpose, a larger λ in the
    linear system serves both sides.
    """
    written = systems(plain)
    curvature = least_curvature(written)
    strength = max(estimator.proximal, -2 * curvature)
    thorough = replace(estimator, proximal=strength, cg_steps=_CG_STEPS, tolerance=1e-12)
    solved, _ = run(with_blocks(looped, estimator=thorough), plain.tasks, progress)
    due = implicit(written, strength)
    agreements = []
    if strength == estimator.proximal:
        asked, _ = run(looped, plain.tasks, progress)
        largest = max(float(system.target.norm()) for system in written)
        bound = largest * float(asked.metrics["cg_residual"]) / min(1, 1 + curvature / strength)
        error = distance(grads, due, [f"model.{name}" for name in looped.adapted])
        what = f"with its {estimator.cg_steps} CG steps = the solution, within its residual's {bound:.0e}"
        agreements.append(Agreement(what, error, 1.01 * bound + 1e-9))
    held = Comparison(f"the dense solution with λ = {strength:.3g}", due, _SOLVED)
    orders = {"first": plain_query_gradient(written)}
    return _Reference(solved.grads, [held], orders, tuple(agreements))


def _finite_differences(
    plain: PlainLoop, looks: tuple[bool, ...], progress: Progress, grads: Tensors
) -> tuple[Tensors, Tensors]:
    """Directions, and slopes along them: of the widths, the one that fits best.

    A wrong gradient fits at none; a kink that a wide difference steps over, at a narrow one.
    """
    tape = Tape()

    def loss() -> torch.Tensor:
        return plain.loss(looks, progress, tape)

    loss()
    least = 1e-3 * norm(grads)
    directions: Tensors = {}
    found: Tensors = {}
    errors: dict[str, float] = {}
    left = dict(plain.parameters)
    for width in _WIDTHS:
        along, measured = slopes(left, loss, width=width)
        for name in list(left):
            error = abs(float((grads[name] * along[name]).sum() - measured[name]))
            if name not in errors or error < errors[name]:
                directions[name], found[name], errors[name] = along[name], measured[name], error
            if error <= _WITHIN * max(float(grads[name].norm()), least):
                del left[name]
    return directions, found


def _exact(learner: MetaLearner) -> object:
    """What the estimator is compared with: itself, where it computes something of its own."""
    own = isinstance(learner.estimator, Reptile | Implicit)
    return learner.estimator if own else Unrolled()


def _apart(one: MetaGradient, other: MetaGradient) -> float:
    loss = abs(float(one.loss - other.loss)) / max(abs(float(other.loss)), 1e-12)
    return max(loss, distance(one.grads, other.grads) / max(norm(other.grads), 1e-12))


def _words(learner: MetaLearner, progress: Progress) -> str:
    """How the gradient is computed at this epoch."""
    if isinstance(learner.estimator, Reptile | Implicit):
        return brief(learner.estimator)
    looks = through(learner, progress)
    weights = step_weights(learner.step_loss, learner.steps, progress)
    order = "second order" if all(looks) else "first order"
    if any(looks) and not all(looks):
        order = "through steps " + ", ".join(str(k) for k, look in enumerate(looks) if look)
    return f"{order}; weights of the query losses {', '.join(f'{w:.2g}' for w in weights)}"
