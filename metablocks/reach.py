"""Checks that the meta-gradient is whole: nothing trainable is cut off, every meta-parameter is reached.

By plain autograd on single tasks of a learner, before the work on the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.batches import Side
from metablocks.checks import name_of
from metablocks.compatibility import Assembly
from metablocks.derivatives import graph_leaves, vjp, watched_leaves
from metablocks.diagnose import without_second_derivative
from metablocks.errors import (
    GradientError,
    MetablocksError,
    ModuleError,
    first_line,
    is_stated,
)
from metablocks.estimators.base import task_gradient
from metablocks.executors import Share
from metablocks.fingerprint import LONG, attributes_of, cell_contents
from metablocks.functional import detach
from metablocks.inner_loop import InnerLoop
from metablocks.memory import out_of_memory
from metablocks.twins import is_plain
from metablocks.types import Task, Tasks, Tensors


def check_reach(
    assembly: Assembly, inner: InnerLoop, buffers: Tensors, tasks: Tasks, share: Share
) -> None:
    """Raise `GradientError` for a meta-parameter that no task's loss depends on, in any process.

    Tasks are tried in turn until all are reached. `check_reads` of each of them.
    """
    reached: set[str] = set()
    for index in range(len(tasks)):
        if not reached >= {*assembly.learned}:
            reached |= check_reads(assembly, inner, buffers, tasks[index])
    missing = {*assembly.learned} - share.union(reached)
    unused = [
        name
        for name in assembly.learned
        if name in missing and not _fits(name, assembly.allow_unused)
    ]
    if unused:
        raise GradientError(
            f"the loss does not depend on {', '.join(unused)} in any task of this first batch: there is "
            "no meta-gradient for it. Use it in the model's forward pass or the rule, take the steps "
            "that need it, freeze it with requires_grad_(False), or name it in allow_unused=...",
            block="MetaLearner",
            field=unused[0],
        )


def check_reads(assembly: Assembly, inner: InnerLoop, buffers: Tensors, task: Task) -> set[str]:
    """The meta-parameters that a task's loss depends on.

    Raises `GradientError` for trainable tensors that are not meta-parameters and that the loss, the rule
    or the model reads: their gradient would be lost in silence.
    """
    meta = detach(assembly.learned)
    for name, buffer in assembly.model.named_buffers():
        if buffer.requires_grad and buffer.is_leaf:
            raise GradientError(
                f"the buffer {name} of the model requires a gradient, and buffers are no "
                "meta-parameters: its gradient would be cut off without a word. Register it as an "
                "nn.Parameter, or take requires_grad_(False)"
            )
    try:
        reached, foreign = _look(assembly, inner, meta, buffers, task)
    except RuntimeError as error:
        _explain(assembly, inner, meta, buffers, task, error)
        raise
    # What is no parameter may be made under way, as an input to be differentiated by; or it was there
    # before, and comes again.
    loose = {key for key, tensor in foreign.items() if not isinstance(tensor, nn.Parameter)}
    if loose:
        _, again = _look(assembly, inner, meta, buffers, task)
        foreign = {k: t for k, t in foreign.items() if k not in loose or k in again}
    if foreign:
        raise _cut_off(assembly, foreign.values())
    return reached


def trainable_beside(parameters: Iterable[Tensor], inner: InnerLoop) -> list[Tensor]:
    """The trainable leaves, beside a learner's parameters, that its losses and its model hold or name."""
    losses = {id(x): x for x in (inner.loss.objective.loss, inner.support_loss.objective.loss)}
    read = [tensor for loss in losses.values() for _, tensor in _inside("the loss", loss, 3)]
    own = {id(parameter) for parameter in parameters}
    held = (*read, *inner.model.beside().values())
    return [x for x in held if x.requires_grad and x.is_leaf and id(x) not in own]


def check_inference(learner: nn.Module) -> None:
    """Raise `ModuleError` for parameters and buffers made under `torch.inference_mode`."""
    for name, tensor in (*learner.named_parameters(), *learner.named_buffers()):
        if tensor.is_inference():
            raise ModuleError(
                f"{name} was made under torch.inference_mode(), and autograd cannot save it; make the "
                "model and the rule outside of it"
            )


def check_constant(loss: Tensor, assembly: Assembly) -> None:
    """Raise `GradientError` if a loss of constants depends on a trainable parameter."""
    leaves = [leaf for leaf in graph_leaves(loss) if isinstance(leaf, nn.Parameter)]
    if leaves:
        raise _cut_off(assembly, leaves)


def _look(
    assembly: Assembly, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
) -> tuple[set[str], dict[int, Tensor]]:
    """The names that one task's loss depends on, and other trainable tensors that it reads, by id."""
    estimator, draws = assembly.estimator, inner.draws
    with watched_leaves() as foreign:
        with draws.observed():
            reached = {*task_gradient(estimator, inner, meta, buffers, task).grads}
        if estimator.reads is not None:  # whose gradients are there for all that is adapted
            reached = set()
        for side in estimator.reads or ():

            def loss(meta: Tensors, side: Side = side) -> tuple[Tensor, tuple[()]]:
                carry = inner.start(meta, buffers, inner.support_of(task, -1))
                if side == "support":
                    return inner.support_value(meta, carry, inner.support_of(task, -1), 0), ()
                return inner.query(meta, carry, inner.query_of(task, 0), 0).loss, ()

            value, pull, _ = vjp(loss, meta)
            (slopes,) = pull(torch.ones_like(value))
            reached |= {name for name, slope in slopes.items() if slope is not None}
        return reached, dict(foreign)


