"""Laws of a learner's meta-gradient: closed forms, finite differences, and one gradient everywhere."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.devices import has_float64, in_float64
from metablocks.errors import LawError
from metablocks.estimators import Adjoint, Estimator, Unrolled
from metablocks.executors import Executor, Loop, Vmap
from metablocks.generators import devices_of
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close, fixed_draws, named, noise_like, perturb
from metablocks.laws.plain_loop import PlainLoop
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.order import FirstOrder, SecondOrder, steps_through
from metablocks.rules import LearningRate
from metablocks.rules.base import members
from metablocks.types import Progress, TaskBatch, Tensors


def quadratic(
    problem: Problem, *, rate: float = 0.1, order_two: bool = True, **blocks: Any
) -> None:
    """Law 6: on `Case(kind="quadratic")` the meta-gradient is the closed form, for θ and for α.

        θ_{k+1} = θ_k − α g_k,  g_k = A θ_k − b,   λ = C θ_K − d
        ∂/∂θ = (I − αA)^K λ,    ∂/∂α = −Σ_k ⟨g_k, (I − αA)^{K−1−k} λ⟩

    with (A, b) the support and (C, d) the query set; to first order every factor is I.
    """
    learner = problem.learner(LearningRate(rate, learn=True), **blocks)
    result = learner.meta_gradient(problem.tasks)
    start: Tensor = learner.model.get_parameter("theta").detach()
    theta_grad, rate_grad = torch.zeros_like(start), torch.zeros_like(start[0])
    for index in range(len(problem.tasks)):
        (a, b), (c, d) = problem.tasks[index].support, problem.tasks[index].query
        thetas = [start]
        for _ in range(problem.steps):
            thetas.append(thetas[-1] - rate * (a @ thetas[-1] - b))
        adjoint = c @ thetas[-1] - d
        for theta in reversed(thetas[:-1]):
            rate_grad -= (a @ theta - b) @ adjoint / len(problem.tasks)
            adjoint = adjoint - rate * a @ adjoint if order_two else adjoint
        theta_grad += adjoint / len(problem.tasks)
    expected = {"model.theta": theta_grad, "rule.rate.*": rate_grad}
    assert_close("quadratic", result.grads, expected, 1e-13)


def zero_hessian(problem: Problem, make: Callable[..., MetaLearner]) -> None:
    """Law 1: with a support loss linear in the parameters, first order is second order.

    The support loss is ⟨slope, θ⟩ over all parameters of the problem, the query loss Σ θ³;
    `make(linear problem, order=order)` is a learner of it. First order makes a constant of a step's
    gradient: a learner that makes one of the parameters loses what they came from, and θ its gradient.
    """
    linear = _linear_support(problem)
    first, second = (
        make(linear, order=order).meta_gradient(linear.tasks).grads
        for order in (FirstOrder(), SecondOrder())
    )
    assert_close("zero Hessian", first, second, 1e-12)


def _linear_support(problem: Problem) -> Problem:
    """The same parameters and number of tasks under another loss: linear on support, cubic on query."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.model()

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([p.flatten() for p in self.parameters()])

    def loss(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        slope, cubic = target
        return slope @ prediction + cubic * prediction.pow(3).sum()

    flat = torch.cat([p.detach().flatten() for p in problem.model().parameters()])
    count = len(problem.tasks)
    slope = noise_like({"slope": flat.expand(count, -1)})["slope"]
    zero, one, nothing = flat.new_zeros(count), flat.new_ones(count), flat.new_zeros(count, 1)
    tasks = TaskBatch((nothing, (slope, zero)), (nothing, (slope, one)))
    return Problem(Flat, loss, tasks, problem.steps)


def plain_autograd(
    learner: MetaLearner, tasks: TaskBatch, *, progress: Progress | None = None
) -> None:
    """Law 8: an exact learner's loss and meta-gradient are those of a loop in plain autograd.

    From the same draws, so under an executor that draws as `Loop` does if any are drawn. The loop
    is `laws.plain_loop`: θ ← θ + rule(g), with g a constant at the steps that the order does not
    differentiate through, and never θ or what the rule reads and learns.
    """
    progress, plain = progress or Progress(), PlainLoop(learner, tasks)
    through = steps_through(learner.order, learner.steps, progress)
    with plain.seeded():
        got = learner.meta_gradient(tasks, progress=progress)
    loss = {"loss": plain.loss(through, progress)}
    assert_close("plain autograd, loss", {"loss": got.loss}, loss, 1e-10)
    assert_close("plain autograd, gradient", got.grads, plain.gradient(through, progress), 1e-10)


def finite_differences(
    learner: MetaLearner,
    tasks: TaskBatch,
    *,
    progress: Progress | None = None,
    widths: Sequence[float] = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
    within: float = 1e-6,
) -> None:
    """Law 7: along a random direction of *every* meta-parameter, the gradient is the loss's slope.

    Second order, float64, smooth nets without dropout: the loss comes from `evaluate`, another way
    than the gradient's. On a device without float64 it is the gradient of a copy on the CPU. First
    along two directions of all parameters at once, which a fault in any parameter spoils; if they do
    not agree, along one of each parameter, so that the error names it. `within` is relative to the
    slopes of all parameters together. A kink or a steep place within one of the `widths` spoils a
    slope, and the next one goes past it; a gradient that is wrong is the slope at no width. Parameters
    of a rule that declares `straight_through` have no slope, and are left out.
    """
    if not all(has_float64(device) for device in devices_of(dict(learner.named_parameters()))):
        learner = copy.deepcopy(learner).to("cpu", torch.float64)
        tasks = tasks.to("cpu").to(torch.float64)
    grads = learner.meta_gradient(tasks, progress=progress).grads
    weights = learner.step_loss(learner.steps, progress or Progress())

    def loss() -> Tensor:
        losses = learner.evaluate(tasks).query_losses
        return (losses.mean(0) * weights.to(losses)).sum()

    without = {
        id(p) for rule in members(learner.rule) if rule.straight_through for p in rule.parameters()
    }
    learned = {n: p for n, p in learner.named_parameters() if n in grads}
    learned = {name: p for name, p in learned.items() if id(p) not in without}
    for width in widths:
        if all(_agrees(learned, grads, loss, width, within, seed) for seed in (1, 2)):
            return
    for width in widths:
        directions, expected = slopes(learned, loss, width=width)
        got = {name: (grads[name] * direction).sum() for name, direction in directions.items()}
        try:
            return assert_close("finite differences", got, expected, within)
        except LawError:
            if width == widths[-1]:
                raise


def slopes(
    parameters: Mapping[str, Tensor], loss: Callable[[], Tensor], *, width: float = 1e-4
) -> tuple[Tensors, Tensors]:
    """The slope of `loss` along a random direction of unit length of every parameter, one by one.

    Returns the directions and the slopes, by name. Parameters are moved in place, `width` and twice
    that to either side, and put back; the five-point formula has an error of the order of `width`⁴.

    >>> x = torch.tensor([3.0], dtype=torch.float64)
    >>> directions, slope = slopes({"x": x}, lambda: (x**2).sum())
    >>> round(float(slope["x"] * directions["x"]), 6)
    6.0
    """
    directions = _unit_directions(parameters, seed=0)
    return directions, {
        name: _slope({name: parameter}, directions, loss, width)
        for name, parameter in parameters.items()
    }


def _unit_directions(parameters: Mapping[str, Tensor], seed: int) -> Tensors:
    noise = noise_like(parameters, seed)
    return {name: n / n.norm().clamp_min(1e-12) for name, n in noise.items()}


def _slope(
    parameters: Mapping[str, Tensor], directions: Tensors, loss: Callable[[], Tensor], width: float
) -> Tensor:
    """The slope of `loss` if all parameters move along their directions together."""
    originals = {name: p.detach().clone() for name, p in parameters.items()}

    def at(step: float) -> Tensor:
        for name, parameter in parameters.items():
            parameter.data.copy_(originals[name] + step * width * directions[name])
        return loss()

    try:
        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * width)
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(originals[name])


