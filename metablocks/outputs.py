"""Results of tasks: tensors stacked, anything else as a list by task.

A prediction may be any pytree, and hold distributions, dataclasses, caches, numbers, None.
"""

from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.twins import tensors_in, twin


def stack_rows(rows: Sequence[Any]) -> Any:
    """Results of tasks as one pytree: every leaf `[tasks, ...]`, or a list by task.

    >>> stack_rows([{"a": torch.ones(2), "b": None}, {"a": torch.ones(2), "b": None}])["a"].shape
    torch.Size([2, 2])
    """
    flat = [pytree.tree_flatten(row) for row in rows]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        return list(rows)
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([_stack(*column) for column in columns], spec)


class Apart:
    """A result taken apart into the tensors that it holds and everything else.

    >>> apart = Apart({"a": torch.ones(1), "b": 2.0})
    >>> apart.tensors, apart.together([torch.zeros(2, 1)])
    ([tensor([1.])], {'a': tensor([[0.],
            [0.]]), 'b': [2.0, 2.0]})
    """

    def __init__(self, result: Any) -> None:
        self.leaves, self.spec = pytree.tree_flatten(result)
        self._held = [tensors_in(leaf) for leaf in self.leaves]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order in which `together` takes them."""
        return [tensor for held in self._held for tensor in held.values()]

    def check(self) -> None:
        """Raise `TypeError` for what may hold tensors unseen: a module, a function, an iterator."""
        for leaf in self.leaves:
            if isinstance(leaf, nn.Module | FunctionType | Iterator):
                raise TypeError(
                    f"the prediction holds a {type(leaf).__name__}, and tensors in there."
                )

    def together(self, stacked: Sequence[Tensor]) -> Any:
        """The results of all tasks, as `stack_rows`, the tensors `[tasks, ...]` being given."""
        if not stacked:
            return pytree.tree_unflatten(self.leaves, self.spec)
        given = iter(stacked)
        columns: list[Any] = []
        for leaf, held in zip(self.leaves, self._held, strict=True):
            own = [next(given) for _ in held]
            if isinstance(leaf, Tensor):
                columns += own
                continue
            rows = zip(*own, strict=True) if own else [()] * len(stacked[0])
            columns.append([twin(leaf, dict(zip(held, row, strict=True))) for row in rows])
        return pytree.tree_unflatten(columns, self.spec)


def _stack(*column: Any) -> Any:
    alike = all(isinstance(leaf, Tensor) and leaf.shape == column[0].shape for leaf in column)
    return torch.stack(column) if alike else list(column)
