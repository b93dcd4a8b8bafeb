"""Check a learner's meta-gradient, for every meta-parameter, against its definition.

    slope of L along d  =  ⟨gradient, d⟩        by finite differences, for each named parameter
    gradient            =  ∂L/∂φ                by a hand-written loop in plain autograd

L is the weighted query loss with the gradients of those inner steps held constant that the order does
not look through: one definition for second, first and truncated order. Reptile and the implicit
gradient have definitions of their own (`gradcheck.references`). All of it is evaluated away from
the start, where factors at the identity and zero biases would hide what they do.
"""

import copy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from metablocks.diagnose import without_second_derivative
from metablocks.errors import MetablocksError, first_line
from metablocks.estimators import Implicit, Reptile, Unrolled
from metablocks.executors import Loop, RandomDrawsWarning, Vmap
from metablocks.generators import devices_of, kept_draws
from metablocks.gradcheck.modules import refused_by_transforms, with_wrong_derivative
from metablocks.gradcheck.references import implicit_gradient, implicit_systems, reptile_gradient
from metablocks.gradcheck.report import (
    NOTHING,
    Agreement,
    Comparison,
    GradientPart,
    GradientReport,
    Reference,
    by_group,
    norm,
)
from metablocks.laws.compare import noise_like
from metablocks.laws.gradients import slopes
from metablocks.laws.plain_loop import SEED, PlainLoop, Tape
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.order import steps_through
from metablocks.step_loss import step_weights
from metablocks.types import Progress, TaskBatch, Tensors

_WITHIN = 1e-5
"""Of finite differences: their rounding is 1e-12 / width, over a thousandth of the whole."""
_ALIKE = 1e-8
"""Of two ways to one number in float64, over up to three inner steps."""
_SOLVED = 1e-6
"""Of conjugate gradients with as many steps as they need."""
_CG_STEPS = 40
_MEASURED = 2
"""Tasks on which the gradient is held to its definition; executor and estimator are compared on all."""
_WIDTHS = (1e-4, 1e-5, 1e-6)
_KINKS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d)
_REMEDY = (
    "what would work: order: {block: first_order}, or an operation that has one: hardswish composed of "
    "relu6, cdist of differences, a function of one's own without once_differentiable"
)


def check_learner(
    learner: MetaLearner, tasks: TaskBatch, *, epochs: int = 1, name: str = "the learner"
) -> GradientReport:
    """Compare the meta-gradient of a copy of a learner with its definition, on some tasks.

    Its estimator and executor are compared with `Loop` on all tasks, and this, entry by entry, with the
    definition on the first two.
    The learner and the tasks should be small, smooth and float64. Checked at every one of `epochs`
    from which the order or the step loss decides otherwise, by finite differences if the order does.
    What is wrong is in the report, by the names of parameters and modules; nothing of it is raised.

    Law: the report is ok for every learner of right blocks.

    >>> import metablocks as mb
    >>> from metablocks.laws.cases import Case
    >>> small = Case(steps=2).problem()
    >>> report = check_learner(small.learner(mb.lslr(0.1)), small.tasks)
    >>> report.ok, [row.group for row in report.rows][:2]
    (True, ['model.inputs', 'model.body'])
    """
    learner = copy.deepcopy(learner)
    model, inputs = learner.model, learner.batches.select(tasks[0].support, None, 0)[0]
    notes = [
        f"model.{path} ({type(module).__name__}) has kinks, and is kept as it is"
        for path, module in model.named_modules()
        if isinstance(module, _KINKS)
    ]
    parts: list[GradientPart] = []
    problems: list[str] = []
    try:
        turns = turning_points(learner, epochs)
        missing = without_second_derivative(model, inputs)
        if _looks_through(learner, turns):
            problems += [f"no second derivative in {one}; {_REMEDY}" for one in missing]
        else:
            notes += [f"no second derivative in {one}; the learner needs none" for one in missing]
        if not problems:
            starts = [_start(learner, _first(tasks), turn.epoch) for turn in turns]
            _perturb(learner)
            measured: set[tuple[bool, ...]] = set()
            for turn, start in zip(turns, starts, strict=True):
                part, grads, remarks = check_epoch(
                    learner, tasks, turn, twice=not missing, measure=turn.through not in measured
                )
                measured.add(turn.through)
                parts.append(part)
                notes += [*remarks, *_zeros(start, grads, learner)]
    except Exception as error:  # whatever a block from outside may raise
        problems += _explained(error, model, inputs)
    if not all(part.ok for part in parts):
        problems += [str(one) for one in with_wrong_derivative(model, inputs)]
    device = str(next(learner.parameters()).device)
    return GradientReport(name, device, tuple(parts), tuple(problems), tuple(dict.fromkeys(notes)))


