"""What models return, task by task: tensors stacked, anything else as a list.

A prediction may be any pytree, and hold distributions, dataclasses, caches, numbers, None.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.twins import is_plain


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
        self.tensors: list[Tensor] = []
        self._replace(self.leaves, self.tensors.append)

    def together(self, stacked: Sequence[Tensor]) -> Any:
        """The results of all tasks, as `stack_rows`, the tensors `[tasks, ...]` being given."""
        if not stacked:
            return pytree.tree_unflatten(self.leaves, self.spec)
        columns: list[Any] = []
        position = 0
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                columns.append(stacked[position])
                position += 1
                continue
            held: list[Tensor] = []
            self._replace([leaf], held.append)
            own = stacked[position : position + len(held)]
            position += len(held)
            rows = []
            for index in range(len(stacked[0])):
                given = iter(own)
                (row,) = self._replace([leaf], lambda _, g=given, i=index: next(g)[i])
                rows.append(row)
            columns.append(rows)
        return pytree.tree_unflatten(columns, self.spec)

    def _replace(self, leaves: Sequence[Any], replace: Any) -> list[Any]:
        """Copies of the leaves, `replace(tensor)` in the place of every tensor, in one order."""
        memo: dict[int, Any] = {}

        def visit(value: Any) -> Any:
            if id(value) in memo:
                return memo[id(value)]
            made = value
            if isinstance(value, Tensor):
                made = memo[id(value)] = replace(value)
            elif is_plain(value):
                made = memo[id(value)] = object.__new__(type(value))
                attributes = {name: visit(item) for name, item in value.__dict__.items()}
                object.__setattr__(made, "__dict__", attributes)
            elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                items = [visit(item) for item in value]
                made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            elif isinstance(value, dict):
                made = copy.copy(value)
                for key in value:
                    dict.__setitem__(made, key, visit(value[key]))
            return made

        return [visit(leaf) for leaf in leaves]


def _stack(*column: Any) -> Any:
    alike = all(isinstance(leaf, Tensor) and leaf.shape == column[0].shape for leaf in column)
    return torch.stack(column) if alike else list(column)
