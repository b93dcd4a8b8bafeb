"""The protocol of task sources, pure functions from (seed, split, index) to a task, and its draws."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from metablocks.checks import CountFrom0, Such, check
from metablocks.errors import TaskError
from metablocks.types import TaskBatch, TaskList

Floats: TypeAlias = NDArray[np.float64]
Split: TypeAlias = Literal["train", "validation", "test"]
Kind: TypeAlias = Literal["classification", "regression", "text"]
TaskNumbers = Annotated[
    Sequence[CountFrom0], Such(len, "a list of task numbers, at least one; they count from 0")
]
SPLITS: tuple[Split, ...] = get_args(Split)


@runtime_checkable
class TaskSource(Protocol):
    """A family of tasks.

    Law: task `index` of a split depends on nothing but (the source's fields, its seed, the split,
    the index). `sample(split, [3, 7])` is row 3 and row 7 of `sample(split, range(8))`, in any
    process, in any chunking, after any resume.

    >>> import torch
    >>> import metablocks as mb
    >>> class Offsets:                                   # a source of one's own: y = x + a
    ...     kind, input_shape, outputs = "regression", (1,), 1
    ...     def sample(self, split, indices):
    ...         first = {"train": 0, "validation": 10**6, "test": 2 * 10**6}[split]
    ...         a = torch.tensor([[[(first + n) * 0.618 % 1]] for n in indices])
    ...         x = torch.linspace(-1, 1, 6)[:, None].expand(len(indices), 6, 1)
    ...         return mb.TaskBatch((x[:, ::2], x[:, ::2] + a), (x[:, 1::2], x[:, 1::2] + a))
    >>> isinstance(Offsets(), mb.tasks.TaskSource), Offsets().sample("test", [3, 7]).query[0].shape
    (True, torch.Size([2, 3, 1]))
    """

    @property
    def kind(self) -> Kind:
        """Classification (targets are int64 class numbers), regression (targets are floats) or text.

        Inputs and targets of text are int64 `[examples, length]`, numbers of tokens.
        """

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input."""

    @property
    def outputs(self) -> int:
        """Width of a model's output: ways, target dimensions, or the number of tokens."""

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch | TaskList:
        """Tasks number `indices` of a split: leaves `[len(indices), examples, ...]`.

        Tasks of unequal size come as a `TaskList`, which the executor `Loop` takes.
        """


def example_shapes(source: TaskSource) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """The shape and kind of numbers of an example's input, and the shape of a model's output for it.

    >>> from metablocks.tasks import Sinusoid
    >>> example_shapes(Sinusoid())
    ((1,), torch.float32, (1,))
    """
    shape, outputs = source.input_shape, source.outputs
    if source.kind == "text":
        return shape, torch.int64, (*shape, outputs)
    return shape, torch.float32, (outputs,)


def generator(seed: int, split: Split, *counters: int) -> np.random.Generator:
    """The random generator of one task (or class): a function of its arguments alone.

    >>> a, b = generator(0, "train", 7), generator(0, "train", 7)
    >>> bool(a.random() == b.random())
    True

    Raises `TaskError` for an unknown split or a negative counter.
    """
    check_split(split)
    check("generator", "seed", seed, CountFrom0, TaskError)
    check("generator", "counters", counters, TaskNumbers, TaskError)
    return np.random.default_rng([seed, SPLITS.index(split), *counters])


def check_split(split: str) -> None:
    """Raise `TaskError` for an unknown split."""
    if split not in SPLITS:
        message = f"unknown split {split!r}; it is one of {', '.join(SPLITS)}"
        raise TaskError(message, block="sample", field="split")


def task_numbers(indices: Sequence[int]) -> list[int]:
    """The task numbers as a list of int; raises `TaskError` for anything else."""
    check("sample", "indices", indices, TaskNumbers, TaskError)
    return [int(index) for index in indices]


def draw_tasks(
    seed: int, split: Split, indices: Sequence[int], draw: Callable[[np.random.Generator], Floats]
) -> Floats:
    """`draw(generator of the task)` for every task, stacked: `[len(indices), ...]`, float64.

    Raises `TaskError` for empty `indices`, an unknown split or a negative index.
    """
    return np.stack([draw(generator(seed, split, index)) for index in task_numbers(indices)])


def regression_tasks(x: Floats, y: Floats, shots: int, device: str | torch.device) -> TaskBatch:
    """Tasks from x and y `[tasks, examples]`: the first `shots` examples are the support set.

    Leaves are float32 `[tasks, examples, 1]` on `device`.
    """

    def tensor(values: Floats) -> torch.Tensor:
        return torch.from_numpy(values[..., None].astype(np.float32, order="C")).to(device)

    return TaskBatch(
        support=(tensor(x[:, :shots]), tensor(y[:, :shots])),
        query=(tensor(x[:, shots:]), tensor(y[:, shots:])),
    )