def check_epoch(
    learner: MetaLearner, tasks: TaskBatch, turn: "Turn", *, twice: bool, measure: bool
) -> tuple[GradientPart, Tensors, list[str]]:
    """Compare the meta-gradient at one epoch: the part of the report, the gradient, notes.

    `twice`: the model has second derivatives. `measure`: take finite differences besides plain
    autograd.
    """
    progress, notes = Progress(epoch=turn.epoch), []
    estimator, executor = learner.estimator, learner.executor
    exact: Any = estimator if isinstance(estimator, Reptile | Implicit) else Unrolled()
    looped, few = with_blocks(learner, executor=Loop()), _first(tasks)
    agreements: list[Agreement] = []
    if estimator == exact and executor == Loop():
        measured, _ = run(learner, few, progress)
        got = measured
    else:
        base, _ = run(with_blocks(looped, estimator=exact), tasks, progress)
        got, draws_itself = run(learner, tasks, progress)
        other = f"{_name(exact)} under Loop()"
        if draws_itself:
            if isinstance(executor, Vmap):
                one_by_one = with_blocks(learner, executor=replace(executor, chunk=1))
                alone, _ = run(one_by_one, tasks, progress)
                what = f"{_name(estimator)} under Vmap(chunk=1) = {other}, draws and all"
                agreements.append(Agreement(what, _apart(alone, base), _ALIKE))
            notes.append(
                f"{_name(executor)} makes random draws of its own, so the table is of Loop()'s"
            )
            got, _ = run(looped, tasks, progress)
            executor = looped.executor
        if estimator != exact or executor != Loop():
            what = f"{_name(estimator)} under {_name(executor)} = {other}"
            agreements.append(Agreement(what, _apart(got, base), _ALIKE))
        compiled = getattr(executor, "compile", False)  # once for each number of tasks
        measured, _ = run(looped if compiled or draws_itself else learner, few, progress)
    reference = _reference(looped, few, turn, measured.grads, twice, measure)
    agreements += reference.agreements
    rows, problems = by_group(learner, measured.grads, reference)
    problems += [f"{one.what}: {one.error:.1e} apart" for one in agreements if not one.ok]
    if got.nonfinite:
        problems.insert(0, got.nonfinite)
    words = _words(learner, turn)
    part = GradientPart(turn.epoch, words, rows, tuple(agreements), tuple(problems))
    return part, measured.grads, notes


# ---- references


def _reference(
    looped: MetaLearner,
    tasks: TaskBatch,
    turn: "Turn",
    grads: Tensors,
    twice: bool,
    measure: bool,
) -> Reference:
    plain, progress = PlainLoop(looped, tasks), Progress(epoch=turn.epoch)
    estimator = looped.estimator
    if isinstance(estimator, Reptile):
        expected = reptile_gradient(plain, estimator)
        return Reference(grads, [Comparison("φ − φ̃ in plain autograd", grads, expected, _ALIKE)])
    if isinstance(estimator, Implicit):
        return _implicit(plain, looped, estimator, progress)
    exact = plain.gradient(turn.through, progress)
    comparisons = [Comparison("plain autograd", grads, exact, _ALIKE)]
    if measure:
        comparisons.append(_finite_differences(plain, turn.through, progress, grads))
    first = plain.gradient((False,) * looped.steps, progress)
    second = plain.gradient((True,) * looped.steps, progress) if twice else None
    return Reference(grads, comparisons, first, second)


