"""Copies of what the attributes of modules hold, made for one pass.

A twin is another object wherever a pass could write the original or reach past the pass's own modules
and tensors: containers, plain objects, bound methods, and functions that close over a module. Everything
else is shared.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from metablocks.fingerprint import cell_contents
from metablocks.generators import is_generator

_DEPTH = 5  # containers and plain objects inside each other; deeper ones are shared
_MAPPINGS = (dict, OrderedDict, defaultdict)
_MISSING = object()
_HEAP_TYPE = 1 << 9
_INTERNAL = frozenset(nn.Module().__dict__)  # attributes that every module has


class Survey:
    """The modules of a tree, those that attributes hold besides, and which attributes need a twin."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.registered = len(self.modules)
        """So many of the modules are the tree's own; the others stand in plain attributes."""
        self.tensors: dict[str, Tensor] = {}
        """Tensors that attributes hold beside parameters and buffers, by path."""
        self.generators: list[Any] = []
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

    def _attributes(self, module: nn.Module, name: str) -> list[str]:
        start = f"{name}." if name else ""
        return [
            attribute
            for attribute, value in module.__dict__.items()
            if attribute not in _INTERNAL or ("hooks" in attribute and value)
            if self._needs_twin(value, start + attribute, _DEPTH)
        ]

    def _needs_twin(self, value: Any, path: str, depth: int) -> bool:
        if value is None or isinstance(value, bool | int | float | str | type):
            return False
        if isinstance(value, Tensor):
            if id(value) not in self._own:
                self.tensors.setdefault(path, value)
            return True
        if isinstance(value, nn.Module):
            if id(value) not in self._known:
                self._known.add(id(value))
                self.modules.append(value)
            return True
        if is_generator(value):
            if not any(value is known for known in self.generators):
                self.generators.append(value)
            return False
        if not depth:
            return False
        if isinstance(value, MethodType):
            return id(value.__self__) in self._known
        inside = [
            self._needs_twin(item, f"{path}.{key}", depth - 1) for key, item in _inside(value)
        ]
        return any(inside) or isinstance(value, list | dict | set | deque) or is_plain(value)


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
    if not depth or isinstance(value, Tensor | nn.Module | type):
        return value
    kind = type(value)
    if isinstance(value, MethodType):
        owner = memo.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if isinstance(value, tuple):
        items = [twin(item, memo, depth - 1) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if kind is list:
        made = memo[id(value)] = []
        made.extend(twin(item, memo, depth - 1) for item in value)
    elif isinstance(value, dict):
        made = memo[id(value)] = copy.copy(value)
        for key, item in value.items():
            dict.__setitem__(made, key, twin(item, memo, depth - 1))
    elif isinstance(value, list | set | deque):
        made = memo[id(value)] = copy.copy(value)
    elif isinstance(value, partial):
        made = partial(
            twin(value.func, memo, depth - 1),
            *[twin(item, memo, depth - 1) for item in value.args],
            **{key: twin(item, memo, depth - 1) for key, item in value.keywords.items()},
        )
    elif isinstance(value, FunctionType):
        made = _function(value, memo)
    elif is_plain(value):
        made = memo[id(value)] = object.__new__(kind)
        attributes = {k: twin(item, memo, depth - 1) for k, item in value.__dict__.items()}
        object.__setattr__(made, "__dict__", attributes)
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


def rebound(value: Any, memo: dict[int, Any], depth: int = _DEPTH) -> Any:
    """A copied value, its functions closing over the copies of the modules that they closed over."""
    if isinstance(value, FunctionType):
        return _function(value, memo)
    if isinstance(value, partial):
        return partial(rebound(value.func, memo), *value.args, **value.keywords)
    if depth and type(value) in (list, *_MAPPINGS):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = rebound(item, memo, depth - 1)
    return value


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """The items of a value of which its twin holds twins."""
    if isinstance(value, dict):
        return [*value.items()]
    if isinstance(value, list | tuple | set | deque):
        return [*enumerate(value)]
    if isinstance(value, partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, FunctionType):
        # Only modules, tensors of the tree and methods: what else a function closes over is its own.
        return [
            (i, c)
            for i, c in enumerate(cell_contents(value))
            if isinstance(c, nn.Module | MethodType)
        ]
    return [*value.__dict__.items()] if is_plain(value) else []


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function, closing over the twins of the modules that it closes over."""
    cells = function.__closure__ or ()
    made = []
    for cell, content in zip(cells, cell_contents(function), strict=True):
        reaches = id(content) in memo or isinstance(content, MethodType)
        other = twin(content, memo) if reaches else content
        made.append(cell if other is content else CellType(other))
    if all(a is b for a, b in zip(made, cells, strict=True)):
        return function
    copied = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(made),
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def is_plain(value: Any) -> bool:
    """True for an instance of a class written in Python, with nothing but attributes."""
    kind = type(value)
    return (
        getattr(kind, "__new__", None) is object.__new__
        and bool(kind.__flags__ & _HEAP_TYPE)
        and isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, nn.Module | Tensor)
    )
