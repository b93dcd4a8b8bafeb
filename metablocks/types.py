"""The values that flow between blocks: named tensors, tasks, batches of tasks, progress.

A *batch* is a pair `(inputs, target)`, each any pytree of tensors `[examples, ...]`. A *task* is a
support batch to adapt on and a query batch to judge the adaptation by. A *task batch* stacks tasks
of equal size along a new first dimension: `[tasks, examples, ...]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.errors import TaskError

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors: parameters, buffers, gradients, updates, meta-gradients."""

Batch: TypeAlias = tuple[Any, Any]
"""`(inputs, target)`, each any pytree of tensors `[examples, ...]`."""


@dataclass(frozen=True)
class Progress:
    """How far training has come. Policies read it; nobody stores it.

    `epoch` counts epochs from 0 and may be fractional.

    >>> Progress(epoch=3)
    Progress(epoch=3)
    """

    epoch: float = 0.0


@dataclass(frozen=True)
class Task:
    """One task: a support batch to adapt on, a query batch to judge by.

    >>> task = Task(support=(torch.zeros(5, 1), torch.zeros(5, 1)),
    ...             query=(torch.zeros(10, 1), torch.zeros(10, 1)))
    >>> task.query[0].shape
    torch.Size([10, 1])
    """

    support: Batch
    query: Batch


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of equal size, stacked: every leaf is `[tasks, examples, ...]`.

    Raises `TaskError` where the leaves disagree on the number of tasks.

    >>> tasks = TaskBatch(support=(torch.zeros(3, 5, 1), torch.zeros(3, 5, 1)),
    ...                   query=(torch.zeros(3, 10, 1), torch.zeros(3, 10, 1)))
    >>> len(tasks), tasks[0].support[0].shape
    (3, torch.Size([5, 1]))
    """

    support: Batch
    query: Batch

    def __post_init__(self) -> None:
        for side in ("support", "query"):
            batch = getattr(self, side)
            if not isinstance(batch, tuple) or len(batch) != 2:
                raise TaskError(
                    f"TaskBatch.{side} is {_describe(batch)}; it takes a pair (inputs, target)"
                )
        sizes = {
            f"{side}{pytree.keystr(path)} {list(leaf.shape)}": leaf.shape[0] if leaf.ndim else None
            for side in ("support", "query")
            for path, leaf in pytree.tree_leaves_with_path(getattr(self, side))
            if isinstance(leaf, Tensor)
        }
        if not sizes:
            raise TaskError("TaskBatch holds no tensor; support and query are pairs of tensors")
        if len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
            raise TaskError(
                "every tensor of a TaskBatch is [tasks, examples, ...] with one number of tasks "
                f"(at least 1); given {', '.join(sizes)}"
            )

    def __len__(self) -> int:
        leaves: list[Tensor] = pytree.tree_leaves((self.support, self.query))
        return leaves[0].shape[0]

    def __getitem__(self, index: int) -> Task:
        if not -len(self) <= index < len(self):
            raise IndexError(f"task {index} of a batch of {len(self)}")
        return Task(*pytree.tree_map(lambda leaf: leaf[index], (self.support, self.query)))

    def to(self, target: torch.device | str | torch.dtype) -> "TaskBatch":
        """The same tasks on a device, or with floating-point tensors of a dtype."""

        def move(leaf: Tensor) -> Tensor:
            keeps = isinstance(target, torch.dtype) and not leaf.is_floating_point()
            return leaf if keeps else leaf.to(target)

        return TaskBatch(*pytree.tree_map(move, (self.support, self.query)))

    @staticmethod
    def stack(tasks: Sequence[Task]) -> "TaskBatch":
        """Stack tasks of equal size; raises `TaskError` naming the shapes where they differ."""
        if not tasks:
            raise TaskError("an empty list of tasks; at least one task is needed")
        trees = [(task.support, task.query) for task in tasks]
        shapes = [[tuple(leaf.shape) for leaf in pytree.tree_leaves(tree)] for tree in trees]
        for index, other in enumerate(shapes):
            if other != shapes[0]:
                raise TaskError(
                    f"tasks of unequal size cannot be stacked: task 0 has shapes {shapes[0]}, "
                    f"task {index} has {other}; pass them as a list and use executor=Loop()"
                )
        return TaskBatch(*pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees))


def _describe(value: Any) -> str:
    length = f" of length {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{length}"
