"""Laws of task sources: a task is a function of the source's fields, its split and its number alone."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.checks import shown
from metablocks.errors import LawError
from metablocks.generators import generators_of, get_states, set_states
from metablocks.laws.compare import identical, named
from metablocks.tasks.base import SPLITS, Kind, Split, TaskSource
from metablocks.types import Task, TaskBatch, TaskList, map_tensors

_SHARED = 0.01
"""The part of a split's inputs that may stand in another by chance: data sets hold duplicates."""


def fits_its_description(source: TaskSource, *, tasks: int = 2) -> None:
    """Inputs and targets have the shapes and kinds that the source states, and are finite."""
    if source.kind not in get_args(Kind):
        kinds = ", ".join(get_args(Kind))
        raise LawError(f"fits its description: kind is {source.kind!r}; it is one of {kinds}")
    for split in SPLITS:
        for index, task in enumerate(_tasks(source, split, range(tasks))):
            for side, (inputs, target) in (("support", task.support), ("query", task.query)):
                for fault in _misfits(source, inputs, target):
                    where = f"{side} of task {index} of {split}"
                    raise LawError(f"fits its description: {where}: {fault}")


def _misfits(source: TaskSource, inputs: Tensor, target: Tensor) -> Iterator[str]:
    """The ways in which a set is not as its source says."""
    shape, targets = tuple(source.input_shape), list(target.shape)
    if shape not in (tuple(inputs.shape[1:]), tuple(inputs.shape[2:])):  # of a stream
        yield f"inputs are {list(inputs.shape)}, expected {['…', *shape]}"
    if len(target) != len(inputs):
        yield f"{len(inputs)} inputs have {len(target)} targets"
    if not bool(torch.isfinite(inputs).all()):
        yield "inputs are not finite"
    counted = {"text": {"inputs": inputs, "targets": target}, "classification": {"targets": target}}
    for what, numbers in counted.get(source.kind, {}).items():
        whole_numbers = numbers.dtype == torch.int64
        if not whole_numbers or not bool(((numbers >= 0) & (numbers < source.outputs)).all()):
            yield f"{what} are not int64 in 0 … {source.outputs - 1}"
    if source.kind == "text" and target.shape != inputs.shape:
        yield f"targets are {targets}, inputs {list(inputs.shape)}"
    numeric = source.kind == "regression"
    if numeric and (targets[-1] != source.outputs or not bool(torch.isfinite(target).all())):
        yield f"targets are {targets}, not … {source.outputs}"


def is_a_function_of_the_index(
    source: TaskSource, indices: Sequence[int], splits: Sequence[Split] = SPLITS
) -> None:
    """Chunking: a task is the same alone, in any company and order, and when asked for again."""
    for split in splits:
        together = _tasks(source, split, indices)
        alone = [_tasks(source, split, [index])[0] for index in indices]
        turned = _tasks(source, split, [*reversed(indices)])[::-1]
        for others, how in ((alone, "alone"), (turned, "in the reverse order")):
            for index, one, other in zip(indices, others, together, strict=True):
                if not _equal(one, other):
                    raise LawError(
                        f"chunking: task {index} of {split} is another {how} than among "
                        f"{list(indices)}"
                    )


def samples_purely(source: TaskSource, *, tasks: int = 2, seed: int = 1) -> None:
    """Sampling neither reads nor moves a global random state: PyTorch's, Python's or NumPy's.

    Nor does a task share its memory with the next: what is written into one changes no other.
    """
    generators = generators_of(())
    states = get_states(generators)
    try:
        for split in SPLITS:
            before = get_states(generators)
            first = _tasks(source, split, range(tasks))
            kept = [_mapped(task, Tensor.clone) for task in first]
            moved = [generator.kind for generator, state in before if not generator.is_at(state)]
            if moved:
                raise LawError(
                    f"purity: sampling {split} moves the global random state ({', '.join(moved)}); "
                    "draw from a generator of the source's own, metablocks.tasks.base.generator"
                )
            for draw in (torch.manual_seed, random.seed, np.random.seed):
                draw(seed)
            for task in first:
                _mapped(task, _overwrite)
            for index, (again, task) in enumerate(
                zip(_tasks(source, split, range(tasks)), kept, strict=True)
            ):
                if not _equal(again, task):
                    raise LawError(
                        f"purity: task {index} of {split} is another from other global seeds, or "
                        f"once its tensors were written to; it depends on {named(source)}, the split "
                        "and the number alone"
                    )
    finally:
        set_states(states)


def splits_are_apart(source: TaskSource, *, tasks: int = 8) -> None:
    """No task of a split is one of another, nor are inputs of classes that are told apart.

    Inputs of one number, or of whole numbers (tokens), may be alike by chance, and count with all of
    their task.
    """
    seen: dict[str, tuple[set[bytes], set[bytes]]] = {}
    for split in SPLITS:
        batch = _tasks(source, split, range(tasks))
        whole = {_bytes(task) for task in batch}
        inputs = {
            _raw(row)
            for task in batch
            if source.kind == "classification"
            for side, _ in (task.support, task.query)
            for row in side
            if isinstance(row, Tensor) and row.is_floating_point() and row.numel() > 1
        }
        for other, (tasks_there, inputs_there) in seen.items():
            if whole & tasks_there:
                raise LawError(f"splits apart: tasks of {split} are tasks of {other}, too")
            alike = len(inputs & inputs_there)
            if alike > _SHARED * len(inputs):
                raise LawError(
                    f"splits apart: {alike} of {len(inputs)} inputs of {split} stand in {other}, too; "
                    "each split has classes of its own"
                )
        seen[split] = whole, inputs


def _tasks(source: TaskSource, split: Split, indices: Sequence[int]) -> list[Task]:
    batch = source.sample(split, indices)
    if not isinstance(batch, TaskBatch | TaskList):
        raise LawError(
            f"fits its description: sampling {split} returned {shown(batch)}; it returns a TaskBatch, or "
            "a TaskList of tasks of unequal size"
        )
    if len(batch) != len(indices):
        raise LawError(
            f"chunking: {len(batch)} tasks for {len(indices)} numbers of {split}, {list(indices)}"
        )
    return [batch[number] for number in range(len(indices))]


def _leaves(task: Task) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves((task.support, task.query))
    return leaves


def _mapped(task: Task, function: Callable[[Tensor], Any]) -> Task:
    return Task(*map_tensors(function, (task.support, task.query)))


def _overwrite(tensor: Tensor) -> Tensor:
    """Change every number, unless some of them are one (an expanded tensor)."""
    shared = any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return tensor if shared or tensor.dtype == torch.bool else tensor.detach().add_(1)


def _equal(one: Task, other: Task) -> bool:
    left, right = _leaves(one), _leaves(other)
    return len(left) == len(right) and all(map(identical, left, right))


def _bytes(task: Task) -> bytes:
    leaves = [leaf for leaf in _leaves(task) if isinstance(leaf, Tensor)]
    return b"".join(map(_raw, leaves))


def _raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers, by which one that is NaN equals itself."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
