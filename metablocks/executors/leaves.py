"""Trees of tensors, flat: the tensors in a row, and the form in which they stand."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.executors.graphs import Unfit
from metablocks.fingerprint import plainly

_KNOWN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN = (Tensor, nn.Parameter)
_MOST = 6400  # forms that are kept; then all go


class Other:
    """A leaf of a tree that is no tensor, by type and value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = plainly(value) if isinstance(value, _KNOWN) else type(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Other) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


class Form:
    """The form of a tree of tensors; the same object for equal ones."""

    def __init__(self, spec: Any, others: tuple[Other | None, ...], count: int) -> None:
        self.spec = spec
        self.others = others
        self.count = count
        alien = {type(x.value).__name__ for x in others if x and not isinstance(x.value, _KNOWN)}
        self.alien = ", ".join(sorted(alien))

    def tree(self, tensors: Iterator[Tensor]) -> Any:
        """The tree with tensors of an iterator."""
        if self.alien:
            raise Unfit(
                f"its arguments hold {self.alien}, whose tensors would be taken for constants; hand over "
                "tuples, lists and dicts of tensors"
            )
        leaves = [next(tensors) if other is None else other.value for other in self.others]
        return pytree.tree_unflatten(leaves, self.spec)


class Leaves(NamedTuple):
    """A tree of tensors, flat."""

    tensors: list[Tensor]
    form: Form


def parted(tree: Any) -> tuple[list[Tensor], tuple[Other | None, ...], Any]:
    """The tensors of a tree, what stands between them (None for each tensor), and its structure."""
    leaves, spec = pytree.tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(None if isinstance(leaf, Tensor) else Other(leaf) for leaf in leaves)
    return tensors, others, spec


class Forms:
    """The forms that have come, one object for all that are alike."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Form] = {}

    def flatten(self, tree: Any) -> Leaves:
        """A tree as its tensors and their form."""
        tensors: list[Tensor] = []
        key = (_outline(tree, tensors), *map(_kind, tensors))
        form = self._known.get(key)
        if form is None:
            form = self.of(*parted(tree))
            self._known[key] = form
        return Leaves(tensors, form)

    def of(self, tensors: Sequence[Tensor], others: tuple[Other | None, ...], spec: Any) -> Form:
        """The form of tensors and what stands between them."""
        kinds = tuple(map(_kind, tensors))
        key = (spec, others, kinds)
        form = self._known.get(key)
        if form is None:
            if len(self._known) > _MOST:  # plans of forms that are forgotten are made again
                self._known.clear()
            form = self._known.setdefault(key, Form(spec, others, len(kinds)))
        return form


def _kind(tensor: Tensor) -> Hashable:
    layout = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    lazy = tensor.is_conj() or tensor.is_neg()  # other numbers than its memory holds
    own = None if type(tensor) in _PLAIN else type(tensor)  # whose functions may be others
    return tensor.shape, layout, tensor.dtype, tensor.device, lazy, own


def _outline(tree: Any, tensors: list[Tensor]) -> Hashable:
    """The outline of a tree, whose tensors are added to `tensors`; quicker than by pytree."""
    kind = type(tree)
    if kind is Tensor or kind is nn.Parameter:
        tensors.append(tree)
        return None
    if kind is dict:
        return kind, *tree, *[_outline(value, tensors) for value in tree.values()]
    if kind is tuple or kind is list:
        return kind, *[_outline(value, tensors) for value in tree]
    own, others, spec = parted(tree)
    tensors += own
    return spec, others
