"""Whatever holds tasks, read as the batches of tasks that a learner takes.

A `TaskSource` is sampled; anything else is iterated, and what it gives is recognised by structure:
a `TaskBatch`; a pair `(support, query)`, or a dict with these two keys, each a pair
`(inputs, target)` of tensors `[tasks, examples, ...]`, tuples or lists alike; a list of `Task`.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from metablocks.errors import TaskError
from metablocks.tasks.base import Split, TaskSource
from metablocks.types import Task, TaskBatch, TaskList, Tasks, as_pair

_VALIDATION_TASKS = 100  # of a source
_STRUCTURES = (
    "a batch of tasks is a TaskBatch; a pair (support, query) or a dict with these two keys, each a "
    "pair (inputs, target) of tensors [tasks, examples, ...]; or a list of Task"
)


def epoch_batches(
    tasks: TaskSource | Iterable[Any],
    split: Split,
    *,
    epoch: int,
    like: Tensor,
    tasks_per_step: int,
    iterations: int | None = None,
    part: Callable[[range], range] = lambda indices: indices,
) -> Iterator[Tasks]:
    """The batches of an epoch (counted from 0), `iterations` of them at most.

    Tensors are moved to the device of `like`, those of floats to its dtype. Tasks of equal size come
    as a `TaskBatch`, others as a list. A source gives the next `iterations` × `tasks_per_step` tasks
    of the split; without `iterations`, its first 100 in every epoch. Of the tasks of each batch of a
    source `part` says which are sampled, possibly none (`[]`); other batches stay whole.

    Raises `TaskError`, with the number of the batch (from 1), for another structure, and where no
    batch came.

    >>> import torch
    >>> x = torch.zeros(3, 5, 1)
    >>> [tasks] = epoch_batches([[(x, x), (x, x)]], "train", epoch=0, like=x, tasks_per_step=1)
    >>> type(tasks).__name__, len(tasks)
    ('TaskBatch', 3)
    """
    name, number = _name(split), 0
    sampled = isinstance(tasks, TaskSource)
    if isinstance(tasks, TaskSource):
        tasks = _sample(tasks, split, epoch, iterations, tasks_per_step, part)
    for number, batch in enumerate(islice(tasks, iterations), 1):
        place = f"{name}, batch {number} of epoch {epoch + 1}"
        yield [] if sampled and not len(batch) else _read(batch, like, place)
    if not number:
        remedy = "a generator runs once: give a list or a DataLoader" if epoch else "it is empty"
        raise TaskError(f"{name} gave no batch in epoch {epoch + 1}; {remedy}")


def check_tasks(
    tasks: Any,
    split: Split,
    epochs: int,
    iterations: int | None = None,
    argument: str = "iterations",
) -> None:
    """Raise `TaskError` for what cannot be iterated, or not `epochs` times; looks at no batch.

    `argument`: what messages call `iterations`.

    >>> check_tasks([], "train", epochs=2)
    """
    name = _name(split)
    if isinstance(tasks, type):
        raise TaskError(f"{name} is the class {tasks.__name__}; did you mean {tasks.__name__}(…)?")
    if isinstance(tasks, TaskSource):
        if split == "train" and iterations is None:
            raise TaskError(f"a task source does not end; say how many meta-steps: {argument}=1000")
        return
    if isinstance(tasks, TaskBatch | Task | Mapping | Tensor | str) or not (
        hasattr(tasks, "__iter__") or hasattr(tasks, "__getitem__")
    ):
        raise TaskError(
            f"{name} is {_describe(tasks)}; it takes a TaskSource, or an iterable of batches of "
            f"tasks, such as a list [batch]: {_STRUCTURES}"
        )
    if isinstance(tasks, Dataset) and not isinstance(tasks, IterableDataset):
        raise TaskError(
            f"{name} is a {type(tasks).__name__}, which gives single tasks; batch them: "
            "torch.utils.data.DataLoader(dataset, batch_size=…)"
        )
    if isinstance(tasks, Iterator) and epochs > 1 and iterations is None:
        alone = "" if split == "validation" else f", or {argument}=… for the meta-steps of an epoch"
        raise TaskError(
            f"{name} is a {type(tasks).__name__}, which runs once, but epochs is {epochs}; give a list "
            f"or a DataLoader, or epochs=1{alone}"
        )


def _sample(
    source: TaskSource,
    split: Split,
    epoch: int,
    iterations: int | None,
    width: int,
    part: Callable[[range], range],
) -> Iterator[Tasks]:
    count = _VALIDATION_TASKS if iterations is None else iterations * width
    first = 0 if iterations is None else epoch * count
    rows = range(first, first + count)
    for start in range(0, count, width):
        own = part(rows[start : start + width])
        yield source.sample(split, own) if own else []


def known_length(tasks: Any, iterations: int | None) -> int | None:
    """Meta-steps of an epoch, as far as they are known beforehand.

    >>> known_length([1, 2, 3], iterations=None), known_length(iter([1]), iterations=2)
    (3, 1)
    """
    known = 0 if isinstance(tasks, TaskSource) else operator.length_hint(tasks)
    return min(filter(None, (known, iterations)), default=None)


def _name(split: Split) -> str:
    return "tasks" if split == "train" else split


def _read(batch: Any, like: Tensor, place: str) -> Tasks:
    pair = as_pair(batch)
    listed = isinstance(batch, list | tuple) and all(isinstance(task, Task) for task in batch)
    parts = batch if listed else [Task(*pair)] if pair else [batch]
    if not parts or not all(isinstance(part, Task | TaskBatch) for part in parts):
        raise TaskError(f"{place} is {_describe(batch)}; {_STRUCTURES}")
    if isinstance(batch, Task):
        raise TaskError(f"{place} is a single Task; make a batch of it: [task]")

    def move(leaf: Any) -> Tensor:
        if not isinstance(leaf, Tensor):
            raise TaskError(f"it holds {_describe(leaf)}; it takes tensors: torch.as_tensor(…)")
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)

    try:
        sides: list[Any] = [
            pytree.tree_map(move, (tuple(part.support), tuple(part.query))) for part in parts
        ]
        if not listed:
            support, query = sides[0]
            return TaskBatch(support, query, getattr(parts[0], "weight", None))
        pairs = zip(sides, parts, strict=True)
        return TaskList.gather([Task(s, q, part.weight) for (s, q), part in pairs])
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from error


def _describe(value: Any) -> str:
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{kind} with keys {list(value)}"
    if not isinstance(value, list | tuple):
        return kind
    kinds = ", ".join(_describe(item) for item in value[:3])
    return f"{kind} of ({kinds}{', …' if len(value) > 3 else ''})"
