"""One task after another, or a few at a time in threads."""

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Count, checked
from metablocks.executors.base import TaskFunction, TaskWork
from metablocks.executors.compiled import Compile, Compiler
from metablocks.executors.threads import map_in_threads
from metablocks.outputs import stack_rows
from metablocks.types import Tasks, Tensors

ChannelsLast: TypeAlias = bool | Literal["query"]


@checked()
@dataclass(frozen=True, kw_only=True)
class Loop:
    """One task after another: the reference, and the one that takes tasks of unequal size.

    A learner seeds the random draws of a task (dropout) by its number. Results of
    unequal shape come back as a list in place of a stacked tensor.

    - `workers`: tasks under way at a time, in threads that share torch's own threads; convolutional
      nets on a CPU gain by it. Tasks that draw random numbers go one after another all the same, and
      such as use what PyTorch has once for all threads (forward-mode derivatives, `parametrize.cached`).
    - `channels_last`: lay out the images `[examples, channels, height, width]` of the query sets
      ("query") or of both (True) channels last, which is quicker for convolutions and much quicker for
      max-pooling on a CPU; but not for the second derivatives of batch norm, so "query" is for second
      order, True for first order.
    - `compile`: trace ("trace") or compile (True) the work on one task, piece by piece, once for every
      size of tasks (see `Compiler`).

    Law: neither changes a result, up to rounding.

    >>> import torch
    >>> import metablocks as mb
    >>> double = lambda shared, buffers, task: (task.query[0].sum(), task.query[0] * 2)
    >>> x = torch.ones(3, 2)
    >>> total, each = mb.Loop(workers=2)(double, {}, {}, mb.TaskBatch((x, x), (x, x)))
    >>> total, each.shape
    (tensor(6.), torch.Size([3, 2]))

    Raises `BlockError` for fewer than one worker, and for other settings than those named.
    """

    workers: Count = 1
    channels_last: ChannelsLast = False
    compile: Compile = False

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        work = TaskWork.of(fn, shared)
        compiled = self.compile and work.pieces is not None

        def run(index: int) -> tuple[Any, Any]:
            task = tasks[index]
            if self.channels_last:
                query, support = _channels_last(task.query), task.support
                if self.channels_last is True:
                    support = _channels_last(support)
                task = replace(task, support=support, query=query)
            with work.draws.seeded(task.seed):
                if not compiled:
                    return work(shared, buffers, task)
                result, _ = self._compiler(TaskWork.__call__, work, buffers, task)
                return result

        sums: Any = None
        rows: list[Any] = []

        def add(result: tuple[Any, Any]) -> None:  # so that one is held at a time
            nonlocal sums
            sums = _added(sums, result[0]) if rows else result[0]
            rows.append(result[1])

        # The first task may have to tell whether the work draws: whose draws come first must not be
        # a matter of chance.
        if not work.draws.known:
            add(run(0))
        rest = range(len(rows), len(tasks))
        apart = not (work.draws.kinds or work.draws.alone)
        workers = min(self.workers, len(rest)) if apart else 1
        if workers > 1:
            map_in_threads(run, rest, workers, add)
        else:
            for index in rest:
                add(run(index))
        return sums, stack_rows(rows)

    @cached_property
    def _compiler(self) -> Compiler:
        return Compiler(self.compile)


def _added(one: Any, other: Any) -> Any:
    """The sum of two pytrees of one form; quicker than by pytree."""
    if isinstance(one, Tensor):
        return one + other
    if type(one) is dict:
        return {name: _added(value, other[name]) for name, value in one.items()}
    if type(one) is tuple:
        return tuple([_added(*pair) for pair in zip(one, other, strict=True)])
    return pytree.tree_map(operator.add, one, other)


def _channels_last(batch: Any) -> Any:
    """The same batch, its images `[examples, channels, height, width]` laid out channels last."""
    inputs, target = batch

    def lay_out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim != 4 or not leaf.is_floating_point():
            return leaf
        _, channels, height, width = leaf.shape
        # Also for one channel, where to(memory_format=...) would leave the strides as they are.
        strides = (channels * height * width, 1, width * channels, channels)
        return torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device).copy_(
            leaf
        )

    return pytree.tree_map(lay_out, inputs), target
