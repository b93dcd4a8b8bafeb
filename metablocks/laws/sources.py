"""Laws of task sources."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.errors import LawError
from metablocks.tasks.base import SPLITS, Split, TaskSource
from metablocks.types import TaskBatch


def is_a_function_of_the_index(
    source: TaskSource, indices: Sequence[int], splits: Sequence[Split] = SPLITS
) -> None:
    """Task `index` of a split is the same task alone, in any company, and when asked again."""
    for split in splits:
        together = source.sample(split, indices)
        for row, index in enumerate(indices):
            alone = source.sample(split, [index])
            for one, other in zip(_leaves(alone), _leaves(together), strict=True):
                if not torch.equal(one[0], other[row]):
                    raise LawError(
                        f"task {index} of {split} differs alone and among {list(indices)}"
                    )


def fits_its_description(source: TaskSource) -> None:
    """Inputs and targets have the shapes and kinds that the source states, and are finite."""
    for split in SPLITS:
        batch = source.sample(split, [0, 1])
        for side, (inputs, target) in (("support", batch.support), ("query", batch.query)):
            where = f"{side} of {split}"
            if tuple(inputs.shape[2:]) != tuple(source.input_shape) or inputs.shape[0] != 2:
                raise LawError(
                    f"{where}: inputs are {list(inputs.shape)}, not {source.input_shape}"
                )
            if not bool(torch.isfinite(inputs).all()):
                raise LawError(f"{where}: inputs are not finite")
            if source.kind == "classification":
                if target.dtype != torch.int64 or not bool(
                    ((target >= 0) & (target < source.outputs)).all()
                ):
                    raise LawError(f"{where}: targets are not int64 in 0 … {source.outputs - 1}")
            elif target.shape[-1] != source.outputs or not bool(torch.isfinite(target).all()):
                raise LawError(f"{where}: targets are {list(target.shape)}, not … {source.outputs}")


def _leaves(batch: TaskBatch) -> list[Tensor]:
    leaves: list[Tensor] = pytree.tree_leaves((batch.support, batch.query))
    return leaves
