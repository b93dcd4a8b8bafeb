"""The meta-gradient by differentiating through the unrolled inner loop.

    ∇_θ Σ_k v_k L_q(θ_k)        back-propagated through every θ_{k+1} = θ_k + rule(∇L_s(θ_k))

Exact. Memory grows with the number of inner steps, as the graph of every step is kept.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metablocks.estimators.base import TaskGradient
from metablocks.inner import InnerLoop
from metablocks.transforms import vjp_once
from metablocks.types import Task, Tensors


@dataclass(frozen=True)
class Unrolled:
    """Reverse-mode differentiation of the whole inner loop.

    Law: equals the closed form on quadratics and finite differences in general.
    Source: Finn, Abbeel, Levine 2017.

    >>> Unrolled()
    Unrolled()
    """

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        inner = replace(inner, recorded=True)

        def objective(meta: Tensors) -> tuple[Tensor, tuple[Tensor, Tensor, Tensors]]:
            loss, query_losses, changes = weighted_query_loss(inner, meta, buffers, task)
            return loss, (loss, query_losses, changes)

        value, pull, rest = vjp_once(objective, meta)
        (grads,) = pull(torch.ones_like(value))
        return TaskGradient(grads, *rest)

    def disconnected(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> list[str]:
        with torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in meta.items()}
            loss, _, _ = weighted_query_loss(inner, leaves, buffers, task)
        if not loss.requires_grad:
            return list(meta)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return [name for name, grad in zip(meta, grads, strict=True) if grad is None]


def weighted_query_loss(
    inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
) -> tuple[Tensor, Tensor, Tensors]:
    """Σ_k v_k L_q(θ_k), the losses `[steps + 1]`, and the changes of the collected buffers.

    What has no weight is not computed: its loss is nan.
    """
    losses: dict[int, Tensor] = {}
    passes: list[tuple[Tensors, Tensors]] = []
    last = buffers
    for index, carry in inner.rollout(meta, buffers, task.support, steps=max(inner.weights)):
        last = carry.buffers
        if index in inner.weights:
            losses[index], _, after = inner.query(meta, carry, task.query, index)
            passes.append((carry.buffers, after))
    return *weigh(inner, losses), inner.changes((buffers, last), *passes)


def weigh(inner: InnerLoop, losses: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Σ_k v_k L_q(θ_k), and the losses `[steps + 1]`, nan where there is none."""
    loss = torch.stack([inner.weighted(value, index) for index, value in losses.items()]).sum()
    nan = torch.full_like(loss.detach(), torch.nan)
    values = [losses[k].detach() if k in losses else nan for k in range(inner.steps + 1)]
    return loss, torch.stack(values)
