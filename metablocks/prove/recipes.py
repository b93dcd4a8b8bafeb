"""Is the meta-gradient of a recipe right? Measured, for every meta-parameter, on a small counterpart.

    slope of L along d  =  ⟨gradient, d⟩        by finite differences, for each named parameter
    gradient            =  ∂L/∂φ                by a hand-written loop in plain autograd

L is the weighted query loss with the gradients of those inner steps held constant that the order does
not look through: one definition for second, first and truncated order. Reptile and the implicit
gradient are held to definitions of their own (`prove.definitions`). Both references are evaluated
away from the start, where factors at the identity and zero biases would hide what they do.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from metablocks.errors import MetablocksError
from metablocks.estimators import Implicit, Reptile, Unrolled
from metablocks.executors import Loop, RandomDrawsWarning
from metablocks.laws.gradients import slopes
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.prove.definitions import (
    implicit,
    least_curvature,
    plain_query_gradient,
    reptile,
    systems,
)
from metablocks.prove.double_backward import REMEDY, once_only
from metablocks.prove.gradient_report import Agreement, GradientPart, GradientReport
from metablocks.prove.groups import Comparison, by_group
from metablocks.prove.plain import SEED, PlainLoop, Tape
from metablocks.prove.small import Small, build_small
from metablocks.recipe.record import Recipe
from metablocks.step_loss import step_weights
from metablocks.types import Progress, Tensors

_WITHIN = (
    1e-5  # of finite differences: their rounding is 1e-12 / width, over a thousandth of the whole
)
_ALIKE = 1e-8  # two ways of one computation in float64, over up to three inner steps
_WIDTHS = (1e-4, 1e-5, 1e-6)
_SOLVED = 1e-6  # of the conjugate gradients, which then have as many steps as they need
_CG_STEPS = 40
_NOTHING = 1e-12  # a gradient that is zero up to rounding, as a share of the whole


def check_gradients(recipe: Recipe, *, device: str | torch.device | None = None) -> GradientReport:
    """Hold the meta-gradient of a recipe, made small and smooth, to its definition.

    Checked at every epoch from which the order or the step loss decides otherwise. `device` stands
    in for the recipe's. No data is needed. What is wrong is in the report, by the parameters' names;
    nothing of it is raised.

    Law: the report is ok for every recipe of right blocks.

    >>> from metablocks.recipe import load
    >>> report = check_gradients(load("maml_sinusoid", ["hardware.device=cpu"]))
    >>> report.ok, [row.group for row in report.rows]
    (True, ['model.body', 'model.head'])

    Raises `RecipeError` where the recipe's blocks make no sense together.
    """
    small = build_small(recipe, device=device)
    notes = [f"{name} has kinks, and is kept as it is" for name in small.kinks]
    learner = small.learner
    problems = _double_backward(small, notes)
    start = None if problems else _start(small, problems)
    parts: list[GradientPart] = []
    if start is not None:
        _perturb(learner)
        try:
            for epoch in _epochs(learner, small.epochs):
                parts.append(_part(small, epoch, start, notes))
        except Exception as error:
            problems.append(_told(error))
    place = str(next(learner.parameters()).device)
    found = dict.fromkeys(notes)
    return GradientReport(
        recipe.name, place, small.changes, tuple(parts), tuple(problems), tuple(found)
    )


def _part(small: Small, epoch: int, start: Tensors, notes: list[str]) -> GradientPart:
    """The check at one epoch."""
    learner, progress = small.learner, Progress(epoch=epoch)
    plain = PlainLoop(learner, small.tasks)
    through = plain.order(progress)
    looped = _with(learner, executor=Loop())
    got, own_draws = _run(learner, small, progress)
    if own_draws:
        notes.append(f"{learner.executor!r} makes random draws of its own: checked under Loop()")
        got, _ = _run(looped, small, progress)
    agreements: list[Agreement] = []
    estimator = learner.estimator
    base, _ = _run(_with(looped, estimator=_exact(estimator)), small, progress)
    name = f"{estimator!r} with {looped.executor if own_draws else learner.executor!r}"
    other = f"{_exact(estimator)!r} with Loop()"
    if name != other:
        agreements.append(Agreement(f"{name} = {other}", _apart(got, base), _ALIKE))
    orders: dict[str, Any] = {}
    if isinstance(estimator, Reptile):
        comparisons = [Comparison("φ − φ̃ in plain autograd", reptile(plain, estimator), _ALIKE)]
        held = got.grads
    elif isinstance(estimator, Implicit):
        held, solved, first = _implicit(plain, estimator, looped, small, progress, agreements)
        comparisons, orders = [solved], {"first": first}
    else:
        held = got.grads
        exact = plain.gradient(through, progress)
        directions, found = _finite_differences(plain, through, progress, got.grads)
        comparisons = [
            Comparison("plain autograd", exact, _ALIKE),
            Comparison("finite differences", found, _WITHIN, directions),
        ]
        orders = _orders(plain, through, progress, exact)
    rows, problems = by_group(learner, got.grads, held, comparisons, orders)
    problems += [f"{one.what}: {one.error:.1e} apart" for one in agreements if not one.ok]
    if got.trouble:
        problems.insert(0, got.trouble)
    _zeros(start, got.grads, learner, notes)
    return GradientPart(
        epoch, _words(learner, through, progress), rows, tuple(agreements), tuple(problems)
    )


def _implicit(
    plain: PlainLoop,
    estimator: Implicit,
    looped: MetaLearner,
    small: Small,
    progress: Progress,
    agreements: list[Agreement],
) -> tuple[Tensors, Comparison, Tensors]:
    """The gradient solved to the end, what it is held to, and the one that no curvature enters.

    Where I + H/λ is not well above zero, so that the solver would stop on purpose, a larger λ in the
    linear system serves both sides.
    """
    written = systems(plain)
    curvature = least_curvature(written)
    strength = max(estimator.proximal, -2 * curvature)
    size = len(written[0].target)
    thorough = replace(
        estimator, proximal=strength, cg_steps=min(2 * size, _CG_STEPS), tolerance=1e-12
    )
    exact, _ = _run(_with(looped, estimator=thorough), small, progress)
    due = implicit(written, strength)
    if strength == estimator.proximal:
        asked, _ = _run(looped, small, progress)
        largest = max(float(system.target.norm()) for system in written)
        bound = largest * float(asked.metrics["cg_residual"]) / min(1, 1 + curvature / strength)
        error = _distance(asked.grads, due, [f"model.{name}" for name in looped.adapted])
        what = f"{estimator.cg_steps} CG steps = the solution, within what their residual allows"
        agreements.append(Agreement(what, error, 1.01 * bound + 1e-9))
    held = Comparison(f"the dense solution with λ = {strength:.3g}", due, _SOLVED)
    return exact.grads, held, plain_query_gradient(written)


def _finite_differences(
    plain: PlainLoop, through: tuple[bool, ...], progress: Progress, grads: Tensors
) -> tuple[Tensors, Tensors]:
    """Directions, and slopes along them: of the widths, the one that fits best.

    A wrong gradient fits at none; a kink that a wide difference steps over, at a narrow one.
    """
    tape = Tape()

    def loss() -> torch.Tensor:
        return plain.loss(through, progress, tape)

    loss()
    scale = max(_norm(grads, grads), 1e-12)
    directions: Tensors = {}
    found: Tensors = {}
    left = dict(plain.parameters)
    for width in _WIDTHS:
        along, measured = slopes(left, loss, width=width)
        for name in list(left):
            error = abs(float((grads[name] * along[name]).sum() - measured[name]))
            if name not in found or error < abs(
                float((grads[name] * directions[name]).sum() - found[name])
            ):
                directions[name], found[name] = along[name], measured[name]
            if error <= _WITHIN * max(float(grads[name].norm()), 1e-3 * scale):
                del left[name]
    return directions, found


def _orders(
    plain: PlainLoop, through: tuple[bool, ...], progress: Progress, exact: Tensors
) -> dict[str, Tensors]:
    """The first- and, where there is one, the second-order gradient."""
    count = len(through)
    found = {"first": plain.gradient((False,) * count, progress)}
    try:
        found["second"] = exact if all(through) else plain.gradient((True,) * count, progress)
    except RuntimeError:
        return found
    return found


def _double_backward(small: Small, notes: list[str]) -> list[str]:
    """What has no second derivative: a problem where the recipe needs one, else a note."""
    learner = small.learner
    try:
        found = once_only(learner.model, small.tasks[0].support[0])
    except Exception as error:
        return [_told(error)]
    needed = isinstance(learner.estimator, Implicit) or (
        not isinstance(learner.estimator, Reptile)
        and any(
            learner.order(k, learner.steps, Progress(epoch=epoch))
            for k in range(learner.steps)
            for epoch in _epochs(learner, small.epochs)
        )
    )
    if needed:
        return [f"{one} There is no second derivative; {REMEDY}" for one in found]
    notes += [f"{one} The recipe needs no second derivative" for one in found]
    return []


def _start(small: Small, problems: list[str]) -> Tensors | None:
    """The gradient where training starts; None, and a problem, where there is none."""
    try:
        for epoch in _epochs(small.learner, small.epochs):
            result, _ = _run(small.learner, small, Progress(epoch=epoch))
    except Exception as error:
        problems.append(_told(error))
        return None
    if result.trouble:
        problems.append(f"{result.trouble} where training starts")
        return None
    return result.grads


def _zeros(start: Tensors, grads: Tensors, learner: MetaLearner, notes: list[str]) -> None:
    """Notes on the parameters that get a gradient of zero, which is right where nothing is wrong."""
    for when, zero in (
        ("at the start, not once training has moved the others", _silent(start) - _silent(grads)),
        (
            "at the start and later: the loss does not change with it",
            _silent(start) & _silent(grads),
        ),
    ):
        if zero:
            names = [name for name in grads if name in zero]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            biases = [name for name in names if name.endswith("bias")]
            normed = any("Norm" in type(module).__name__ for module in learner.model.modules())
            why = " (a norm behind a bias takes it away)" if biases and normed else ""
            notes.append(f"zero gradient {when}: {shown}{why}")


def _silent(grads: Tensors) -> set[str]:
    whole = _norm(grads, grads)
    return {name for name, grad in grads.items() if float(grad.norm()) <= _NOTHING * whole}


def _epochs(learner: MetaLearner, epochs: int) -> Iterator[int]:
    """The epochs from which order or step loss decide otherwise than before, and 0."""
    before: Any = None
    for epoch in range(epochs):
        progress = Progress(epoch=epoch)
        steps = learner.steps
        through = tuple(learner.order(k, steps, progress) for k in range(steps))
        weights = step_weights(learner.step_loss, steps, progress)
        decided = (through, tuple(weight > 0 for weight in weights))
        if decided != before:
            yield epoch
        before = decided


def _words(learner: MetaLearner, through: tuple[bool, ...], progress: Progress) -> str:
    if isinstance(learner.estimator, Reptile | Implicit):
        return f"{learner.estimator!r}"
    weights = step_weights(learner.step_loss, learner.steps, progress)
    counted = ", ".join(f"{w:.2g}" for w in weights)
    if all(through) or not any(through):
        order = "second order" if any(through) else "first order"
        order = order if through else "no inner step"
    else:
        order = "through steps " + ", ".join(str(k) for k, looks in enumerate(through) if looks)
    return f"{order}; weights of the query losses {counted}"


def _run(learner: MetaLearner, small: Small, progress: Progress) -> tuple[MetaGradient, bool]:
    """The meta-gradient from fixed draws, and whether the executor says that they are its own."""
    devices = sorted({p.device.index or 0 for p in learner.parameters() if p.device.type != "cpu"})
    with torch.random.fork_rng(devices), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.manual_seed(SEED)
        result = learner.meta_gradient(small.tasks, progress=progress)
    return result, any(issubclass(one.category, RandomDrawsWarning) for one in told)


@torch.no_grad()
def _perturb(learner: MetaLearner) -> None:
    """Move every meta-parameter by a tenth of its size, or from zero by a tenth."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            size = float(parameter.square().mean().sqrt()) or 1.0
            parameter.add_(0.1 * size * noise.to(parameter))


def _with(learner: MetaLearner, **blocks: Any) -> MetaLearner:
    """The same learner with other blocks, on the same parameters."""
    other = copy.copy(learner)
    for name, block in blocks.items():
        setattr(other, name, block)
    return other


def _exact(estimator: Any) -> Any:
    """What an estimator is compared with under `Loop`: itself, where it computes something else."""
    return estimator if isinstance(estimator, Reptile | Implicit) else Unrolled()


def _apart(one: MetaGradient, other: MetaGradient) -> float:
    names = list(other.grads)
    scale = max(_norm(other.grads, names), 1e-12)
    losses = abs(float(one.loss - other.loss)) / max(abs(float(other.loss)), 1e-12)
    return max(_distance(one.grads, other.grads, names) / scale, losses)


def _distance(one: Tensors, other: Tensors, names: Iterable[str]) -> float:
    return _norm({name: one[name] - other[name] for name in names}, names)


def _norm(tensors: Tensors, names: Iterable[str]) -> float:
    total: float = sum(float(tensors[name].double().square().sum()) for name in names)
    return math.sqrt(total)


def _told(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    return first if isinstance(error, MetablocksError) else f"{type(error).__name__}: {first}"
