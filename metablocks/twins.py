"""Copies of what the attributes of modules hold, made for one pass.

A twin is another object wherever a pass could write the original or reach past the pass's own modules
and tensors: containers, arrays, plain objects, bound methods, weak references, and functions that hold a
module in a closure or a default. Everything else is shared.
"""

import copy
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from metablocks.errors import ModuleError
from metablocks.fingerprint import attributes_of, cell_contents, held_by, slots_of
from metablocks.generators import is_generator
from metablocks.reads import reached

_DEPTH = 5  # containers and plain objects inside each other; deeper ones are shared
_MISSING = object()
_HEAP_TYPE = 1 << 9
_INTERNAL = frozenset(nn.Module().__dict__)  # attributes that every module has
_CONTAINERS = (list, dict, set, deque)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)


class Survey:
    """The modules of a tree, those that attributes hold besides, and which attributes need a twin."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.registered = len(self.modules)
        """So many of the modules are the tree's own; the others stand in plain attributes."""
        self.tensors: dict[str, Tensor] = {}
        """Tensors that attributes hold beside parameters and buffers, by path."""
        self.generators: list[Any] = []
        self.iterators: dict[str, Any] = {}
        """Iterators that attributes hold, by path."""
        self.special: list[list[str]] = []
        """For each module, the attributes that need a twin."""
        self._known = {id(module) for module in self.modules}
        names = {id(module): name for name, module in root.named_modules()}
        self._own = {
            id(tensor)
            for module in self.modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
        }
        for module in self.modules:  # which grows under way
            self.special.append(self._attributes(module, names.get(id(module), "")))
        self._add(generators_in(root))

    def _attributes(self, module: nn.Module, name: str) -> list[str]:
        start = f"{name}." if name else ""
        values = _class_attributes(type(module)) | attributes_of(module)
        return [
            attribute
            for attribute, value in values.items()
            if attribute not in _INTERNAL or ("hooks" in attribute and value)
            if self._needs_twin(value, start + attribute, _DEPTH)
        ]

    def _needs_twin(self, value: Any, path: str, depth: int) -> bool:
        if value is None or isinstance(value, bool | float | str | type):
            return False
        if type(value) is int:  # the id of a module or a tensor, it may be
            return value in self._known or value in self._own
        referent = referent_of(value)
        if referent is not None:
            return id(referent) in self._known
        if isinstance(value, Tensor):
            if id(value) not in self._own:
                self.tensors.setdefault(path, value)
            return True
        if isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in self._known:
                    self._known.add(id(module))
                    self.modules.append(module)
            return True
        if is_generator(value):
            self._add([value])
            return False
        if is_iterator(value):
            self.iterators.setdefault(path, value)
            return True
        if not depth:
            return False
        if isinstance(value, FunctionType):
            self._add(generators_in(value))
        inside = [
            self._needs_twin(item, f"{path}.{key}", depth - 1) for key, item in _inside(value)
        ]
        return any(inside) or _is_store(value) or is_plain(value)

    def _add(self, generators: Iterable[Any]) -> None:
        for generator in generators:
            if not any(generator is known for known in self.generators):
                self.generators.append(generator)


class Once:
    """Stands for an iterator, which no later pass could begin with as this one did."""

    def __init__(self, path: str, iterator: Any) -> None:
        self.path = path
        self.kind = type(iterator).__name__

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise ModuleError(
            f"a pass takes the next item of {self.path}, a {self.kind}: each pass begins with the "
            "module as it is, and an iterator cannot be put back. Hold a list and an index, or a random "
            "generator"
        )


def twin(value: Any, memo: dict[int, Any], depth: int = _DEPTH) -> Any:
    """The twin of a value. `memo` gives those of modules and tensors, by the id of the original.

    >>> value = [1, {"a": [2]}]
    >>> made = twin(value, {})
    >>> made == value, made[1]["a"] is value[1]["a"]
    (True, False)
    """
    made = memo.get(id(value), _MISSING)
    if made is not _MISSING:
        return made
    kind = type(value)
    if kind is int and value in memo:  # an id
        return id(memo[value])
    if (referent := referent_of(value)) is not None:
        other = memo.get(id(referent))
        if other is None:
            return value
        return weakref.proxy(other) if kind in _PROXIES else kind(other)
    if not depth or isinstance(value, Tensor | nn.Module | type):
        return value
    if isinstance(value, MethodType):
        owner = twin(value.__self__, memo, depth - 1)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, tuple | frozenset):
        items = [twin(item, memo, depth - 1) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, FunctionType):
        return _function(value, memo, depth)
    if isinstance(value, _CONTAINERS):
        made = memo[id(value)] = copy.copy(value)
        _refill(made, value, memo, depth - 1)
    elif _is_buffer(value):
        made = memo[id(value)] = copy.copy(value)
    elif isinstance(value, partial):
        made = partial(
            twin(value.func, memo, depth - 1),
            *[twin(item, memo, depth - 1) for item in value.args],
            **{key: twin(item, memo, depth - 1) for key, item in value.keywords.items()},
        )
    elif isinstance(value, SimpleNamespace):
        made = memo[id(value)] = copy.copy(value)
        made.__dict__.update({k: twin(x, memo, depth - 1) for k, x in value.__dict__.items()})
    elif is_plain(value):
        made = memo[id(value)] = object.__new__(kind)
        members = slots_of(kind)
        for name, item in attributes_of(value).items():
            other = twin(item, memo, depth - 1)
            if name in members:
                members[name].__set__(made, other)
            else:
                made.__dict__[name] = other
    else:
        made = value
    return made


