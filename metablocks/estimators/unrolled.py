"""The meta-gradient by differentiating through the unrolled inner loop.

    ∇_θ Σ_k v_k L_q(θ_k)        back-propagated through every θ_{k+1} = θ_k + rule(∇L_s(θ_k))

Exact. Memory grows with the number of inner steps, as the graph of every step is kept.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metablocks.checks import checked
from metablocks.derivatives import vjp
from metablocks.estimators.adjoint import Adjoint
from metablocks.estimators.base import Estimator, TaskGradient, reached
from metablocks.estimators.sweep import Sweep, weigh
from metablocks.inner_loop import InnerLoop, QueryPass
from metablocks.kernels import twice_differentiable
from metablocks.pieces import Pieces
from metablocks.types import Task, Tensors


@checked()
@dataclass(frozen=True)
class Unrolled(Estimator):
    """Reverse-mode differentiation of the whole inner loop.

    Law: equals the closed form on quadratics and finite differences in general.
    Source: Finn, Abbeel, Levine 2017.

    >>> import metablocks as mb
    >>> mb.Unrolled()
    Unrolled()
    """

    exact: ClassVar[bool] = True

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        def objective(meta: Tensors) -> tuple[Tensor, tuple[Any, ...]]:
            loss, *rest = weighted_query_loss(inner, meta, buffers, task)
            return loss, tuple(rest)

        loss, pull, rest = vjp(objective, meta)
        (grads,) = pull(torch.ones_like(loss))
        return TaskGradient(reached(grads), loss, *rest)

    def in_pieces(self, run: Pieces) -> TaskGradient:
        return Sweep(run)()

    def low_memory(self, steps: int) -> Adjoint | None:
        """The sweep that recomputes each step: less than all graphs of two steps or more."""
        return Adjoint() if steps > 1 else None


def weighted_query_loss(
    inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
) -> tuple[Tensor, Tensor, Tensors, Tensor | None]:
    """Σ_k v_k L_q(θ_k); losses `[steps + 1]`, changes of the tracked buffers, scores `[steps + 1]`.

    What has no weight is not computed: its loss is nan.
    """
    queries: dict[int, QueryPass] = {}
    passes: list[tuple[Tensors, Tensors]] = []
    carry = inner.start(meta, buffers, inner.support_of(task, -1))
    reached = 0
    for index in sorted(inner.weights):
        with twice_differentiable(all(inner.through[reached:index])):
            for k in range(reached, index):
                carry, _ = inner.step(meta, carry, inner.support_of(task, k), k)
        reached = index
        queries[index] = inner.query(meta, carry, inner.query_of(task, index), index)
        passes.append((carry.buffers, queries[index].buffers))
    loss, losses, scores = weigh(inner, queries)
    return loss, losses, inner.changes((buffers, carry.buffers), *passes), scores
