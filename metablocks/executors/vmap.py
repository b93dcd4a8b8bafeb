"""Tasks at once, by `torch.func.vmap`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import Count, checked
from metablocks.errors import ExecutorError, MetablocksError, first_line
from metablocks.executors.base import RandomDrawsWarning, TaskFunction, TaskWork
from metablocks.executors.compiled import Compile, Compiler
from metablocks.memory import out_of_memory
from metablocks.outputs import Apart
from metablocks.types import Task, TaskBatch, Tasks, Tensors, map_tensors, tensors_of


@checked()
@dataclass(frozen=True, kw_only=True)
class Vmap:
    """Tasks at once, or `chunk` at a time, by `torch.func.vmap`; results by task are `[tasks, ...]`.

    Per-task gradients of a chunk are held at the same time: memory is `chunk` × the loop's. Random
    draws are independent between tasks and seeded, in a learner, by the number of a chunk's first task:
    for `chunk=1` they are the draws of `Loop`. A run that made some says so once, with a
    `RandomDrawsWarning`.

    - `chunk`: tasks at a time; None for all.
    - `compile`: trace ("trace") or compile (True) the work on a chunk, piece by piece, `vmap` and
      all (see `Compiler`).

    Law: equals `Loop`, up to rounding, for any `chunk`.

    >>> import torch
    >>> import metablocks as mb
    >>> double = lambda shared, buffers, task: (task.query[0].sum(), task.query[0] * 2)
    >>> x = torch.ones(3, 2)
    >>> total, each = mb.Vmap(chunk=2)(double, {}, {}, mb.TaskBatch((x, x), (x, x)))
    >>> total, each.shape
    (tensor(6.), torch.Size([3, 2]))

    Raises `BlockError` for a chunk below 1 and a `compile` that is none, `TaskError` for tasks of
    unequal size, `ExecutorError` for a model that `vmap` cannot run.
    """

    chunk: Count | None = None
    compile: Compile = False

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        whole = [tasks] if isinstance(tasks, TaskBatch) else tasks
        for leaf in tensors_of([(one.support, one.query) for one in whole]):
            if leaf.is_nested or leaf.layout is not torch.strided:
                kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
                raise ExecutorError(
                    f"Vmap takes tasks of dense tensors, and these hold one that is {kind}. Use "
                    "executor=Loop()",
                    block="MetaLearner",
                    field="executor",
                )
        if not isinstance(tasks, TaskBatch):
            tasks = TaskBatch.stack(tasks)
        work = TaskWork.of(fn, shared)
        apart: list[Apart] = []

        def chunk(
            work: TaskWork, shared: Any, buffers: Tensors, chunk: Task
        ) -> tuple[Any, list[Tensor]]:
            parts = (chunk.support, chunk.query, chunk.weight, chunk.drawn)
            leaves, spec = pytree.tree_flatten(parts)
            tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

            def task_of(tensors: dict[int, Tensor]) -> Task:
                # What is not a tensor is the same for every task.
                own = [tensors.get(i, leaf) for i, leaf in enumerate(leaves)]
                *parts, drawn = pytree.tree_unflatten(own, spec)
                return Task(*parts, drawn=drawn)

            def one(buffers: Tensors, tensors: dict[int, Tensor]) -> tuple[Any, Any]:
                to_sum, to_stack = work(shared, buffers, task_of(tensors))
                apart.append(Apart(to_stack))
                apart[-1].check()
                return to_sum, apart[-1].tensors

            def first() -> None:
                row = pytree.tree_map(lambda leaf: leaf[0], (buffers, tensors))
                work(shared, row[0], task_of(row[1]))

            to_sum, to_stack = _vmap(one, first, buffers, tensors)
            return pytree.tree_map(lambda leaf: leaf.sum(0), to_sum), to_stack

        def run(own: Tensors, tasks: Task, width: int) -> tuple[Any, list[Tensor]]:
            if not self.compile or work.pieces is None:
                return chunk(work, shared, own, tasks)
            (to_sum, to_stack), compiled = self._compiler(chunk, work, own, tasks, width)
            if compiled:
                apart.append(Apart(to_stack))
                to_stack = apart[-1].tensors
            return to_sum, to_stack

        size = min(self.chunk or len(tasks), len(tasks))
        total: Any = None
        rows: list[Any] = []
        for start in range(0, len(tasks), size):
            width = min(size, len(tasks) - start)
            rows_of = partial(torch.narrow, dim=0, start=start, length=width)
            *parts, drawn = map_tensors(
                rows_of, (tasks.support, tasks.query, tasks.weight, tasks.drawn)
            )
            # A buffer that a task writes needs a copy of its own for each task.
            own = {name: b.expand(width, *b.shape) for name, b in buffers.items()}
            seed = None if drawn is None else int(drawn.seed[0])
            with work.draws.seeded(seed):
                to_sum, to_stack = run(own, Task(*parts, drawn=drawn), width)
            total = pytree.tree_map(torch.add, total, to_sum) if rows else to_sum
            rows.append(to_stack)
        if work.draws.kinds:
            warnings.warn(
                "the model or the rule draws random numbers (dropout, a mask?). Under Vmap they are "
                "independent between tasks and follow from the seed, but they are not the draws of Loop",
                RandomDrawsWarning,
                stacklevel=2,
            )
        stacked = [torch.cat(leaves) for leaves in zip(*rows, strict=True)]
        return total, apart[-1].together(stacked)

    @cached_property
    def _compiler(self) -> Compiler:
        return Compiler(self.compile)


def _vmap(
    one: Callable[..., tuple[Any, Any]], first: Callable[[], object], *args: Any
) -> tuple[Any, Any]:
    """`vmap(one)(*args)`. What it refuses and the plain `first` task runs is an `ExecutorError`."""
    try:
        return torch.func.vmap(one, randomness="different")(*args)
    except MetablocksError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise
        refusal = error
    try:
        first()  # raises what is wrong with the work itself
    except RuntimeError as error:
        if "escaped from inside a function being vmapped" not in str(error):
            raise
        # The loss, the metric or an object of the model keeps tensors of the attempt.
    raise ExecutorError(
        f"Vmap cannot run this model or loss, which a plain loop runs: {first_line(refusal)} "
        "Use executor=Loop()",
        block="MetaLearner",
        field="executor",
    ) from refusal