def tensors_in(value: Any, depth: int = _DEPTH) -> dict[int, Tensor]:
    """The tensors that a value holds and `twin` would replace, by id, in one order.

    >>> import torch
    >>> list(tensors_in({"a": [1], "b": (torch.ones(1),)}).values())
    [tensor([1.])]
    """
    if isinstance(value, Tensor):
        return {id(value): value}
    if not depth or isinstance(value, nn.Module | type):
        return {}
    found: dict[int, Tensor] = {}
    for _, item in _inside(value):
        found |= tensors_in(item, depth - 1)
    return found


def generators_in(value: Any) -> list[Any]:
    """The random generators that the code of a function, an object or a module reads.

    >>> import random
    >>> own = random.Random(0)
    >>> generators_in(lambda: own.random()) == [own]
    True
    """
    return [*{id(found): found for found in reached(value) if is_generator(found)}.values()]


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """The items of a value of which its twin holds twins."""
    if isinstance(value, dict):
        keys = [("key", key) for key in value if not isinstance(key, str | int)]
        return [*value.items(), *keys]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*enumerate(value)]
    if isinstance(value, partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, MethodType):
        return [("self", value.__self__)]
    if isinstance(value, FunctionType):
        return [*enumerate(item for item in held_by(value) if _reaches(item))]
    if isinstance(value, SimpleNamespace) or is_plain(value):
        return [*attributes_of(value).items()]
    return []


def _refill(made: Any, value: Any, memo: dict[int, Any], depth: int) -> None:
    """Put twins into a copied container, in the places of what it holds."""
    if isinstance(value, dict):
        pairs = [(twin(k, memo, 0), twin(item, memo, depth)) for k, item in value.items()]
        if any(new is not old for (new, _), old in zip(pairs, value, strict=True)):
            made.clear()
        for key, item in pairs:
            dict.__setitem__(made, key, item)
        return
    items = [twin(item, memo, depth) for item in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return
    if isinstance(value, set):
        made.clear()
        made.update(items)
        return
    for index, item in enumerate(items):
        made[index] = item


def _reaches(item: Any) -> bool:
    """True for what a function holds that may reach a module: all else is the function's own."""
    owner = item.__self__ if isinstance(item, MethodType) else item
    return isinstance(owner, nn.Module | FunctionType) or referent_of(item) is not None


def _function(function: FunctionType, memo: dict[int, Any], depth: int) -> FunctionType:
    """The function, holding the twins of the modules that it closes over or has for defaults."""
    if not function.__closure__ and not function.__defaults__ and not function.__kwdefaults__:
        return function

    def other(item: Any) -> Any:
        if item is function:
            return item
        return twin(item, memo, depth - 1) if id(item) in memo or _reaches(item) else item

    contents = [*cell_contents(function)]
    inside = [*map(other, contents)]
    defaults = [*map(other, function.__defaults__ or ())]
    named = {name: other(item) for name, item in (function.__kwdefaults__ or {}).items()}
    if all(
        a is b
        for a, b in zip((*inside, *defaults, *named.values()), held_by(function), strict=True)
    ):
        return function
    cells = [
        cell if new is old and old is not function else CellType(new)
        for cell, old, new in zip(function.__closure__ or (), contents, inside, strict=True)
    ]
    copied = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        tuple(defaults) or None,
        tuple(cells),
    )
    for cell, old in zip(cells, contents, strict=True):
        if old is function:
            cell.cell_contents = copied
    copied.__kwdefaults__ = named or None
    copied.__dict__.update(function.__dict__)
    return copied


def _class_attributes(kind: type) -> dict[str, Any]:
    """The attributes of a user's class that a pass could write by way of `self`."""
    return {
        name: value
        for base in reversed(kind.__mro__)
        if not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if not name.startswith("__") and (isinstance(value, Tensor) or _is_store(value))
    }


def referent_of(value: Any) -> Any:
    """The object that a weak reference refers to; None for anything else."""
    if isinstance(value, weakref.ref):
        return value()
    if type(value) in _PROXIES:
        try:
            return value.__init__.__self__
        except ReferenceError:
            return None
    return None


def _is_store(value: Any) -> bool:
    """True for what others write into: containers, namespaces, arrays."""
    return isinstance(value, (*_CONTAINERS, SimpleNamespace)) or _is_buffer(value)


def _is_buffer(value: Any) -> bool:
    """True for numbers of Python or NumPy in a row that can be written."""
    if isinstance(value, np.ndarray):
        return value.flags.writeable and not isinstance(value, np.memmap)
    return isinstance(value, bytearray | array)


def is_iterator(value: Any) -> bool:
    """True for an iterator of Python's, whose items come once.

    >>> is_iterator(iter([1])), is_iterator([1])
    (True, False)
    """
    kind = type(value)
    return kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__")


def is_plain(value: Any) -> bool:
    """True for an instance of a class written in Python, with nothing but attributes."""
    kind = type(value)
    return (
        getattr(kind, "__new__", None) is object.__new__
        and bool(kind.__flags__ & _HEAP_TYPE)
        and (
            isinstance(getattr(value, "__dict__", None), dict)
            or all("__slots__" in vars(base) for base in kind.__mro__[:-1])
        )
        and not isinstance(value, nn.Module | Tensor)
    )
