"""Reptile: the initialisation moves towards where the inner loop ends.

    φ ← φ + ε (φ̃ − φ),    φ̃ after K inner steps on a task

As a gradient for any outer optimiser, φ − φ̃: plain gradient descent with the rate ε is the line above.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Count, checked
from metablocks.errors import TaskError
from metablocks.estimators.base import Estimator, TaskGradient, at_the_end
from metablocks.inner_loop import InnerLoop
from metablocks.types import Batch, Task, Tensors

Examples: TypeAlias = Literal["all", "support"]


@checked()
@dataclass(frozen=True, kw_only=True)
class Reptile(Estimator):
    """The meta-gradient φ − φ̃: from where a task's inner loop starts to where it ends.

    With the mean over the tasks of a step, an outer `sgd` of rate ε takes the paper's step,
    φ ← φ + ε (1/n) Σ_i (φ̃_i − φ): serial for n = 1, batched for more; a `linear` schedule from 1 to
    0 is the paper's ε. Nothing is differentiated through, whatever the order.

    In training there is no split into support and query. Batches run on from pass to pass.
    Evaluation adapts to the support set as ever.

    The loss it reports is the query loss at φ̃, which with `"all"` is a loss on training examples.

    What does not adapt gets no gradient and is refused: a learned rate or transform, and parameters
    that `adapt` leaves out. So are steps = 0, other step losses than the final one, and orders that
    single out steps.

    - `examples`: what the inner steps see in training: "all", the support and query set of the task
      together (n shots and m queries a class are n + m shots), or "support" alone.
    - `batch`: examples of an inner step, one shuffled pass after another; None for all.

    Laws: with one step of a learning rate α, it is α times the gradient of the loss on the examples
    (joint training). Without `batch` nothing is drawn, and all executors give one gradient; with it,
    the draws follow from torch's global generator, and are `Vmap`'s own there (see
    `RandomDrawsWarning`).

    Source: Nichol, Achiam, Schulman 2018, and its released code. Deviation:
    1. A task's inner optimiser starts afresh, with `Adam(beta1=0.0)` too; in the released code
       Adam's second moment goes on from task to task in training.

    >>> import metablocks as mb
    >>> mb.Reptile(examples="support")
    Reptile(examples='support', batch=None)

    Raises `BlockError` for unknown `examples`, a `batch` below 1, and the combinations above;
    `TaskError` where support and query cannot be joined.
    """

    examples: Examples = "all"
    batch: Count | None = None

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        inner = inner.first_order()
        batch = self._batches(self._examples(task), inner.steps)
        start = carry = inner.start(meta, buffers)
        for index in range(inner.steps):
            carry, _ = inner.step(meta, carry, batch(index), index)
        query = inner.query(meta, carry, task.query, inner.steps)
        changes = inner.changes((buffers, carry.buffers), (carry.buffers, query.buffers))
        names = [name for name in inner.adapted if f"model.{name}" in meta]
        grads = {f"model.{name}": start.params[name] - carry.params[name] for name in names}
        return TaskGradient(grads, query.loss.detach(), changes=changes, **at_the_end(inner, query))

    def batches(self, task: Task) -> list[Batch]:
        """The batches whose loss must depend on every meta-parameter."""
        return [self._examples(task)]

    def _examples(self, task: Task) -> Batch:
        if self.examples == "support":
            return task.support
        (support, form), (query, other) = map(pytree.tree_flatten, (task.support, task.query))
        if form != other or not all(map(_join, support, query)):
            raise TaskError(
                'Reptile(examples="all") joins support and query, whose tensors differ in form: '
                f'{_shapes(support)} and {_shapes(query)}; use examples="support"',
                block="Reptile",
                field="examples",
            )
        joined: Batch = pytree.tree_unflatten(
            [torch.cat(pair) for pair in zip(support, query, strict=True)], form
        )
        return joined

    def _batches(self, examples: Batch, steps: int) -> Callable[[int], Batch]:
        """The examples of each inner step."""
        if self.batch is None:
            return lambda index: examples
        size = self.batch
        first: Tensor = pytree.tree_leaves(examples)[0]
        passes = -(-steps * size // len(first))
        order = torch.rand(passes, len(first), device=first.device).argsort(1)
        order = order.flatten()

        def batch(index: int) -> Batch:
            chosen = order[index * size : (index + 1) * size]
            taken: Batch = pytree.tree_map(lambda leaf: leaf[chosen], examples)
            return taken

        return batch


def _join(support: Any, query: Any) -> bool:
    """True if two leaves are the examples of one kind of tensor."""
    both = isinstance(support, Tensor) and isinstance(query, Tensor)
    return both and support.ndim > 0 and support.shape[1:] == query.shape[1:]


def _shapes(leaves: list[Any]) -> str:
    return ", ".join(str(list(leaf.shape)) if isinstance(leaf, Tensor) else "?" for leaf in leaves)
