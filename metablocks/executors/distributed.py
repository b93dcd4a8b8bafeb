"""Tasks over processes, with `torch.distributed`: each runs its own, and their sums are all-reduced."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks import processes
from metablocks.checks import UNCHECKED, checked
from metablocks.errors import ExecutorError
from metablocks.executors.base import Executor, Share, TaskFunction, TaskWork
from metablocks.executors.loop import Loop
from metablocks.types import Tasks, Tensors

_T = TypeVar("_T")


@checked()
@dataclass(frozen=True)
class Distributed(Share):
    """Tasks over the processes of a group: `tasks` are this process's own, possibly none (`[]`).

    `executor` runs them. Sums over tasks, the number of tasks and the names of parameters that a loss
    depends on are those of all processes, so that every learner's meta-gradient is that of the whole
    meta-batch, and equal optimisers keep equal parameters. Results by task (`query_losses`, `scores`,
    `[tasks, steps + 1]`) and all of `evaluate` are the process's own.

    - `group`: a process group of `torch.distributed`; by default all processes.

    All processes of the group call it equally often. If one of them ends, the others raise
    `ProcessError`.

    Laws: sums are those of `executor` on all tasks, up to rounding, however these are divided; and
    bit for bit equal in all processes.

    Started by `torchrun --nproc-per-node 2 train.py`:

        torch.distributed.init_process_group()
        learner = mb.MetaLearner(…, executor=mb.Distributed(mb.Vmap()))
        own = learner.executor.part(range(25))  # of 25 tasks a step
        learner.backward(source.sample("train", own) if own else [])

    >>> import metablocks as mb
    >>> mb.Distributed(mb.Loop(workers=2)).executor
    Loop(workers=2, channels_last=False, compile=False)

    Raises `ExecutorError` if there is no process group, `BlockError` for an executor that is none.
    """

    executor: Executor = field(default_factory=Loop)
    group: Annotated[Any, UNCHECKED] = None

    @property
    def processes(self) -> int:
        return dist.get_world_size(self._joined())

    @property
    def rank(self) -> int:
        return dist.get_rank(self._joined())

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        group = self._joined()
        work = TaskWork.of(fn, shared)
        sums = rows = None
        if len(tasks):
            sums, rows = self.executor(work, shared, buffers, tasks)
            if not pytree.tree_leaves(sums):
                return sums, rows
        counts = processes.numbers(len(tasks), group=group)
        if [0] in counts:
            source = next(rank for rank, (count,) in enumerate(counts) if count)
            form = (pytree.tree_map(_Form.of, (sums, rows)), work.draws.kinds)
            (sums_form, rows_form), kinds = processes.broadcast(form, source, group)
            if not len(tasks):
                sums = pytree.tree_map(_Form.zeros, sums_form)
                rows = pytree.tree_map(_Form.no_rows, rows_form)
                work.draws.kinds |= kinds
        leaves, spec = pytree.tree_flatten(sums)
        return pytree.tree_unflatten(processes.add_up(leaves, group), spec), rows

    def numbers(self, *mine: float) -> list[list[float]]:
        return processes.numbers(*mine, group=self._joined())

    def gather(self, value: _T) -> list[_T]:
        return processes.gather(value, self._joined())

    def from_first(self, compute: Callable[[], _T]) -> _T:
        value: _T = processes.broadcast(compute() if self.rank == 0 else None, group=self.group)
        return value

    def _joined(self) -> Any:
        if not dist.is_initialized():
            raise ExecutorError(
                "Distributed: this process has joined no others. Start it by torchrun, and call "
                "torch.distributed.init_process_group() before",
                block="Distributed",
                field="group",
            )
        return self.group


def executor_of(learner: Any) -> Any:
    """The executor that runs a learner's tasks in this process.

    >>> from types import SimpleNamespace
    >>> executor_of(SimpleNamespace(executor=Distributed(Loop(workers=2)))).workers
    2
    """
    executor = learner.executor
    return executor.executor if isinstance(executor, Distributed) else executor


@dataclass(frozen=True)
class _Form:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, leaf: Any) -> "_Form | None":
        if not isinstance(leaf, Tensor):
            return None
        return cls(tuple(leaf.shape), leaf.dtype, leaf.device.type)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def no_rows(self: "_Form | None") -> Any:
        """Results by task of no tasks."""
        if self is None:
            return []
        return torch.empty((0, *self.shape[1:]), dtype=self.dtype, device=self.device)