def _implicit(
    plain: PlainLoop, looped: MetaLearner, estimator: Implicit, progress: Progress
) -> Reference:
    """The gradient with its system solved to the end, against the dense solution.

    If I + H/λ is not well above zero, so that the solver would stop on purpose, a larger λ in the
    linear system serves both sides.
    """
    systems = implicit_systems(plain)
    curvature = min(float(torch.linalg.eigvalsh(system.hessian).min()) for system in systems)
    strength = max(estimator.proximal, -2 * curvature)
    thorough = Implicit(proximal=strength, cg_steps=_CG_STEPS, tolerance=1e-12)
    solved, _ = run(with_blocks(looped, estimator=thorough), plain.tasks, progress)
    expected = implicit_gradient(systems, strength)
    agreements = []
    if strength == estimator.proximal:
        asked, _ = run(looped, plain.tasks, progress)
        largest = max(float(system.target.norm()) for system in systems)
        bound = (
            largest
            * float(asked.metrics[f"{estimator.solver}_residual"])
            / min(1, 1 + curvature / strength)
        )
        adapting = [f"model.{name}" for name in looped.adapted]
        error = norm(asked.grads[name] - expected[name] for name in adapting)
        steps = f"{estimator.cg_steps} {estimator.solver} steps"
        what = f"with its {steps} = the solution, within its residual's {bound:.0e}"
        agreements.append(Agreement(what, error, 1.01 * bound + 1e-9))
    what = f"the dense solution with λ = {strength:.3g}"
    comparison = Comparison(what, solved.grads, expected, _SOLVED)
    first = implicit_gradient(systems, float("inf"))
    return Reference(solved.grads, [comparison], first, agreements=agreements)


def _finite_differences(
    plain: PlainLoop, through: tuple[bool, ...], progress: Progress, grads: Tensors
) -> Comparison:
    """The gradient along a direction of every parameter, and slopes: of the width that fits best.

    A wrong gradient fits at none; a kink that a wide difference steps over, at a narrow one.
    """
    tape: Tape = {}

    def loss() -> torch.Tensor:
        return plain.loss(through, progress, tape)

    loss()
    least = 1e-3 * norm(grads.values())
    got: Tensors = {}
    measured: Tensors = {}
    errors: dict[str, float] = {}
    left = dict(plain.parameters)
    for width in _WIDTHS:
        along, slope = slopes(left, loss, width=width)
        for name in list(left):
            product = (grads[name] * along[name]).sum()
            error = abs(float(product - slope[name]))
            if name not in errors or error < errors[name]:
                got[name], measured[name], errors[name] = product, slope[name], error
            if error <= _WITHIN * max(float(grads[name].norm()), least):
                del left[name]
    return Comparison("finite differences", got, measured, _WITHIN)


# ---- a learner's variants, and where its policies turn


def with_blocks(learner: MetaLearner, **blocks: Any) -> MetaLearner:
    """The same learner with other blocks, on the same parameters."""
    other = copy.copy(learner)
    for name, block in blocks.items():
        setattr(other, name, block)
    return other


def run(learner: MetaLearner, tasks: TaskBatch, progress: Progress) -> tuple[MetaGradient, bool]:
    """The meta-gradient from `SEED` on; True if its executor warns of random draws of its own."""
    kept = kept_draws(devices_of(dict(learner.named_parameters())))
    with kept, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(SEED)
        result = learner.meta_gradient(tasks, progress=progress)
    return result, any(issubclass(one.category, RandomDrawsWarning) for one in caught)


def _first(tasks: TaskBatch) -> TaskBatch:
    """The tasks on which the gradient is held to its definition."""
    return tasks[:_MEASURED]