def _agrees(
    parameters: Mapping[str, Tensor],
    grads: Tensors,
    loss: Callable[[], Tensor],
    width: float,
    within: float,
    seed: int,
) -> bool:
    """True if the gradient is the slope along one direction of all parameters at once."""
    directions = _unit_directions(parameters, seed)
    parts = [float((grads[name] * direction).sum()) for name, direction in directions.items()]
    error = abs(sum(parts) - float(_slope(parameters, directions, loss, width)))
    return error <= within * math.hypot(*parts)


def one_gradient(
    problem: Problem,
    executors: Iterable[Executor],
    make: Callable[[Executor], MetaLearner],
    *,
    progress: Progress | None = None,
) -> None:
    """Law 8: every executor gives the loop's loss, query losses, meta-gradient and buffers."""
    expected = make(Loop()).meta_gradient(problem.tasks, progress=progress)
    for executor in executors:
        got = make(executor).meta_gradient(problem.tasks, progress=progress)
        _assert_same(f"{named(executor)} = Loop", got, expected)


def one_estimator(
    problem: Problem,
    estimators: Iterable[Estimator],
    make: Callable[[Estimator], MetaLearner],
    *,
    progress: Progress | None = None,
) -> None:
    """Law 8: an estimator that claims exactness gives `Unrolled`'s loss, gradient and buffers.

    It does so from the same random draws, and leaves the generators in the same state.
    """

    def run(estimator: Estimator) -> tuple[MetaGradient, Tensors]:
        learner = make(estimator)
        with fixed_draws():
            result = learner.backward(problem.tasks, progress=progress)
            return result, {"draws": torch.rand(4, device=result.loss.device)}

    expected, next_draws = run(Unrolled())
    for estimator in estimators:
        law = f"{named(estimator)} = Unrolled"
        got, draws = run(estimator)
        _assert_same(law, got, expected)
        assert_close(f"{law}, what is drawn next", draws, next_draws, within=0)


