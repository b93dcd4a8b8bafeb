"""The meta-gradient by a sweep backwards over the inner steps: exact, and no graph outlives a step.

    λ_K = v_K ∂L_q(c_K)/∂c,     λ_k = (∂c_{k+1}/∂c_k)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂c
    ∂L/∂φ = (∂c_0/∂φ)ᵀ λ_0 + Σ_k (∂c_{k+1}/∂φ)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂φ

c_k is the carry, all that inner step k − 1 hands to step k (fast weights, the rule's state, the
model's buffers); φ is every meta-parameter. A forward sweep keeps the carries and no graph; each
product on the way back goes through one step, recomputed with the random draws it had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Count, checked
from metablocks.derivatives import vjp
from metablocks.estimators.base import Estimator, TaskGradient
from metablocks.estimators.unrolled import weigh
from metablocks.generators import States
from metablocks.inner_loop import Carry, InnerLoop, QueryPass, SupportPass
from metablocks.types import Task, Tensors


@checked()
@dataclass(frozen=True, kw_only=True)
class Adjoint(Estimator):
    """The discrete adjoint of the inner loop: `Unrolled`'s gradient at the memory of one step.

        λ_k = (∂c_{k+1}/∂c_k)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂c,    ∂L/∂φ = Σ_k (∂c_{k+1}/∂φ)ᵀ λ_{k+1} + …

    Memory is that of one step's graph and, for each inner step, a copy of the carry: the fast
    weights, the rule's state, the model's buffers. A first-order step keeps its gradient too, so as
    not to take it twice, and a query loss that counts before the last step its own. Time is
    `Unrolled`'s and a second gradient for each step that is differentiated through.

    - `keep_every=n` keeps every n-th carry only, and recomputes the n − 1 between from it: a third
      gradient for these steps.
    - `offload=True` has what is kept wait on the CPU, where it is on another device.

    Law: equals `Unrolled`, random draws (dropout, masks) included, for every rule, order, step loss
    and executor, and leaves the generators where `Unrolled` leaves them.

    Source: the classical adjoint with checkpoints (Griewank, Walther 2000); Kemaev et al. 2025
    (MixFlow-MG) for meta-gradients.

    Deviation from MixFlow-MG: the product with the Hessian is reverse-over-reverse. Its
    forward-over-reverse was measured in torch 2.13 on CPU: no less memory, 1.1 to 1.5 times as long
    on a conv net and an MLP, and no derivative of `mse_loss` under `vmap`. (Reverse-over-forward is
    quicker, and silently wrong through batch norm.) What saves the memory is the sweep.

    >>> Adjoint()
    Adjoint(keep_every=1, offload=False)

    Raises `BlockError` for `keep_every` below 1.
    """

    exact: ClassVar[bool] = True
    keep_every: Count = 1
    offload: bool = False

    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        grads, queries, changes = _Sweep(self, inner, meta, buffers, task)()
        loss, losses, scores = weigh(inner, queries)
        grads = {name: grads[name] for name in meta if name in grads}
        return TaskGradient(grads, loss, losses, changes, scores)

    def low_memory(self, steps: int) -> "Adjoint | None":
        """The same sweep with the fewest copies, about 2√steps of them, where that is fewer."""
        stride = round(steps**0.5)
        fewer = self.keep_every == 1 and stride > 1
        return replace(self, keep_every=stride) if fewer else None


class _Visit(NamedTuple):
    """The parts of an inner step that are kept to go through it again."""

    carry: Carry
    support: SupportPass | None
    """The support pass, where the step takes its gradient for a constant."""
    draws: States
    """The generators' states before what there is to recompute."""