def _explain(
    assembly: Assembly,
    inner: InnerLoop,
    meta: Tensors,
    buffers: Tensors,
    task: Task,
    error: RuntimeError,
) -> None:
    """Raise `GradientError` for what PyTorch refused and can be said better: whose it is, what works."""
    if isinstance(error, MetablocksError) or is_stated(error) or out_of_memory(error):
        return
    for words, what in _UNFIT.items():
        if words in str(error):
            raise GradientError(f"the model, the loss or the rule {what}") from error
    if not any(inner.through):
        return
    try:
        found = without_second_derivative(assembly.model, inner.support_of(task, 0)[0])
    except Exception:  # a model that cannot be copied, or not run module by module
        found = None
    where = "; ".join(map(str, found or ()))
    if not found:
        try:
            _look(assembly, inner.first_order(), meta, buffers, task)
        except Exception:  # it is not the order
            return
        kernel = any(words in str(error) for words in _NO_SECOND)
        model = "" if kernel and found is not None else f"{type(assembly.model).__name__} or "
        where = f"{model}the loss {name_of(assembly.support_loss.loss)}: {first_line(error)}"
    raise GradientError(
        f"there is no second derivative in {where.rstrip('.')}. Use order=FirstOrder(), or an operation "
        "that has one"
    ) from error


_UNFIT = {
    "use_reentrant": "keeps activations by torch.utils.checkpoint with use_reentrant=True, which serves "
    "loss.backward() alone; give it use_reentrant=False",
    "backward through the graph a second time": "calls .backward(), or torch.autograd.grad without "
    "create_graph or retain_graph, on what depends on the fast weights, and so frees the graph of the "
    "inner steps, or it holds a tensor whose graph is gone; take torch.autograd.grad(value, tensors, "
    "create_graph=True), or detach()",
}
"""By PyTorch's words: what code does that serves no meta-gradient, and a remedy."""

_NO_SECOND = ("derivative for", "differentiate twice", "not implemented", "once_differentiable")
"""PyTorch's words for an operation without a second derivative."""


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """True if a pattern fits a meta-parameter's name from any of its dots on.

    >>> _fits("rule.rate.experts.0.weight", ["experts.*"]), _fits("model.head.bias", ["experts.*"])
    (True, False)
    """
    parts = name.split(".")
    ends = [".".join(parts[index:]) for index in range(len(parts))]
    return any(fnmatchcase(end, pattern) for end in ends for pattern in patterns)


def _cut_off(assembly: Assembly, tensors: Iterable[Tensor]) -> GradientError:
    names = {id(tensor): name for name, tensor in _named(assembly)}
    own = {id(p) for p in assembly.parameters.values()}
    listed = []
    by_itself = False
    for tensor in tensors:
        by_itself |= id(tensor) in own
        plain = f"a {type(tensor).__name__} of shape {list(tensor.shape)}"
        listed.append(names.get(id(tensor), plain))
    remedy = (
        "It reads the model's own parameters past the pass at hand (a closure, a lambda, a hook or a "
        "penalty over model.parameters()), where fast weights are meant. Read them as attributes of "
        "self inside the model's forward, or return what the loss needs from there"
        if by_itself
        else "Put it into the model, before its first pass, so that it is a meta-parameter, or detach "
        "it: requires_grad_(False), .detach()"
    )
    return GradientError(
        f"the loss, the rule or the model reads {', '.join(sorted({*listed}))}, trainable, but not as a "
        f"meta-parameter: its gradient would be cut off without a word. {remedy}"
    )


def _named(assembly: Assembly) -> Iterator[tuple[str, Tensor]]:
    """The trainable tensors that can be found from a learner, with the names to call them by."""
    readers = {
        "the support loss": assembly.support_loss.loss,
        "the loss": assembly.loss.loss,
        "the rule": assembly.rule,
    }
    for name, reader in readers.items():
        yield from _inside(name, reader, 3)
    for name, module in assembly.model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_"):
                where = f"model.{name}.{attribute}" if name else f"model.{attribute}"
                yield from _inside(where, value, 3)
    yield from assembly.parameters.items()


def _inside(where: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, nn.Module):
        yield from ((f"{where}'s {name}", p) for name, p in value.named_parameters())
    elif depth and isinstance(value, MethodType):
        yield from _inside(where, value.__self__, depth - 1)
    elif depth and isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _inside(where, part, depth - 1)
    elif depth and isinstance(value, FunctionType):
        code = value.__code__
        for name, content in zip(code.co_freevars, cell_contents(value), strict=True):
            yield from _inside(f"{where}'s {name}", content, depth - 1)
        for name in code.co_names:
            if name in value.__globals__:
                yield from _inside(f"{where}'s {name}", value.__globals__[name], 0)
    elif depth and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items if len(value) <= LONG else ():
            yield from _inside(f"{where}.{key}", item, depth - 1)
    elif depth and is_plain(value):
        for name, item in attributes_of(value).items():
            yield from _inside(f"{where}.{name}", item, depth - 1)
