"""What an estimator is: a way to compute one task's meta-gradient."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metablocks.inner import InnerLoop
from metablocks.types import Task, Tensors


class TaskGradient(NamedTuple):
    """One task's contribution; a pytree."""

    grads: Tensors
    """∂(weighted query loss)/∂(meta-parameter), under the learner's names. By plain autograd a name
    may be absent if the loss does not depend on it."""
    loss: Tensor
    """The weighted query loss, a scalar."""
    query_losses: Tensor
    """`[steps + 1]`; nan where the step loss gives no weight."""
    changes: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """By how much the task's passes moved the buffers that are collected (`InnerLoop.changes`)."""
    scores: Tensor | None = None
    """`[steps + 1]`, as `query_losses`: the metric, if the inner loop has one."""
    metrics: Tensors = {}  # noqa: RUF012
    """What the estimator has to say of its own work: scalars by name, the same names for each task."""


@runtime_checkable
class Estimator(Protocol):
    """Computes the meta-gradient of one task.

    Law: a pure function of its arguments that composes with `torch.func.vmap`; an estimator that
    claims exactness equals `Unrolled`.

    An estimator may have more methods: `check(learner)`, as other blocks; `inner_rule(rule) -> rule`,
    the update rule that a learner with this estimator goes by, in training and at evaluation alike;
    `thrifty(steps)`, an estimator of the same gradient that takes less memory, or None;
    `batches(task)`, the batches whose loss at θ_0 must depend on every meta-parameter, for one that
    does not differentiate the query loss after the inner loop.
    """

    exact: ClassVar[bool]
    """True if it claims `Unrolled`'s gradient."""

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        """The gradient of the task's weighted query loss by the entries of `meta`."""


def reached(grads: Mapping[str, Tensor | None]) -> Tensors:
    """The gradients that there are."""
    return {name: grad for name, grad in grads.items() if grad is not None}


def filled(grads: Mapping[str, Tensor | None], like: Tensors) -> Tensors:
    """The gradients, zero where there is none."""
    given = reached(grads)
    return {
        name: given[name] if name in given else torch.zeros_like(tensor)
        for name, tensor in like.items()
    }