@dataclass(frozen=True)
class _Sweep:
    """Forward and backward sweep over one task. Cotangents of carries are lists along `_floats`."""

    block: Adjoint
    inner: InnerLoop
    meta: Tensors
    buffers: Tensors
    task: Task

    def __call__(self) -> tuple[Tensors, dict[int, QueryPass], Tensors]:
        """The meta-gradient, the query passes by carry, the changes of the collected buffers."""
        inner = self.inner
        grads: Tensors = {}
        queries: dict[int, QueryPass] = {}
        slopes: dict[int, Callable[[], list[Any]]] = {}  # of the query losses, by carry
        passes: list[tuple[Tensors, Tensors]] = []
        kept: list[tuple[int, Callable[[], _Visit]]] = []
        begin = self.draws()
        draws: list[States] = []  # before each step
        carry = inner.start(self.meta, self.buffers)
        for index in range(self.last + 1):
            if index in inner.weights:
                queries[index], slope = self.query(carry, index, grads)
                slopes[index] = self.keep(slope)
                passes.append((carry.buffers, queries[index].buffers))
            if index < self.last:
                draws.append(self.draws())
                visit, after_step = self.visit(carry, index, draws[index])
                if index % self.block.keep_every == 0:
                    kept.append((index, self.keep(visit)))
                carry = after_step
        end = self.draws()
        changes = inner.changes((self.buffers, carry.buffers), *passes)

        adjoint = slopes.pop(self.last)()
        visits: list[_Visit] = []
        for index in reversed(range(self.last)):
            if not visits:
                first, recall = kept.pop()
                visits = self.between(recall(), first, index, draws)
            adjoint = self.back(visits.pop(), adjoint, index, grads)
            if index in slopes:
                adjoint = _sum(adjoint, slopes.pop(index)())
        self.redraw(begin)
        self.back_to_meta(adjoint, grads)
        self.redraw(end)
        return grads, queries, changes

    @cached_property
    def last(self) -> int:
        """The last carry whose query loss counts. Nothing reads its rule's state."""
        return max(self.inner.weights)

    @cached_property
    def fixed(self) -> Tensors:
        """The meta-parameters that a step reads by itself: all but those that the carry holds."""
        adapted = {f"model.{name}" for name in self.inner.adapted}
        return {name: tensor for name, tensor in self.meta.items() if name not in adapted}

    def visit(self, carry: Carry, index: int, draws: States) -> tuple[_Visit, Carry]:
        """Inner step `index`: what is kept of it, and the next carry."""
        with (
            torch.no_grad()
        ):  # no graph of the gradient, by the kernels that it will be taken by again
            support = self.inner.support(self.meta, carry, self.task.support, index)
        constant = self.is_constant(carry, index)
        visit = _Visit(carry, support, self.draws()) if constant else _Visit(carry, None, draws)
        return visit, self.inner.update(self.meta, carry, support, index)

    def between(self, visit: _Visit, first: int, last: int, draws: list[States]) -> list[_Visit]:
        """The visits to steps `first` … `last`, recomputed from the first one."""
        if first == last:
            return [visit]
        visits, carry = [], visit.carry
        for index in range(first, last):
            self.redraw(draws[index])
            visit, carry = self.visit(carry, index, draws[index])
            visits.append(visit)
        return [*visits, _Visit(carry, None, draws[last])]

    def is_constant(self, carry: Carry, index: int) -> bool:
        """True if all that the support pass of step `index` gives is constant in the derivative."""
        through = self.inner.through
        learned = any(through[:index]) and any(_is_float(b) for b in carry.buffers.values())
        return not through[index] and not learned

    def query(
        self, carry: Carry, index: int, grads: Tensors
    ) -> tuple[QueryPass, list[Tensor | None]]:
        """The query pass at a carry, and its weighted gradient by it; by the rest added to `grads`."""

        def loss(fixed: Tensors, floats: list[Tensor]) -> tuple[Tensor, QueryPass]:
            passed = self.inner.query(fixed, _fill(read, floats), self.task.query, index)
            return passed.loss, passed._replace(prediction=None)

        read = carry._replace(rule=())
        value, pull, passed = vjp(loss, self.fixed, _floats(read))
        (slope,) = pull(self.inner.weighted(torch.ones_like(value), index), grads)
        return passed, slope

    def back(
        self, visit: _Visit, adjoint: list[Tensor | None], index: int, grads: Tensors
    ) -> list[Tensor | None]:
        """The product with the Jacobian of inner step `index`; by the rest added to `grads`."""
        self.redraw(visit.draws)

        def step(fixed: Tensors, floats: list[Tensor]) -> tuple[list[Tensor], tuple[()]]:
            carry = _fill(visit.carry, floats)
            if visit.support is None:
                after, _ = self.inner.step(fixed, carry, self.task.support, index)
            else:
                after = self.inner.update(fixed, carry, visit.support, index)
            return self.read(after, index + 1), ()

        _, pull, _ = vjp(step, self.fixed, _floats(visit.carry))
        (cotangent,) = pull(adjoint, grads)
        return list(cotangent)

    def back_to_meta(self, adjoint: list[Tensor | None], grads: Tensors) -> None:
        """Add the product with the Jacobian of carry 0, which holds θ_0 and what the rule starts with."""

        def start(meta: Tensors) -> tuple[list[Tensor], tuple[()]]:
            return self.read(self.inner.start(meta, self.buffers), 0), ()

        _, pull, _ = vjp(start, self.meta)
        pull(adjoint, grads)

    def read(self, carry: Carry, index: int) -> list[Tensor]:
        """The tensors of carry `index` that a derivative can flow through."""
        return _floats(carry._replace(rule=()) if index == self.last else carry)

    def keep(self, tree: Any) -> Callable[[], Any]:
        """Store a pytree (on the CPU if `offload`); returns a function that loads it."""
        if not self.block.offload:
            return lambda: tree
        leaves, spec = pytree.tree_flatten(tree)
        away = [(x.cpu(), x.device) if isinstance(x, Tensor) else (x, None) for x in leaves]

        def recall() -> Any:
            return pytree.tree_unflatten([x if d is None else x.to(d) for x, d in away], spec)

        return recall

    def draws(self) -> States:
        """The state of every generator that the work may draw from."""
        return self.inner.draws.states()

    def redraw(self, states: States) -> None:
        """Put the generators that the work draws from back into an earlier state."""
        self.inner.draws.restore(states)


def _floats(carry: Carry) -> list[Tensor]:
    """The real and complex tensors of a carry; the rule's come last."""
    leaves = [*carry.params.values(), *carry.buffers.values(), *pytree.tree_leaves(carry.rule)]
    return [leaf for leaf in leaves if _is_float(leaf)]


def _fill(carry: Carry, tensors: Sequence[Tensor]) -> Carry:
    """A carry with other floating-point tensors; `_floats(_fill(carry, tensors))` is `tensors`."""
    own = iter(tensors)

    def fill(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: next(own) if _is_float(leaf) else leaf, tree)

    params, buffers = fill(carry.params), fill(carry.buffers)
    return Carry(params, fill(carry.rule), buffers)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _sum(adjoint: Sequence[Tensor | None], slope: Sequence[Tensor | None]) -> list[Any]:
    """A cotangent and that of a query loss, which reads all but the rule's state at the end."""
    pairs = zip_longest(adjoint, slope)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
