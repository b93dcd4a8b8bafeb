"""A dozen faults that meta-learning code has had, each caught by the law meant for it.

A fault is the smallest wrong copy of a shipped block. The law holds for the right block on the very
problem on which it breaks for the wrong one, so that it is the fault it sees, and nothing else.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any
from unittest import mock

import kronecker_laws
import policy_laws
import pytest
import small_problems as problem
import torch
from torch.utils import _pytree as pytree

from metablocks import (
    KFO,
    Adjoint,
    LearningRate,
    Loop,
    MTMask,
    TruncatedOrder,
    UniformStepLoss,
    Unrolled,
    Vmap,
    per_step_batch_norm,
)
from metablocks.errors import LawError
from metablocks.estimators import adjoint
from metablocks.estimators.base import TaskGradient
from metablocks.estimators.unrolled import weighted_query_loss
from metablocks.functional import detach
from metablocks.inner_loop import InnerLoop
from metablocks.laws import estimators, executors, gradients, norms, rules, step_losses
from metablocks.types import Progress, Task

# ---- wrong copies


class DetachedParameters(Unrolled):
    """A first-order step makes a constant of the parameters, and not of the gradient."""

    def __call__(self, inner, meta, buffers, task):
        result = super().__call__(_Detaching(**_fields(inner)), meta, buffers, task)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in meta.items()}
        return result._replace(grads=zeros | result.grads)  # else the learner itself finds it out


class _Detaching(InnerLoop):
    def update(self, meta, carry, support, index):
        if not self.through[index]:
            carry = carry._replace(params=detach(carry.params))
        return super().update(meta, carry, support, index)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


class FirstRate(LearningRate):
    """A rate for each step, of which every step takes the first."""

    def forward(self, updates, state, step):
        return super().forward(updates, state, replace(step, index=0))


class GradOfVmap(Vmap):
    """One gradient of the summed loss of all tasks, and not the sum of the tasks' gradients."""

    def __call__(self, fn, shared, buffers, tasks):
        if fn.key is None:  # an evaluation
            return super().__call__(fn, shared, buffers, tasks)
        meta, tensors = shared

        def loss_alone(_, inner, meta, buffers, task):
            return TaskGradient({}, *weighted_query_loss(inner, meta, buffers, task))

        def objective(meta):
            def one(support, query):
                return fn((meta, tensors), buffers, Task(support, query))

            totals, each = torch.func.vmap(one)(tasks.support, tasks.query)
            _, changes, metrics, losses = totals
            return losses.sum(), (changes, metrics, losses, each)

        with mock.patch.object(Unrolled, "__call__", loss_alone):
            grads, rest = torch.func.grad(objective, has_aux=True)(meta)
        changes, metrics, losses, each = rest
        changes, metrics = ({n: t.sum(0) for n, t in part.items()} for part in (changes, metrics))
        return (grads, changes, metrics, losses.sum()), each


class TransposedFactor(KFO):
    """Lᵀ G R + B."""

    def _transform(self, factors, gradients):
        turned = {name: f.mT if name.startswith("left") else f for name, f in factors.items()}
        return super()._transform(turned, gradients)


def shared_statistics(model, steps):
    """A per-step norm whose first statistics are those of the original norm, and not a copy."""
    new = per_step_batch_norm(model, steps)
    stored = dict(model.named_buffers())
    for name, buffer in new.named_buffers():
        if name.endswith("running_mean"):
            buffer.data = stored[name].expand_as(buffer)
    return new


def one_percent_too_much(steps, progress):
    return UniformStepLoss()(steps, progress) * 1.01


class OneTooFew(TruncatedOrder):
    """Looks through one step less than it says."""

    def __call__(self, step, steps, progress):
        return step > steps - self.last


class MaskPerStep(MTMask):
    """Draws its mask at every step."""

    def forward(self, updates, state, step):
        masked, _ = super().forward(updates, super().init(step.params), step)
        return masked, state


class MaskTwice(MTMask):
    """Its straight-through gradient is twice the soft mask's."""

    def _draw(self, logit):
        mask = super()._draw(logit)
        return mask + (mask - mask.detach())


class TooFar(KFO):
    """With `adapt_transform`, its factors go down the slope at twice the rate."""

    def _slope(self, factors, before, gradients):
        slope = super()._slope(factors, before, gradients)
        return {key: 2 * s for key, s in slope.items()}


