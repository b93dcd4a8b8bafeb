"""The sweep over the inner steps of a task, forwards and backwards, in pieces.

    λ_K = v_K ∂L_q(c_K)/∂c,     λ_k = (∂c_{k+1}/∂c_k)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂c
    ∂L/∂φ = (∂c_0/∂φ)ᵀ λ_0 + Σ_k (∂c_{k+1}/∂φ)ᵀ λ_{k+1} + v_k ∂L_q(c_k)/∂φ

c_k is the carry, all that inner step k − 1 hands to step k (fast weights, the rule's state, the
model's buffers); φ is every meta-parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.derivatives import detach_tree, vjp
from metablocks.estimators.base import TaskGradient, each_carry
from metablocks.generators import States
from metablocks.inner_loop import Carry, InnerLoop, QueryPass, SupportPass
from metablocks.pieces import At, Pieces, weighed
from metablocks.types import Batch, Tensors


class _Visit(NamedTuple):
    """The parts of an inner step that are kept to go through it again."""

    carry: Any
    support: tuple[Any, ...]
    """The support pass, where the step takes its gradient for a constant."""
    draws: States
    """The generators' states before what there is to recompute."""


@dataclass(frozen=True)
class Sweep:
    """Forward and backward sweep over the tasks that `run` is for.

    The last `graphs` steps keep their graphs (None: all of them). Of the others every `keep_every`-th
    keeps its carry, and the products on the way back go through one step at a time, recomputed with the
    random draws it had; so are query losses then, to have no slope of them kept.
    """

    run: Pieces
    graphs: int | None = None
    keep_every: int = 1
    offload: bool = False

    def __call__(self) -> TaskGradient:
        """The meta-gradient; of many tasks at once, its losses and changes are `[tasks, ...]`."""
        run, inner = self.run, self.run.inner
        grads: Tensors = {}
        queries: dict[int, QueryPass] = {}
        slopes: dict[int, Callable[[], Any]] = {}  # of the query losses, by carry
        later: dict[int, States] = {}  # of those whose slope is taken on the way back: before them
        passes: list[tuple[Tensors, Tensors]] = []
        kept: list[tuple[int, Callable[[], Any]]] = []
        recorded: list[Callable[[Any, Tensors], Any]] = []
        first = 0 if self.graphs is None else max(0, self.last - self.graphs)
        begin, reads = self.draws(), inner.start_reads
        states = begin
        draws: list[States] = []  # before each step
        (carry,) = run(("start",), start, (run.buffers,), data=reads)
        for index in range(self.last + 1):
            if index in inner.weights:
                if self.keep_every > 1 and index < min(first, self.last):
                    later[index] = states = self.draws(states)
                    (passed,) = run(("look",), _look, (carry,), at=At(index), data=("query",))
                else:
                    passed, slope = self.query(carry, index, grads)
                    slopes[index] = self.keep(slope)
                query = run.open(passed)
                # A copy: the scalar that mse_loss returns lies in the storage of all its terms.
                queries[index] = query._replace(loss=query.loss.clone(), buffers={})
                if inner.collected:
                    passes.append((run.open(carry).buffers, query.buffers))
            if first <= index < self.last:
                carry, back = self.record(carry, index)
                recorded.append(back)
            elif index < self.last:
                draws.append(states := self.draws(states))
                visit, carry = self.visit(carry, index, draws[index])
                if index % self.keep_every == 0:
                    kept.append((index, self.keep(visit)))
        end = self.draws()
        changes = {}
        if inner.collected:
            moved = run.open(run.buffers), run.open(carry).buffers
            changes = inner.changes(moved, *passes)

        adjoint = slopes.pop(self.last)()
        visits: list[Any] = []
        for index in reversed(range(self.last)):
            if recorded:
                adjoint = recorded.pop()(adjoint, grads)
            else:
                if not visits:
                    start_of, recall = kept.pop()
                    visits = self.between(recall(), start_of, index, draws)
                visit = visits.pop()
                adjoint = self.back(visit, adjoint, index, grads)
                if index in later:
                    self.redraw(later[index])
                    adjoint = run.add(adjoint, self.query(visit.carry, index, grads)[1])
            if index in slopes:
                adjoint = run.add(adjoint, slopes.pop(index)())
        self.redraw(begin)
        run(("start back",), _start_back, (run.buffers, adjoint), data=reads, totals=grads)
        self.redraw(end)
        loss, losses, scores = weigh(inner, queries)
        grads = {name: grads[name] for name in run.meta if name in grads}
        return TaskGradient(grads, loss, losses, changes, scores)

    @cached_property
    def last(self) -> int:
        """The last carry whose query loss counts. Nothing reads its rule's state."""
        return max(self.run.inner.weights)

    def query(self, carry: Any, index: int, grads: Tensors) -> tuple[Any, Any]:
        """The query pass at carry `index`, and its slope; by the rest added to `grads`."""
        at = At(index, {index: self.run.inner.weights[index]})
        passed, slope = self.run(
            ("query",), _query, (carry,), at=at, data=("query", "weight"), totals=grads
        )
        return passed, slope

    def record(self, carry: Any, index: int) -> tuple[Any, Callable[[Any, Tensors], Any]]:
        """Inner step `index`: the next carry, and the way back by the step's graph."""
        return self.run.recorded(
            ("recorded", self.run.inner.through[index]),
            _recorded_step,
            (carry,),
            cotangent=_floats,
            at=At(index),
            data=("support",),
        )

    def visit(self, carry: Any, index: int, draws: States) -> tuple[Any, Any]:
        """Inner step `index`: what is kept of it, and the next carry."""
        run, at, through = self.run, At(index), self.run.inner.through[index]
        if not self.is_constant(index):
            (after,) = run(("step", through), step, (carry,), at=at, data=("support",))
            return _Visit(carry, (), draws), after
        (support,) = run(("support", through), _support, (carry,), at=at, data=("support",))
        visit = _Visit(carry, (support,), self.draws())
        (after,) = run(("update", through), _update, (carry, support), at=at)
        return visit, after

    def between(self, visit: Any, first: int, last: int, draws: list[States]) -> list[Any]:
        """The visits to steps `first` … `last`, recomputed from the first one."""
        if first == last:
            return [visit]
        visits, carry = [], visit.carry
        for index in range(first, last):
            self.redraw(draws[index])
            visit, carry = self.visit(carry, index, draws[index])
            visits.append(visit)
        return [*visits, _Visit(carry, (), draws[last])]

    def is_constant(self, index: int) -> bool:
        """True if all that the support pass of step `index` gives is constant in the derivative."""
        through = self.run.inner.through
        return not through[index] and not (self.carries_buffers and any(through[:index]))

    @cached_property
    def carries_buffers(self) -> bool:
        """True if a carry holds buffers that a derivative can flow through."""
        return any(map(_is_float, pytree.tree_leaves(self.run.open(self.run.buffers))))

    def back(self, visit: Any, adjoint: Any, index: int, grads: Tensors) -> Any:
        """The product with the Jacobian of inner step `index`; by the rest added to `grads`."""
        self.redraw(visit.draws)
        constant, through = bool(visit.support), self.run.inner.through[index]
        name = ("update back" if constant else "step back", through)
        piece = _update_back if constant else _step_back
        (adjoint,) = self.run(
            name,
            piece,
            (visit.carry, *visit.support, adjoint),
            at=At(index),
            data=() if constant else ("support",),
            totals=grads,
        )
        return adjoint

    def keep(self, tree: Any) -> Callable[[], Any]:
        """Store a pytree (on the CPU if `offload`); returns a function that loads it."""
        if not self.offload:
            return lambda: tree
        leaves, spec = pytree.tree_flatten(tree)
        away = [(x.cpu(), x.device) if isinstance(x, Tensor) else (x, None) for x in leaves]

        def recall() -> Any:
            return pytree.tree_unflatten([x if d is None else x.to(d) for x, d in away], spec)

        return recall

    def draws(self, before: States | None = None) -> States:
        """The state of every generator that the work may draw from; `before` if they are there still."""
        draws = self.run.inner.draws
        if draws.known and not draws.kinds:
            return []
        if before and all(generator.is_at(state) for generator, state in before):
            return before
        return draws.states()

    def redraw(self, states: States) -> None:
        """Put the generators that the work draws from back into an earlier state."""
        self.run.inner.draws.restore(states)


