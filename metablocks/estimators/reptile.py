"""Reptile: the initialisation moves towards where the inner loop ends.

    φ ← φ + ε (φ̃ − φ),    φ̃ after K inner steps on a task

As a gradient for any outer optimiser, φ − φ̃: plain gradient descent with the rate ε is the line above.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.batches import Side
from metablocks.checks import checked
from metablocks.errors import TaskError
from metablocks.estimators.base import Estimator, TaskGradient, at_the_end
from metablocks.inner_loop import InnerLoop
from metablocks.types import Task, TaskBatch, Tasks, Tensors

Examples: TypeAlias = Literal["all", "support"]
_Joined = TypeVar("_Joined", Task, TaskBatch)


@checked()
@dataclass(frozen=True, kw_only=True)
class Reptile(Estimator):
    """The meta-gradient φ − φ̃: from where a task's inner loop starts to where it ends.

    With the mean over the tasks of a step, an outer `sgd` of rate ε takes the paper's step,
    φ ← φ + ε (1/n) Σ_i (φ̃_i − φ): serial for n = 1, batched for more; a `linear` schedule from 1 to
    0 is the paper's ε. Nothing is differentiated through, whatever the order.

    In training there is no split into support and query; mini-batches (`Minibatches`) are drawn from what
    `examples` joins. Evaluation adapts to the support set as ever.

    The loss it reports is the query loss at φ̃, which with `"all"` is a loss on training examples.

    What does not adapt gets no gradient and is refused: a learned rate or transform, and parameters
    that `adapt` leaves out. So are steps = 0, other step losses than the final one, and orders that
    single out steps.

    - `examples`: what the inner steps see in training: "all", the support and query set of the task
      together (n shots and m queries a class are n + m shots), or "support" alone.

    Law: with one step of a learning rate α, it is α times the gradient of the loss on the examples
    (joint training).

    Source: Nichol, Achiam, Schulman 2018, and its released code. Deviation:
    1. A task's inner optimiser starts afresh, with `Adam(beta1=0.0)` too; in the released code
       Adam's second moment goes on from task to task in training.

    >>> import metablocks as mb
    >>> mb.Reptile(examples="support")
    Reptile(examples='support')

    Raises `BlockError` for unknown `examples` and the combinations above; `TaskError` where support and
    query cannot be joined.
    """

    reads: ClassVar[tuple[Side, ...]] = ("support",)
    examples: Examples = "all"

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        inner = inner.first_order()
        start = carry = inner.start(meta, buffers, inner.support_of(task, -1))
        for index in range(inner.steps):
            carry, _ = inner.step(meta, carry, inner.support_of(task, index), index)
        query = inner.query(meta, carry, inner.query_of(task, inner.steps), inner.steps)
        changes = inner.changes((buffers, carry.buffers), (carry.buffers, query.buffers))
        names = [name for name in inner.adapted if f"model.{name}" in meta]
        grads = {f"model.{name}": start.params[name] - carry.params[name] for name in names}
        return TaskGradient(grads, query.loss.detach(), changes=changes, **at_the_end(inner, query))

    def in_training(self, tasks: Tasks) -> Tasks:
        """The tasks, their support sets joined with their query sets if it trains on all examples."""
        if self.examples == "support":
            return tasks
        if isinstance(tasks, TaskBatch):
            return _joined(tasks, 1)
        return [_joined(task, 0) for task in tasks]


def _joined(task: _Joined, dimension: int) -> _Joined:
    """The task, or tasks stacked, with the examples of both sets, along a dimension, for support."""
    (support, form), (query, other) = map(pytree.tree_flatten, (task.support, task.query))
    alike = form == other and all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.ndim > dimension
        and a.shape[dimension + 1 :] == b.shape[dimension + 1 :]
        for a, b in zip(support, query, strict=True)
    )
    if not alike:
        raise TaskError(
            'Reptile(examples="all") joins support and query, whose tensors differ in form: '
            f'{_shapes(support)} and {_shapes(query)}; use examples="support"',
            block="Reptile",
            field="examples",
        )
    joined = [torch.cat(pair, dimension) for pair in zip(support, query, strict=True)]
    return replace(task, support=pytree.tree_unflatten(joined, form))


def _shapes(leaves: list[Any]) -> str:
    return ", ".join(str(list(leaf.shape)) if isinstance(leaf, Tensor) else "?" for leaf in leaves)
