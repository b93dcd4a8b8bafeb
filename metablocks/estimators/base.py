"""What an estimator is: a way to compute one task's meta-gradient."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from metablocks.inner import InnerLoop
from metablocks.types import Task, Tensors


class TaskGradient(NamedTuple):
    """One task's contribution; a pytree."""

    grads: Tensors
    """∂(weighted query loss)/∂(meta-parameter), under the learner's names."""
    loss: Tensor
    """The weighted query loss, a scalar."""
    query_losses: Tensor
    """`[steps + 1]`; nan where the step loss gives no weight."""
    changes: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """By how much the task's passes moved the buffers that are collected (`InnerLoop.changes`)."""
    metrics: Tensors = {}  # noqa: RUF012
    """What the estimator has to say of its own work: scalars by name, the same names for each task."""


@runtime_checkable
class Estimator(Protocol):
    """Computes the meta-gradient of one task.

    Law: a pure function of its arguments that composes with `torch.func.vmap`; an estimator that
    claims exactness equals `Unrolled`.

    An estimator may have more methods: `check(learner)`, as other blocks; `inner_rule(rule) -> rule`,
    the update rule that a learner with this estimator goes by, in training and at evaluation alike;
    `thrifty(steps)`, an estimator of the same gradient that takes less memory, or None. One that
    claims another gradient than `Unrolled`'s says so by an attribute `exact = False`.
    """

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        """The gradient of the task's weighted query loss with respect to every entry of `meta`."""

    def disconnected(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> list[str]:
        """The meta-parameters that this task's loss does not depend on."""