def weigh(
    inner: InnerLoop, queries: Mapping[int, QueryPass]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ_k v_k L_q(θ_k), and losses and scores `[steps + 1]`, nan where there is none."""
    loss, *rest = [inner.weighted(query.loss, index) for index, query in queries.items()]
    for term in rest:
        loss = loss + term
    losses = each_carry(inner, {index: query.loss for index, query in queries.items()})
    scores = {index: query.score for index, query in queries.items() if query.score is not None}
    return loss, losses, each_carry(inner, scores) if scores else None


def start(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, buffers: Tensors, *support: Batch
) -> Any:
    """Carry 0; `support` is the whole set if the start reads it."""
    return (inner.start(meta, buffers, *support),)


def step(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[Carry]:
    """The next carry; no graph of the gradient, by the kernels that it will be taken by again."""
    (support,) = _support(inner, meta, totals, at, carry, batch)
    return _update(inner, meta, totals, at, carry, support)


def _support(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[SupportPass]:
    with torch.no_grad():
        return (inner.support(meta, carry, batch, at.index),)


def _update(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, support: SupportPass
) -> tuple[Carry]:
    return (inner.update(meta, carry, support, at.index),)


def _recorded_step(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[Carry, Callable[[Any, Tensors], Any]]:
    return _through(inner, meta, carry, _taking(inner, at, batch))


def _step_back(
    inner: InnerLoop,
    meta: Tensors,
    totals: Tensors,
    at: At,
    carry: Carry,
    adjoint: Sequence[Tensor | None],
    batch: Batch,
) -> tuple[Any]:
    _, back = _through(inner, meta, carry, _taking(inner, at, batch), len(adjoint))
    return (back(adjoint, totals),)


def _update_back(
    inner: InnerLoop,
    meta: Tensors,
    totals: Tensors,
    at: At,
    carry: Carry,
    support: SupportPass,
    adjoint: Sequence[Tensor | None],
) -> tuple[Any]:
    def after(fixed: Tensors, carry: Carry) -> Carry:
        return inner.update(fixed, carry, support, at.index)

    _, back = _through(inner, meta, carry, after, len(adjoint))
    return (back(adjoint, totals),)


def _taking(inner: InnerLoop, at: At, batch: Batch) -> Callable[[Tensors, Carry], Carry]:
    """The step as a function of the meta-parameters and the carry."""
    return lambda fixed, carry: inner.step(fixed, carry, batch, at.index)[0]


def _through(
    inner: InnerLoop,
    meta: Tensors,
    carry: Carry,
    after: Callable[[Tensors, Carry], Carry],
    read: int | None = None,
) -> tuple[Any, Callable[[Any, Tensors], Any]]:
    """The carry after a step and the way back through it: of the first `read` floats alone, if given."""

    def step(fixed: Tensors, floats: list[Tensor]) -> tuple[list[Tensor], Any]:
        result = after(fixed, _fill(carry, floats))
        return _floats(result)[:read], result if read is None else ()

    floats = _floats(carry)
    ends, pull, result = vjp(step, inner.fixed(meta), floats)

    def back(adjoint: Any, totals: Tensors) -> Any:
        adjoint = [*adjoint, *[None] * (len(ends) - len(adjoint))]  # of the rule's state
        (cotangent,) = pull(adjoint, totals)
        return _whole(inner, cotangent, floats)

    return result, back


def _look(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[QueryPass]:
    """The query pass at a carry, of constants."""
    passed = inner.look(meta, carry, batch, at.index)._replace(prediction=None)
    return (detach_tree(passed),)


def _query(
    inner: InnerLoop,
    meta: Tensors,
    totals: Tensors,
    at: At,
    carry: Carry,
    batch: Batch,
    weight: Tensor | None,
) -> tuple[QueryPass, Any]:
    """The query pass at a carry, and its weighted gradient by it; by the rest added to `totals`.

    `weight` is the task's.
    """
    read = carry._replace(rule=())

    def loss(fixed: Tensors, floats: list[Tensor]) -> tuple[Tensor, QueryPass]:
        passed = inner.query(fixed, _fill(read, floats), batch, at.index)
        return passed.loss, passed._replace(prediction=None)

    value, pull, passed = vjp(loss, inner.fixed(meta), _floats(read))
    one = weighed(torch.ones_like(value), weight)
    (slope,) = pull(inner.weighted(one, at.index), totals)
    return passed, _whole(inner, slope, _floats(carry))


def _start_back(
    inner: InnerLoop,
    meta: Tensors,
    totals: Tensors,
    at: At,
    buffers: Tensors,
    adjoint: Sequence[Tensor | None],
    *support: Batch,
) -> tuple[()]:
    """Add the product with the Jacobian of carry 0, which holds θ_0 and what the rule starts with."""

    def begin(meta: Tensors) -> tuple[list[Tensor], tuple[()]]:
        return _floats(inner.start(meta, buffers, *support))[: len(adjoint)], ()

    _, pull, _ = vjp(begin, meta)
    pull(adjoint, totals)
    return ()


def _whole(inner: InnerLoop, slopes: Sequence[Tensor | None], floats: Sequence[Tensor]) -> Any:
    """A cotangent; in a trace zeros stand where there is none, so that one serves all steps."""
    if inner.position is None:
        return list(slopes)
    given = [*slopes, *[None] * (len(floats) - len(slopes))]
    return [
        torch.zeros_like(x) if slope is None else slope
        for slope, x in zip(given, floats, strict=True)
    ]


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
