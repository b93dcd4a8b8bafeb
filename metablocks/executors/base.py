"""Executors: how tasks are spread over the hardware.

Tasks are the outermost transform. A *task function* maps `(shared, buffers, task)` to a pair
`(to_sum, to_stack)` of pytrees, `shared` being the tensors that all tasks read; an executor applies
it to every task, adds up the first and stacks the second. Per-task gradients are computed whole
before they are added: `vmap(grad(...))`, never `grad(vmap(...))`, which PyTorch gets silently wrong
at second order under batch norm. So a loop, a `vmap`, chunks and processes are one idea: a sum over
tasks.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.batches import Batches
from metablocks.errors import TaskError, concerning
from metablocks.generators import Draws, generators_of
from metablocks.pieces import InPieces
from metablocks.twins import is_iterator
from metablocks.types import Task, TaskBatch, Tasks, Tensors, map_tensors, tensors_of, weight_of

TaskFunction: TypeAlias = Callable[[Any, Tensors, Task], tuple[Any, Any]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskWork:
    """A task function with what executors may know of it.

    - `draws`: the random generators that it draws from.
    - `pieces`: the same work to be compiled piece by piece; None for work that is never compiled.
    - `identify`: makes `key`, which stands for all that the pieces depend on besides their arguments:
      work of equal keys gives equal results for equal arguments.
    """

    call: TaskFunction
    draws: Draws
    pieces: InPieces | None = None
    identify: Callable[[], Hashable] | None = None

    @cached_property
    def key(self) -> Hashable | None:
        return None if self.identify is None else self.identify()

    @classmethod
    def of(cls, fn: TaskFunction, shared: Any) -> "TaskWork":
        """A task function of one's own, which may draw from the generators of `shared`'s devices."""
        return fn if isinstance(fn, TaskWork) else cls(fn, Draws(generators_of(shared)))

    def __call__(self, shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
        with self.draws.observed():
            return self.call(shared, buffers, task)


class RandomDrawsWarning(UserWarning):
    """The draws of an executor differ from the plain loop's, as it says when it made some.

    >>> import warnings
    >>> import metablocks as mb
    >>> with warnings.catch_warnings():                  # once it is known, and accepted
    ...     warnings.simplefilter("ignore", mb.RandomDrawsWarning)
    """


@runtime_checkable
class Executor(Protocol):
    """Runs a task function on every task.

    Laws: the result is the plain loop's up to rounding, whatever the chunking; random draws are
    independent between tasks and follow from the global seed. Both results are pytrees.

    >>> import torch
    >>> import metablocks as mb
    >>> from torch.utils._pytree import tree_map
    >>> def backwards(fn, shared, buffers, tasks):       # an executor of one's own
    ...     order = range(len(tasks))[::-1]              # `Loop` seeds the draws of each task
    ...     results = [mb.Loop()(fn, shared, buffers, [tasks[n]]) for n in order]
    ...     totals, rows = zip(*results[::-1])
    ...     join = lambda *each: torch.cat(each) if torch.is_tensor(each[0]) else each[0]
    ...     return tree_map(lambda *each: sum(each), *totals), tree_map(join, *rows)
    >>> double = lambda shared, buffers, task: (task.query[0].sum(), task.query[0] * 2)
    >>> x = torch.ones(3, 2)
    >>> total, each = backwards(double, {}, {}, mb.TaskBatch((x, x), (x, x)))
    >>> total, each.shape
    (tensor(6.), torch.Size([3, 2]))
    """

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        """The sum over tasks of the first result, and the second stacked to `[tasks, ...]`."""


class Share:
    """The share of a call's tasks that this process has: all, unless the executor is another share.

    >>> Share().place(3, 3.0), Share().part(range(2, 5))
    ((0, 3.0), range(2, 5))
    """

    @property
    def processes(self) -> int:
        """The number of processes. In one of several there may be no tasks."""
        return 1

    @property
    def rank(self) -> int:
        """The number of this process, from 0 on."""
        return 0

    def place(self, count: int, weight: float) -> tuple[int, float]:
        """The number of the share's first task among all, and the weight of all.

        `count` and `weight` are the share's own.
        """
        each = self.numbers(count, weight)
        return int(sum(n for n, _ in each[: self.rank])), sum(w for _, w in each)

    def union(self, names: set[str]) -> set[str]:
        """The names that any process gives."""
        return set().union(*self.gather(names))

    def part(self, indices: range) -> range:
        """The share of tasks with these indices: they are divided evenly, in their order."""
        each, more = divmod(len(indices), self.processes)
        first = self.rank * each + min(self.rank, more)
        return indices[first : first + each + (self.rank < more)]

    def numbers(self, *mine: float) -> list[list[float]]:
        """The numbers that the processes give, each its own, in the order of their tasks."""
        return [[*mine]]

    def gather(self, value: _T) -> list[_T]:
        """The values that the processes give, of any kind; slower than `numbers`."""
        return [value]

    def from_first(self, compute: Callable[[], _T]) -> _T:
        """`compute()` of the first process, which alone runs it, for all."""
        return compute()


def share_of(executor: Any) -> Share:
    """The share of tasks that an executor states, or all."""
    return executor if isinstance(executor, Share) else Share()


@concerning("MetaLearner", "tasks")
def check_tasks(
    tasks: Tasks, batches: Batches, steps: int, *, differentiated: bool = False, judged: bool = True
) -> int:
    """The number of tasks. Without `judged` their query sets do not count.

    Raises `TaskError` for anything but a `TaskBatch` or a list of `Task`, for none, and for tensors
    made under `torch.inference_mode`; if they enter what is `differentiated`, for tensors that require
    a gradient, which they would not get.
    """
    if not isinstance(tasks, TaskBatch | Sequence) or isinstance(tasks, str):
        raise TaskError(
            f"tasks is a {type(tasks).__name__}; it takes a TaskBatch or a list of Task"
        )
    if not len(tasks):
        raise TaskError("an empty list of tasks; at least one task is needed")
    whole: list[tuple[str, Any]] = [("tasks", tasks)] if isinstance(tasks, TaskBatch) else []
    for index, task in enumerate(tasks if isinstance(tasks, Sequence) else ()):
        if not isinstance(task, Task):
            raise TaskError(
                f"tasks[{index}] is a {type(task).__name__}; it takes Task(support, query)"
            )
        whole.append((f"tasks[{index}]", task))
    for name, one in whole:
        support, query = one.support, one.query
        if isinstance(one, TaskBatch):  # the first task stands for all
            support, query = map_tensors(lambda leaf: leaf[0], (support, query))
        batches.check(support, query if judged else None, steps)
        firsts = {"support": batches.select(support, None, 0)}
        if judged:
            firsts["query"] = batches.query(query, 0)
        for side, batch in firsts.items():
            for part, tree in enumerate(getattr(one, side)):
                _check_iterators(f"{name}.{side}[{part}]", tree)
                for index, leaf in enumerate(tensors_of(tree)):
                    where = partial(_place, name, side, part, tree, index)
                    _check_leaf(where, leaf, differentiated)
                examples = [leaf.size(0) for leaf in tensors_of(batch[part]) if leaf.ndim]
                if examples and not any(examples):
                    raise TaskError(
                        f"{name}.{side}[{part}] has no examples; a {side} set has at least one",
                        block="Task",
                        field=side,
                    )
    _check_weights(tasks)
    return len(tasks)


def total_weight(tasks: Tasks) -> Tensor | int:
    """The sum of the weights of tasks: their number, if none of them has one."""
    if isinstance(tasks, TaskBatch):
        return len(tasks) if tasks.weight is None else torch.as_tensor(tasks.weight).sum()
    if all(task.weight is None for task in tasks):
        return len(tasks)
    return torch.stack([weight_of(task) for task in tasks]).sum()


def _check_weights(tasks: Tasks) -> None:
    whole = isinstance(tasks, TaskBatch)
    own = [tasks] if isinstance(tasks, TaskBatch) else tasks
    given = [task.weight for task in own]
    weights = [weight for weight in given if isinstance(weight, Tensor)]
    if not weights:
        return
    for weight in weights:
        _check_leaf(lambda: "the weight of a task", weight, True)
    numbers = torch.cat([weight.detach().flatten().cpu() for weight in weights])
    wrong = [float(number) for number in numbers if not 0 <= number < torch.inf]
    if wrong:
        raise TaskError(
            f"a weight of tasks is {wrong[0]:g}; weights are 0 or more and finite, and one of them is "
            "above 0",
            block="TaskBatch" if whole else "Task",
            field="weight",
        )


def _place(name: str, side: str, part: int, tree: Any, index: int) -> str:
    """The name of the tensor `index` of a half of a set."""
    leaves = pytree.tree_leaves_with_path(tree)
    path = [path for path, leaf in leaves if isinstance(leaf, Tensor)][index]
    return f"{name}.{side}[{part}]{pytree.keystr(path)}"


def _check_iterators(where: str, tree: Any) -> None:
    for leaf in () if isinstance(tree, Tensor) else pytree.tree_leaves(tree):
        if is_iterator(leaf):
            raise TaskError(
                f"{where} holds a {type(leaf).__name__}, whose items come once, and every pass reads "
                "them; give a list"
            )


def _check_leaf(where: Callable[[], str], leaf: Tensor, differentiated: bool) -> None:
    if leaf.is_inference():
        raise TaskError(
            f"{where()} was made under torch.inference_mode(), and autograd cannot save it; make it "
            "outside, under torch.no_grad() if need be, or give a clone"
        )
    if differentiated and leaf.requires_grad:
        raise TaskError(
            f"{where()} requires a gradient, and a meta-gradient goes to meta-parameters alone, so that "
            "what computed this tensor would not learn. Give tensor.detach(); or put what computes it "
            "into the model; or differentiate metablocks.adapt, which goes through the batch"
        )