class Turn(NamedTuple):
    """An epoch, and what a learner's policies decide from there on."""

    epoch: int
    through: tuple[bool, ...]
    """For each step, whether the order differentiates through it."""
    weights: tuple[float, ...]
    """Of the query losses, at this epoch."""


def turning_points(learner: MetaLearner, epochs: int) -> list[Turn]:
    """Epoch 0, and those from which the order, or which query losses count, is another.

    >>> from metablocks import AnnealedOrder, LearningRate
    >>> order = AnnealedOrder(first_order_epochs=4)
    >>> learner = MetaLearner(
    ...     nn.Linear(1, 1), loss=nn.functional.mse_loss, steps=1, rule=LearningRate(0.1), order=order
    ... )
    >>> [turn.epoch for turn in turning_points(learner, 9)]
    [0, 4]
    """
    turns: list[Turn] = []
    before: Any = None
    for epoch in range(epochs):
        progress = Progress(epoch=epoch)
        through = steps_through(learner.order, learner.steps, progress)
        weights = step_weights(learner.step_loss, learner.steps, progress)
        decided = through, tuple(weight > 0 for weight in weights)
        if decided != before:
            turns.append(Turn(epoch, through, weights))
        before = decided
    return turns


def _looks_through(learner: MetaLearner, turns: list[Turn]) -> bool:
    """True if a second derivative of the support loss is ever taken."""
    if isinstance(learner.estimator, Reptile | Implicit):
        return isinstance(learner.estimator, Implicit)
    return any(any(turn.through) for turn in turns)


def _start(learner: MetaLearner, tasks: TaskBatch, epoch: int) -> Tensors:
    """The gradient where training starts. Raises `ArithmeticError` if it is not finite."""
    result, _ = run(learner, tasks, Progress(epoch=epoch))
    if result.nonfinite:
        raise ArithmeticError(f"{result.nonfinite} where training starts")
    return result.grads


@torch.no_grad()
def _perturb(learner: MetaLearner) -> None:
    """Move every meta-parameter by a tenth of its size, or from zero by a tenth."""
    learned = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    for name, noise in noise_like(learned, SEED).items():
        size = float(learned[name].square().mean().sqrt()) or 1.0
        learned[name].add_(0.1 * size * noise)


# ---- words


def _zeros(start: Tensors, grads: Tensors, learner: MetaLearner) -> list[str]:
    """Notes on the parameters whose gradient is zero, which is right if nothing is wrong."""
    first, later = _zero_names(start), _zero_names(grads)
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


def _zero_names(grads: Tensors) -> set[str]:
    whole = norm(grads.values())
    return {name for name, grad in grads.items() if float(grad.norm()) <= NOTHING * whole}


def _explained(error: Exception, model: nn.Module, inputs: object) -> list[str]:
    """The message of an error, with the module that it comes from if one can be found."""
    if isinstance(error, MetablocksError | ArithmeticError):
        return [str(error)]
    try:
        refused = refused_by_transforms(model, inputs)
    except Exception:  # the model itself does not run
        refused = []
    return [str(one) for one in refused] or [f"{type(error).__name__}: {first_line(error)}"]


def _apart(got: MetaGradient, expected: MetaGradient) -> float:
    loss = abs(float(got.loss - expected.loss)) / max(abs(float(expected.loss)), 1e-12)
    gap = norm(got.grads[name] - grad for name, grad in expected.grads.items())
    return max(loss, gap / max(norm(expected.grads.values()), 1e-12))


def _name(block: object) -> str:
    return f"{type(block).__name__}()"


def _words(learner: MetaLearner, turn: Turn) -> str:
    """The order and the weights of the query losses at this epoch, in words."""
    if isinstance(learner.estimator, Reptile | Implicit):
        return repr(learner.estimator)
    order = "second order" if all(turn.through) else "first order"
    if any(turn.through) and not all(turn.through):
        order = "through steps " + ", ".join(str(k) for k, yes in enumerate(turn.through) if yes)
    return f"{order}; weights of the query losses {', '.join(f'{w:.2g}' for w in turn.weights)}"
