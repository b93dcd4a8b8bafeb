"""Executors: how tasks are spread over the hardware.

Tasks are the outermost transform. A *task function* maps `(shared, buffers, task)` to a pair
`(to_sum, to_stack)` of pytrees, `shared` being the tensors that all tasks read; an executor applies
it to every task, adds up the first and stacks the second. Per-task gradients are computed whole
before they are added: `vmap(grad(...))`, never `grad(vmap(...))`, which PyTorch gets silently wrong
at second order under batch norm. So a loop, a `vmap`, chunks and processes are one idea: a sum over
tasks.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import count
from metablocks.compiled import Compile, Compiler
from metablocks.errors import BlockError, ExecutorError, MetablocksError, TaskError, first_line
from metablocks.generators import Draws, generators_of
from metablocks.outputs import Apart, stack_rows
from metablocks.threads import map_in_threads
from metablocks.types import Task, TaskBatch, Tensors

TaskFunction: TypeAlias = Callable[[Any, Tensors, Task], tuple[Any, Any]]
Tasks: TypeAlias = TaskBatch | Sequence[Task]
ChannelsLast: TypeAlias = bool | Literal["query"]


@dataclass(frozen=True)
class TaskWork:
    """A task function with what executors may know of it.

    - `draws`: the random generators that it draws from.
    - `key`: what it depends on besides its arguments: work of equal keys gives equal results for equal
      arguments, and may be compiled. None for work that is never compiled.
    - `thrifty`: work of the same results in less memory and more time, if there is any.
    """

    call: TaskFunction
    draws: Draws
    key: Hashable | None = None
    thrifty: "TaskWork | None" = None

    def __call__(self, shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
        with self.draws.observed():
            return self.call(shared, buffers, task)


class RandomDrawsWarning(UserWarning):
    """The draws of an executor differ from the plain loop's, as it says when it made some."""


@runtime_checkable
class Executor(Protocol):
    """Runs a task function on every task.

    Laws: the result is the plain loop's up to rounding, whatever the chunking; random draws are
    independent between tasks and follow from the global seed.
    """

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        """The sum over tasks of the first result, and the second stacked to `[tasks, ...]`."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One task after another: the reference, and the one that takes tasks of unequal size.

    Random draws (dropout) follow each other in task order from the global generator. Results of
    unequal shape come back as a list in place of a stacked tensor.

    - `workers`: tasks under way at a time, in threads that share torch's own threads; convolutional
      nets on a CPU gain by it. Tasks that draw random numbers go one after another all the same.
    - `channels_last`: lay out the images `[examples, channels, height, width]` of the query sets
      ("query") or of both (True) channels last, which is quicker for convolutions and much quicker for
      max-pooling on a CPU; but not for the second derivatives of batch norm, so "query" is for second
      order, True for first order.
    - `compile`: trace or compile the work on one task, once for every size of tasks (see `Compiler`).

    Law: neither changes a result, up to rounding.

    >>> double = lambda shared, buffers, task: (task.query[0].sum(), task.query[0] * 2)
    >>> x = torch.ones(3, 2)
    >>> total, each = Loop(workers=2)(double, {}, {}, TaskBatch((x, x), (x, x)))
    >>> total, each.shape
    (tensor(6.), torch.Size([3, 2]))

    Raises `BlockError` for fewer than one worker, and for other settings than those named.
    """

    workers: int = 1
    channels_last: ChannelsLast = False
    compile: Compile = False
    _compiler: Compiler | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiler", Compiler.of("Loop", self.compile))
        count("Loop", "workers", self.workers)
        if not isinstance(self.channels_last, bool) and self.channels_last != "query":
            raise BlockError(
                f'Loop channels_last is {self.channels_last!r}; it takes True, False or "query"',
                block="Loop",
                field="channels_last",
            )

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        work = _as_work(fn, shared)

        def on_task(shared: Any, buffers: Tensors, support: Any, query: Any) -> tuple[Any, Any]:
            return work(shared, buffers, Task(support, query))

        def run(index: int) -> tuple[Any, Any]:
            task = tasks[index]
            support = _channels_last(task.support) if self.channels_last is True else task.support
            query = _channels_last(task.query) if self.channels_last else task.query
            result: tuple[Any, Any]
            result = _call(self._compiler, work, on_task, shared, buffers, support, query)
            return result

        count = len(tasks)
        # The first task may have to tell whether the work draws: whose draws come first must not be
        # a matter of chance.
        total = _Total()
        if not work.draws.known:
            total.add(run(0))
        rest = range(total.count, count)
        workers = 1 if work.draws.kinds else min(self.workers, len(rest))
        if workers > 1:
            map_in_threads(run, rest, workers, total.add)
        else:
            for index in rest:
                total.add(run(index))
        return total.sums, stack_rows(total.rows)


