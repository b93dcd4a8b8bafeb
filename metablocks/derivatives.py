"""Derivatives of functions of tensors: two engines, one mathematics.

Plain autograd (`torch.autograd.grad`), unless a transform of `torch.func` is at work: whatever
`loss.backward(create_graph=True)` runs, runs. Inside `torch.func.vmap` (and `grad`, `jvp`, …) the
derivatives are `torch.func`'s. Nothing above this file knows which of the two is at work.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.errors import GradientError
from metablocks.kernels import twice_differentiable
from metablocks.types import Tensors, aliased, map_tensors, tensors_of


def gradient(
    function: Callable[[Tensors], tuple[Tensor, Any]], point: Tensors, *, differentiable: bool
) -> tuple[Tensors, Tensor, Any]:
    """∇f at `point`, f there, and what `function` returns beside f.

    `function` maps named tensors to a scalar and anything else. A derivative that flows through
    `point`, or through whatever else `function` reads, flows through the gradient if it is
    `differentiable` and gradients are enabled; if not, the gradient is a constant and its graph is
    gone. What f does not depend on has the gradient zero. A `differentiable` one is by the tensors of
    `point` wherever `function` reads them, so that they should be tensors of their own (`nodes_of`).

    >>> gradient(lambda p: ((p["x"] ** 3).sum(), "aux"), {"x": torch.ones(1)}, differentiable=False)
    ({'x': tensor([3.])}, tensor(1.), 'aux')
    """
    recording = differentiable and torch.is_grad_enabled()
    recorded = False
    if transformed():
        recorded = _is_recorded(point)
        if not (recording and recorded):
            return _gradient_by_transform(function, point, differentiable)
    nodes: Tensors = {}
    fresh: list[Tensor] = []
    for name, tensor in point.items():
        if not (recording and (recorded or tensor.requires_grad)):
            tensor = tensor.detach().requires_grad_()
            fresh.append(tensor)
        nodes[name] = tensor
    _expect(nodes.values())
    with _enabled(), twice_differentiable(differentiable):
        value, aux = function(nodes)
    _watch(value)
    if not value.requires_grad:
        return {name: torch.zeros_like(t) for name, t in point.items()}, value, aux
    if recording and len(fresh) == len(point):
        known = {id(node) for node in fresh}
        recording = any(id(leaf) not in known for leaf in graph_leaves(value))
    if differentiable and not recording:
        aux = detach_tree(aux)
    keep = recording or any(tensor.requires_grad for tensor in tensors_of(aux))
    # By `torch.autograd.grad` the same, with checks that take a twentieth of a small net's time.
    slopes = _engine.run_backward(
        (value,), (torch.ones_like(value),), keep, recording, tuple(nodes.values()), True, False
    )
    _check_unadded(fresh)
    gradients = {
        name: torch.zeros_like(tensor) if slope is None else slope
        for (name, tensor), slope in zip(point.items(), slopes, strict=True)
    }
    return gradients, value.detach(), aux


def vjp(
    function: Callable[..., tuple[Any, Any]], *primals: Any, reuse: bool = False
) -> tuple[Any, Callable[..., tuple[Any, ...]], Any]:
    """`(outputs, pull, aux)`: `pull(cotangents)` gives the vector–Jacobian product by each primal.

    `function(*primals)` returns `(outputs, aux)`; primals, outputs and cotangents are pytrees of
    tensors. The product is a constant. By plain autograd it is None by a tensor on which no output
    depends, where `torch.func` gives zeros. Cotangents may be None. The graph is gone after the first
    `pull`, unless it is to be used again (`reuse`). `pull(cotangents, totals)` adds the products by the
    first primal, named tensors, to `totals` instead of returning them: in place, one at a time.

    >>> outputs, pull, _ = vjp(lambda x, y: (x**3, ()), torch.tensor(2.0), torch.tensor(1.0))
    >>> outputs, pull(torch.tensor(1.0))
    (tensor(8.), (tensor(12.), None))
    """
    if transformed():
        return _vjp_by_transform(function, primals, reuse)
    leaves: list[Tensor] = []

    def leaf_of(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    nodes = map_tensors(leaf_of, primals)
    _expect(leaves)
    with torch.enable_grad():
        outputs, aux = function(*nodes)
    _check_unadded(leaves)
    ends = _leaves(outputs)
    _watch(ends)

    def pull(cotangents: Any, totals: Tensors | None = None) -> tuple[Any, ...]:
        pairs = zip(ends, _leaves(cotangents), strict=True)
        live = [(end, c) for end, c in pairs if c is not None and end.requires_grad]
        for leaf in leaves:
            leaf.grad = None
        named = {} if totals is None else nodes[0]
        for name, leaf in named.items():
            leaf.grad = (totals or {}).get(name)
        if live:
            heads, seeds = zip(*live, strict=True)
            _engine.run_backward(heads, seeds, reuse, False, tuple(leaves), True, True)
        grads: tuple[Any, ...] = map_tensors(lambda leaf: leaf.grad, nodes)
        if totals is None:
            return grads
        totals |= {name: leaf.grad for name, leaf in named.items() if leaf.grad is not None}
        return grads[1:]

    return detach_tree(outputs), pull, detach_tree(aux)


def nodes_of(point: Tensors) -> Tensors:
    """The same tensors as nodes of their own, which nothing else reads.

    >>> weight = torch.ones(1, requires_grad=True)
    >>> nodes_of({"weight": weight})["weight"] is weight
    False
    """
    return {name: aliased(tensor) for name, tensor in point.items()}


def detach_tree(tree: Any) -> Any:
    """The same pytree, its tensors cut off from every derivative."""
    return map_tensors(Tensor.detach, tree)


@contextmanager
def watched_leaves() -> Iterator[dict[int, Tensor]]:
    """The trainable tensors that functions differentiated in the block read past their arguments, by id.

    By plain autograd alone, and in this thread.

    >>> weight = torch.ones(1, requires_grad=True)
    >>> with watched_leaves() as foreign:
    ...     _ = gradient(lambda p: ((weight * p["x"]).sum(), ()), {"x": weight}, differentiable=False)
    >>> [tensor is weight for tensor in foreign.values()]
    [True]
    """
    before = _local.leaves, _local.nodes
    _local.leaves, _local.nodes = {}, {}
    try:
        yield _local.leaves
    finally:
        _local.leaves, _local.nodes = before


def graph_leaves(outputs: Any) -> list[Tensor]:
    """The tensors that the graph of `outputs` begins with: trainable ones that they depend on.

    Raises the `RuntimeError` of a node that does nothing but raise one, which `grad` passes by (of
    functions marked with `once_differentiable`).
    """
    ends = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    leaves = {id(x): x for x in ends if x.grad_fn is None}
    stack: list[Any] = [x.grad_fn for x in ends if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::Error":
            node(torch.zeros(()))
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(leaves.values())


class _Local(threading.local):
    level: int | None = None
    """The level of `torch.func` at which a vjp of this file records."""
    leaves: dict[int, Tensor] | None = None
    nodes: dict[int, Tensor] | None = None


_local = _Local()
_functorch: Any = torch._C._functorch
_engine: Any = torch.autograd.Variable._execution_engine


def _enabled() -> AbstractContextManager[None]:
    """A block with gradients enabled."""
    return _nothing if torch.is_grad_enabled() else torch.enable_grad()


_nothing = nullcontext()


def transformed() -> bool:
    """True inside a transform of `torch.func`."""
    return _functorch.peek_interpreter_stack() is not None


def _is_recorded(point: Tensors) -> bool:
    """True if a vjp of this file is the innermost transform and goes through every tensor of `point`.

    The gradient then comes out of its graph: a transform of its own would record everything twice.
    """
    level = _local.level
    return (
        level is not None
        and _functorch.maybe_current_level() == level
        and all(tensor.requires_grad for tensor in point.values())
    )


def _gradient_by_transform(
    function: Callable[[Tensors], tuple[Tensor, Any]], point: Tensors, differentiable: bool
) -> tuple[Tensors, Tensor, Any]:
    point = point if differentiable else detach_tree(point)
    with twice_differentiable(differentiable):
        value, pull, aux = _transform(function, point)
    recording = differentiable and torch.is_grad_enabled()
    with torch.set_grad_enabled(recording):
        (gradients,) = pull(torch.ones_like(value), retain_graph=recording)
    return gradients, value.detach(), aux


def _vjp_by_transform(
    function: Callable[..., tuple[Any, Any]], primals: tuple[Any, ...], reuse: bool
) -> tuple[Any, Callable[..., tuple[Any, ...]], Any]:
    def recorded(*primals: Any) -> tuple[Any, Any]:
        before, _local.level = _local.level, _functorch.maybe_current_level()
        try:
            return function(*primals)
        finally:
            _local.level = before

    outputs, pull, aux = _transform(recorded, *primals)

    def pull_constant(cotangents: Any, totals: Tensors | None = None) -> tuple[Any, ...]:
        with torch.no_grad():
            given, ends = pytree.tree_leaves(cotangents), pytree.tree_leaves(outputs)
            whole = [
                torch.zeros_like(end) if seed is None else seed
                for seed, end in zip(given, ends, strict=True)
            ]
            seeds = pytree.tree_unflatten(whole, pytree.tree_structure(outputs))
            grads = tuple(pull(seeds, retain_graph=reuse))
            if totals is None:
                return grads
            for name, grad in grads[0].items():
                totals[name] = totals[name] + grad if name in totals else grad
            return grads[1:]

    return outputs, pull_constant, aux


def _transform(function: Callable[..., tuple[Any, Any]], *primals: Any) -> Any:
    """`torch.func.vjp` with what stands beside the outputs, which need not be tensors alone."""
    form: list[Any] = []

    def with_tensors(*primals: Any) -> tuple[Any, list[Tensor]]:
        outputs, aux = function(*primals)
        leaves, spec = pytree.tree_flatten(aux)
        form[:] = [None if isinstance(x, Tensor) else (x,) for x in leaves], spec
        return outputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    transform: Any = torch.func.vjp
    outputs, pull, tensors = transform(with_tensors, *primals, has_aux=True)
    held, spec = form
    rest = iter(tensors)
    aux = pytree.tree_unflatten([next(rest) if x is None else x[0] for x in held], spec)
    return outputs, pull, aux


def _check_unadded(leaves: Iterable[Tensor]) -> None:
    """Raise `GradientError` if something has been added into `.grad` of fresh leaves.

    `torch.autograd.grad` never does.
    """
    if any(leaf.grad is not None for leaf in leaves):
        raise GradientError(
            "the backward pass of the model runs torch.autograd.backward itself, as reversible layers "
            "do: it adds into .grad, which serves loss.backward() alone, and an inner step would go "
            "without. Take layers that keep their activations (reversible=False), or "
            "torch.utils.checkpoint(use_reentrant=False)"
        )


def _leaves(tree: Any) -> list[Any]:
    return [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)


def _expect(nodes: Iterable[Tensor]) -> None:
    if _local.nodes is not None:
        _local.nodes |= {id(node): node for node in nodes}


def _watch(outputs: Any) -> None:
    if _local.leaves is not None and _local.nodes is not None:
        leaves = {id(leaf): leaf for leaf in graph_leaves(outputs)}
        _local.leaves |= {key: leaf for key, leaf in leaves.items() if key not in _local.nodes}