class SumForMean(Loop):
    """Adds up so that the learner, which divides by the number of tasks, is left with their sum."""

    def __call__(self, fn, shared, buffers, tasks):
        total, each = super().__call__(fn, shared, buffers, tasks)
        return pytree.tree_map(lambda tensor: tensor * len(tasks), total), each


# ---- the table


@dataclass(frozen=True)
class Fault:
    """What is wrong, the law that says so, and how its error starts."""

    says: str
    wrong: Any
    right: Any
    law: Callable[..., None]
    error: str
    on: Callable[..., problem.Problem] | None = problem.regression
    drawn: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], Any] = nullcontext
    """What makes the block wrong, where the fault is not in the block's own class."""


FAULTS = [
    Fault(
        "detached parameters instead of gradients",
        DetachedParameters(),
        Unrolled(),
        lambda estimator, small: gradients.zero_hessian(
            small, lambda linear, order: linear.learner(order=order, estimator=estimator)
        ),
        "zero Hessian: relative error",
    ),
    Fault(
        "a rate that ignores the step",
        partial(FirstRate, 0.1, per_step=True),
        partial(LearningRate, 0.1, per_step=True),
        rules.reads_the_step,
        "reads the step: it is made for 3 steps, but its updates at step 0 and at step 1 are the same",
    ),
    Fault(
        "grad(vmap) through batch norm",
        GradOfVmap(),
        Vmap(),
        executors.equals_the_loop,
        r"GradOfVmap\(.*\) = Loop, gradient: relative error",
        problem.classification,
    ),
    Fault(
        "a KFO with a transposed factor",
        TransposedFactor,
        KFO,
        kronecker_laws.kfo_is_a_kronecker_product,
        "KFO is a Kronecker product: relative error",
    ),
    Fault(
        "an adjoint that forgets the query gradient of middle steps",
        Adjoint(),
        Adjoint(),
        estimators.equals_unrolled,
        r"Adjoint\(.*\) = Unrolled, gradient: relative error",
        drawn={"step_loss": UniformStepLoss()},
        patch=lambda: mock.patch.object(adjoint, "_sum", lambda adjoint, slope: adjoint),
    ),
    Fault(
        "running statistics that alias",
        shared_statistics,
        per_step_batch_norm,
        norms.is_not_aliased,
        r"not aliased: body\.0\.norm\.running_mean shares its memory with .* of the original",
        problem.classification,
    ),
    Fault(
        "step-loss weights that sum to 1.01",
        one_percent_too_much,
        UniformStepLoss(),
        step_losses.is_a_weighting,
        "a weighting: .* whose sum is 1.01; each is ≥ 0, and their sum is 1",
        None,
        {"steps": 4, "progress": Progress()},
    ),
    Fault(
        "a truncated order off by one",
        OneTooFew(last=1),
        TruncatedOrder(last=1),
        policy_laws.truncation_ends,
        r"OneTooFew\(last=3\) = SecondOrder\(\): relative error",
    ),
    Fault(
        "a mask drawn per step instead of per task",
        MaskPerStep,
        MTMask,
        rules.draws_once_a_task,
        "draws once a task: init and forward both draw random numbers",
    ),
    Fault(
        "a mask with another gradient than the soft one's",
        MaskTwice,
        MTMask,
        lambda make, small: gradients.plain_autograd(rules.learner_of(make, small), small.tasks),
        "plain autograd, gradient: relative error",
    ),
    Fault(
        "a transform that adapts at another rate than the weights",
        partial(TooFar, adapt_transform=True, rate=0.1),
        partial(KFO, adapt_transform=True, rate=0.1),
        kronecker_laws.kfo_adapts_down_the_slope,
        "KFO adapts down the slope, step 1: relative error",
    ),
    Fault(
        "an executor that sums instead of averaging",
        SumForMean(),
        Loop(),
        executors.adds_up,
        "adds up: relative error",
        None,
        {"tasks": 3},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.says)
def test_each_fault_is_caught_by_the_law_meant_for_it(fault, place):
    given = [] if fault.on is None else [fault.on(**place)]
    fault.law(fault.right, *given, **fault.drawn)
    with fault.patch(), pytest.raises(LawError, match=fault.error):
        fault.law(fault.wrong, *given, **fault.drawn)


def test_without_batch_norm_the_gradient_of_a_vmap_is_right(place):
    """So it is batch norm that a net must have to show it."""
    executors.equals_the_loop(GradOfVmap(), problem.regression(**place))