@dataclass(frozen=True, kw_only=True)
class Vmap:
    """Tasks at once, `chunk` at a time (all of them where `chunk` is None), by `torch.func.vmap`.

    Per-task gradients of a chunk are held at the same time: memory is `chunk` × the loop's. Random
    draws are independent between tasks and reproducible from the seed for a given `chunk`, but are
    not the draws of `Loop`; a run that made some says so once, with a `RandomDrawsWarning`.

    Law: equals `Loop`, up to rounding, for any `chunk`.

    >>> double = lambda shared, buffers, task: (task.query[0].sum(), task.query[0] * 2)
    >>> x = torch.ones(3, 2)
    >>> total, each = Vmap(chunk=2)(double, {}, {}, TaskBatch((x, x), (x, x)))
    >>> total, each.shape
    (tensor(6.), torch.Size([3, 2]))

    `compile` traces or compiles the work on a chunk, `vmap` and all (see `Compiler`).

    Raises `BlockError` for a chunk below 1 and a `compile` that is none, `TaskError` for tasks of
    unequal size, `ExecutorError` for a model that `vmap` cannot run.
    """

    chunk: int | None = None
    compile: Compile = False
    _compiler: Compiler | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiler", Compiler.of("Vmap", self.compile))
        if self.chunk is not None:
            count("Vmap", "chunk", self.chunk)

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        if not isinstance(tasks, TaskBatch):
            tasks = TaskBatch.stack(tasks)
        work = _as_work(fn, shared)
        compiled = self._compiler is not None and work.key is not None
        apart: list[Apart] = []

        def chunk(shared: Any, buffers: Tensors, batches: Any) -> tuple[Any, Any]:
            leaves, spec = pytree.tree_flatten(batches)
            tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

            def task_of(tensors: dict[int, Tensor]) -> Task:
                # What is not a tensor is the same for every task.
                own = [tensors.get(i, leaf) for i, leaf in enumerate(leaves)]
                return Task(*pytree.tree_unflatten(own, spec))

            def one(buffers: Tensors, tensors: dict[int, Tensor]) -> tuple[Any, Any]:
                to_sum, to_stack = work(shared, buffers, task_of(tensors))
                if compiled:
                    return to_sum, to_stack
                apart.append(Apart(to_stack))
                return to_sum, apart[-1].tensors

            def first() -> None:
                row = pytree.tree_map(lambda leaf: leaf[0], (buffers, tensors))
                work(shared, row[0], task_of(row[1]))

            to_sum, to_stack = _vmap(one, first, buffers, tensors)
            return pytree.tree_map(lambda leaf: leaf.sum(0), to_sum), to_stack

        count = len(tasks)
        size = min(self.chunk or count, count)
        total: Any = None
        rows: list[Any] = []
        for start in range(0, count, size):
            width = min(size, count - start)
            batches = _rows((tasks.support, tasks.query), start, width)
            # A buffer that a task writes needs a copy of its own for each task.
            own = {name: b.expand(width, *b.shape) for name, b in buffers.items()}
            to_sum, to_stack = _call(self._compiler, work, chunk, shared, own, batches)
            total = pytree.tree_map(torch.add, total, to_sum) if rows else to_sum
            rows.append(to_stack)
        if work.draws.kinds:
            warnings.warn(
                "the model or the rule draws random numbers (dropout, a mask?). Under Vmap they are "
                "independent between tasks and follow from the seed, but they are not the draws of Loop",
                RandomDrawsWarning,
                stacklevel=2,
            )
        stacked = pytree.tree_map(lambda *leaves: torch.cat(leaves), *rows)
        return total, stacked if compiled else apart[0].together(stacked)


def check_tasks(tasks: Tasks, *, differentiated: bool = False) -> int:
    """The number of tasks.

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
        for side in ("support", "query"):
            for path, leaf in pytree.tree_leaves_with_path(getattr(one, side)):
                if isinstance(leaf, Tensor):
                    where = f"{name}.{side}{pytree.keystr(path)}"
                    _check_leaf(where, leaf, differentiated)
    return len(tasks)


def _check_leaf(where: str, leaf: Tensor, differentiated: bool) -> None:
    if leaf.is_inference():
        raise TaskError(
            f"{where} was made under torch.inference_mode(), and autograd cannot save it; make it "
            "outside, under torch.no_grad() if need be, or give a clone"
        )
    if differentiated and leaf.requires_grad:
        raise TaskError(
            f"{where} requires a gradient, and a meta-gradient goes to meta-parameters alone, so that "
            "what computed this tensor would not learn. Give tensor.detach(); or put what computes it "
            "into the model; or differentiate metablocks.adapt, which goes through the batch"
        )


class _Total:
    """The sum of the first results of tasks, leaf by leaf, so that one is held at a time; the others."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[Any] = []
        self._leaves: list[Any] = []
        self._spec: Any = None

    def add(self, result: tuple[Any, Any]) -> None:
        to_sum, to_stack = result
        leaves, spec = pytree.tree_flatten(to_sum)
        if self.count:
            for index, leaf in enumerate(leaves):
                self._leaves[index] = self._leaves[index] + leaf
        else:
            self._leaves, self._spec = leaves, spec
        self.count += 1
        self.rows.append(to_stack)

    @property
    def sums(self) -> Any:
        return pytree.tree_unflatten(self._leaves, self._spec)


def _as_work(fn: TaskFunction, shared: Any) -> TaskWork:
    return fn if isinstance(fn, TaskWork) else TaskWork(fn, Draws(generators_of(shared)))


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


def _rows(tree: Any, first: int, width: int) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.narrow(0, first, width) if isinstance(leaf, Tensor) else leaf, tree
    )


def _call(compiler: Compiler | None, fn: TaskWork, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)`, compiled if that is wished and `fn` says what it depends on."""
    if compiler is None or fn.key is None:
        return work(*args)
    return compiler(work, fn.key, *args)


def _vmap(
    one: Callable[..., tuple[Any, Any]], first: Callable[[], object], *args: Any
) -> tuple[Any, Any]:
    """`vmap(one)(*args)`. What it refuses and the plain `first` task runs is an `ExecutorError`."""
    try:
        return torch.func.vmap(one, randomness="different")(*args)
    except MetablocksError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        refusal = error
    first()  # raises what is wrong with the work itself
    raise ExecutorError(
        f"Vmap cannot run this model or loss, which a plain loop runs: {first_line(refusal)} "
        "Use executor=Loop()"
    ) from refusal
