"""Reference gradients of the estimators that do not differentiate the objective, in plain autograd.

Reptile: φ − φ̃, from the start of the inner loop to its end. Implicit: with the Hessian written
out, (I + ∇²L_s(φ*)/λ)⁻¹ ∇L_q(φ*) for what adapts, and ∂L_q/∂ρ − (1/λ)(∂²L_s/∂φ∂ρ)ᵀ v for the rest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.estimators import Reptile
from metablocks.functional import detach
from metablocks.laws.plain_loop import PlainLoop, gradient
from metablocks.types import Task, Tensors


def reptile_gradient(plain: PlainLoop, estimator: Reptile) -> Tensors:
    """The mean over tasks of φ − φ̃, on the examples that the estimator trains on."""
    tasks: list[Task] = [plain.tasks[index] for index in range(len(plain.tasks))]
    if estimator.examples == "all":
        pairs = [
            pytree.tree_map(lambda *x: torch.cat(x), task.support, task.query) for task in tasks
        ]
        tasks = [Task(both, task.query) for both, task in zip(pairs, tasks, strict=True)]

    def one(number: int, task: Task) -> Tensors:
        start, end, _ = _inner(plain, task)
        return {f"model.{name}": start[name] - end[name] for name in start}

    return _mean(plain.each(one, tasks))


class System(NamedTuple):
    """One task's linear system (I + H/λ) v = ∇L_q(φ*), written out, except for λ."""

    hessian: Tensor
    """H `[n, n]`, n numbers adapting."""
    target: Tensor
    """∇L_q(φ*), `[n]`."""
    mixed: Tensors
    """∂²L_s/∂φ∂ρ `[n, size of ρ]` of what does not adapt."""
    direct: Tensors
    """∂L_q/∂φ and ∂L_q/∂ρ, by name."""


def implicit_systems(plain: PlainLoop) -> list[System]:
    """The systems of all tasks, at the end of their inner loops."""

    def one(number: int, task: Task) -> System:
        _, end, buffers = _inner(plain, task)
        fast = {name: tensor.detach().requires_grad_() for name, tensor in end.items()}
        adapting = {f"model.{name}": tensor for name, tensor in fast.items()}
        rest = {name: p for name, p in plain.parameters.items() if name not in adapting}
        both = adapting | rest
        index = plain.learner.steps - 1
        with torch.enable_grad():
            value, _ = plain.forward(fast, buffers, task.query, index)
            direct = gradient(value, both)
            value, _ = plain.forward(fast, buffers, task.support, index)
            slope = _flat(gradient(value, adapting, graph=True))
        rows = [gradient(entry, both, keep=True) for entry in slope]
        return System(
            torch.stack([_flat({name: row[name] for name in adapting}) for row in rows]),
            _flat({name: direct[name] for name in adapting}),
            {name: torch.stack([row[name].flatten() for row in rows]) for name in rest},
            direct,
        )

    return plain.each(one)


def implicit_gradient(systems: Sequence[System], proximal: float) -> Tensors:
    """The mean over tasks of the implicit gradient, solved densely; λ is `proximal`.

    With λ = ∞ no curvature enters: it is the mean of ∂L_q at the end of the inner loop.
    """

    def one(system: System) -> Tensors:
        matrix = torch.eye(len(system.hessian)).to(system.hessian) + system.hessian / proximal
        solution = torch.linalg.solve(matrix, system.target)
        adapting = {n: d for n, d in system.direct.items() if n not in system.mixed}
        parts = solution.split([tensor.numel() for tensor in adapting.values()])
        grads = {
            name: part.reshape(tensor.shape)
            for part, (name, tensor) in zip(parts, adapting.items(), strict=True)
        }
        for name, mixed in system.mixed.items():
            direct = system.direct[name]
            grads[name] = direct - (solution @ mixed).reshape(direct.shape) / proximal
        return grads

    return _mean([one(system) for system in systems])


def _inner(plain: PlainLoop, task: Task) -> tuple[Tensors, Tensors, Tensors]:
    """θ_0, θ_K and the buffers at the end of a task's inner loop."""
    fast, buffers = plain.start(task)
    start = fast = detach(fast)
    with torch.no_grad():
        state: Any = plain.rule.init(fast)
        for index in range(plain.learner.steps):
            batch = plain.support_of(task, index)
            gradients, buffers = plain.support(fast, buffers, batch, index, False)
            fast, state = plain.move(gradients, state, fast, index)
    return start, fast, buffers


def _mean(each: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([grads[name] for grads in each]).mean(0).detach() for name in each[0]}


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