def moved_learner(problem: Problem, **blocks: Any) -> MetaLearner:
    """A learner of the problem; what its rule learns is moved away from its start."""
    return perturb(problem.learner(**blocks), "rule.")


def alike(
    problem: Problem,
    make: Callable[..., MetaLearner],
    *,
    executors: Sequence[Executor] = (Vmap(), Vmap(chunk=2)),
    estimators: Sequence[Estimator] = (Adjoint(), Adjoint(keep_every=2)),
    progress: Progress | None = None,
    **blocks: Any,
) -> None:
    """Law 8: executors and exact estimators give the gradient of the plain loop, unrolled.

    `make(problem, **blocks)` is a learner of the problem with these blocks.
    """

    def learner(**more: Any) -> MetaLearner:
        return make(problem, **blocks, **more)

    if estimators:
        one_estimator(problem, estimators, lambda e: learner(estimator=e), progress=progress)
    if executors:
        one_gradient(problem, executors, lambda e: learner(executor=e), progress=progress)


def _assert_same(law: str, got: MetaGradient, expected: MetaGradient) -> None:
    within = 1e-10
    assert_close(f"{law}, loss", {"loss": got.loss}, {"loss": expected.loss}, within)
    assert_close(f"{law}, gradient", got.grads, expected.grads, within)
    assert_close(f"{law}, buffers", got.buffer_changes, expected.buffer_changes, within)
    left, right = ({"losses": r.query_losses.nan_to_num(-1)} for r in (got, expected))
    assert_close(f"{law}, query losses", left, right, within)


def mean_of_tasks(
    learner: MetaLearner, tasks: TaskBatch, *, progress: Progress | None = None
) -> None:
    """Law 13: a batch's gradient is the mean of its tasks' gradients, in any order of tasks.

    So are the changes of its buffers.
    """

    def moves(batch: TaskBatch) -> Tensors:
        """Gradients, and changes of buffers except whole numbers, which have no mean."""
        result = learner.meta_gradient(batch, progress=progress)
        changes = {n: c for n, c in result.buffer_changes.items() if c.is_floating_point()}
        return {**result.grads, **changes}

    singles = [TaskBatch.stack([tasks[index]]) for index in range(len(tasks))]
    alone = [moves(single) for single in singles]
    mean = {
        name: torch.stack([in_float64(one[name]) for one in alone]).mean(0).to(like)
        for name, like in alone[0].items()
    }
    whole = moves(tasks)
    within = 1e-10
    assert_close("a batch is the mean of its tasks", whole, mean, within)
    reverse = TaskBatch.stack([tasks[index] for index in reversed(range(len(tasks)))])
    assert_close("any order of tasks", moves(reverse), whole, within)
