"""Executors: how tasks are spread over the hardware.

Tasks are the outermost transform. A *task function* maps `(shared, buffers, task)` to a pair
`(to_sum, to_stack)` of pytrees, `shared` being the tensors that all tasks read; an executor applies
it to every task, adds up the first and stacks the second. Per-task gradients are computed whole
before they are added: `vmap(grad(...))`, never `grad(vmap(...))`, which PyTorch gets silently wrong
at second order under batch norm. So a loop, a `vmap`, chunks and processes are one idea: a sum over
tasks.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.compiled import Compile, Compiler
from metablocks.errors import BlockError, ExecutorError, MetablocksError, TaskError
from metablocks.generators import devices_of, get_states, set_states
from metablocks.threads import map_in_threads
from metablocks.types import Task, TaskBatch, Tensors

TaskFunction: TypeAlias = Callable[[Any, Tensors, Task], tuple[Any, Any]]
Tasks: TypeAlias = TaskBatch | Sequence[Task]
ChannelsLast: TypeAlias = bool | Literal["query"]


@dataclass(frozen=True)
class KeyedFunction:
    """A task function that says what it depends on besides its arguments, so that it can be compiled.

    Functions of equal `key` give equal results for equal arguments. `thrifty` gives the same results
    in less memory and more time, where there is a way to.
    """

    call: TaskFunction
    key: Hashable
    thrifty: "KeyedFunction | None" = None

    def __call__(self, shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
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
    _drawn: list[bool] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiler", Compiler.of("Loop", self.compile))
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise BlockError(f"Loop workers is {self.workers!r}; it takes a number, 1 or more")
        if not isinstance(self.channels_last, bool) and self.channels_last != "query":
            raise BlockError(
                f'Loop channels_last is {self.channels_last!r}; it takes True, False or "query"'
            )

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        def work(shared: Any, buffers: Tensors, support: Any, query: Any) -> tuple[Any, Any]:
            return fn(shared, buffers, Task(support, query))

        def run(index: int) -> tuple[Any, Any]:
            task = tasks[index]
            support = _channels_last(task.support) if self.channels_last is True else task.support
            query = _channels_last(task.query) if self.channels_last else task.query
            result: tuple[Any, Any]
            result = _call(self._compiler, fn, work, shared, buffers, support, query)
            return result

        workers = min(self.workers, len(tasks))
        if workers == 1 or self._drawn:
            return _add_up(map(run, range(len(tasks))))
        devices = devices_of(shared)
        before = get_states(devices)
        results = _add_up(map_in_threads(run, range(len(tasks)), workers))
        if all(map(torch.equal, before, get_states(devices))):
            return results
        # Whose draws came first was a matter of chance.
        self._drawn.append(True)
        set_states(devices, before)
        return self(fn, shared, buffers, tasks)


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
        if self.chunk is not None and self.chunk < 1:
            raise BlockError(
                f"Vmap chunk is {self.chunk}; it takes 1 or more, or None for all tasks"
            )

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        if not isinstance(tasks, TaskBatch):
            tasks = TaskBatch.stack(tasks)

        def chunk(shared: Any, own: Tensors, support: Any, query: Any) -> tuple[Any, Any]:
            def one(own: Tensors, support: Any, query: Any) -> tuple[Any, Any]:
                return fn(shared, own, Task(support, query))

            to_sum, to_stack = _vmap(one, own, support, query)
            return pytree.tree_map(lambda leaf: leaf.sum(0), to_sum), to_stack

        count = len(tasks)
        size = min(self.chunk or count, count)
        devices = devices_of(shared)
        before = get_states(devices)
        total: Any = None
        rows: list[Any] = []
        for first in range(0, count, size):
            width = min(size, count - first)
            support, query = _rows((tasks.support, tasks.query), first, width)
            # A buffer that a task writes needs a copy of its own for each task.
            own = {name: b.expand(width, *b.shape) for name, b in buffers.items()}
            to_sum, to_stack = _call(self._compiler, fn, chunk, shared, own, support, query)
            total = pytree.tree_map(torch.add, total, to_sum) if rows else to_sum
            rows.append(to_stack)
        if not all(map(torch.equal, before, get_states(devices))):
            warnings.warn(
                "the model or the rule draws random numbers (dropout, a mask?). Under Vmap they are "
                "independent between tasks and follow from the seed, but they are not the draws of Loop",
                RandomDrawsWarning,
                stacklevel=2,
            )
        return total, pytree.tree_map(lambda *leaves: torch.cat(leaves), *rows)


def count_tasks(tasks: Tasks) -> int:
    """How many tasks there are.

    Raises `TaskError` for what is no `TaskBatch` and no list of `Task`, and for none.
    """
    if not isinstance(tasks, TaskBatch | Sequence) or isinstance(tasks, str):
        raise TaskError(
            f"tasks is a {type(tasks).__name__}; it takes a TaskBatch or a list of Task"
        )
    if not len(tasks):
        raise TaskError("an empty list of tasks; at least one task is needed")
    for index, task in enumerate(tasks if isinstance(tasks, Sequence) else ()):
        if not isinstance(task, Task):
            raise TaskError(
                f"tasks[{index}] is a {type(task).__name__}; it takes Task(support, query)"
            )
    return len(tasks)


def _add_up(results: Iterable[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The sum of the first results, and the second ones stacked."""
    total: Any = None
    rows: list[Any] = []
    for to_sum, to_stack in results:
        total = pytree.tree_map(torch.add, total, to_sum) if rows else to_sum
        rows.append(to_stack)
    return total, pytree.tree_map(_stack, *rows)


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


def _call(compiler: Compiler | None, fn: TaskFunction, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)`, compiled where that is wished and `fn` says what it depends on."""
    if compiler is None or not isinstance(fn, KeyedFunction):
        return work(*args)
    return compiler(work, fn.key, *args)


def _vmap(one: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
    try:
        return torch.func.vmap(one, randomness="different")(*args)
    except MetablocksError:
        raise
    except RuntimeError as error:
        words = ["vmap", "batching rule", "functorch"]
        if any(map(torch.is_autocast_enabled, _device_types(args))):
            words += ["expected scalar type"]  # batch norm's derivatives in mixed precision
        if not any(word in str(error) for word in words):
            raise
        raise ExecutorError(
            f"Vmap cannot run this model or loss: {str(error).splitlines()[0]} Use executor=Loop()"
        ) from error


def _device_types(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def _rows(tree: Any, first: int, width: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf.narrow(0, first, width), tree)


def _stack(*leaves: Tensor) -> Any:
    alike = len({leaf.shape for leaf in leaves}) == 1
    return torch.stack(leaves) if alike else list(leaves)
