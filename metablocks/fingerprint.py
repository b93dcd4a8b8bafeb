"""Fingerprints of modules: equal ones are seen alike by a pass that runs their code as it is.

Looked at are, of every module, also of those that attributes hold, its plain attributes, flags, hooks,
submodules, and the identity, version and layout of tensors it holds beside parameters and buffers; of
functions in attributes their code, closure and defaults. Containers are looked into, other objects are
known by identity. What code reads beside that is found by `metablocks.reads`.
"""

from collections.abc import Hashable, Iterator
from contextlib import suppress
from functools import lru_cache
from types import FunctionType, MemberDescriptorType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device))
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, set, frozenset)
LONG = 100
"""The number of items of a container beyond which it is known by identity and length."""
HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)
"""The attributes of modules that hold hooks."""
_INTERNAL = {*nn.Module().__dict__} - {"training"}


class Fingerprint:
    """A module, a function or another thing as it was seen. Equal ones were seen alike.

    It keeps the objects that it knows by identity alive, so that no other can take their place.
    """

    __slots__ = ("_held", "_seen")

    def __init__(self, seen: Hashable, held: list[Any]) -> None:
        self._seen = seen
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and other._seen == self._seen

    def __hash__(self) -> int:
        return hash(self._seen)


def fingerprint(module: nn.Module) -> Fingerprint:
    """The fingerprint of a module.

    >>> layer = nn.Dropout(0.5)
    >>> before = fingerprint(layer)
    >>> layer.p = 0.1
    >>> fingerprint(layer) == before
    False
    >>> layer.p = 0.5
    >>> fingerprint(layer) == before
    True
    """
    held = Held()
    return Fingerprint(_of(module, held), held)


class Same:
    """An object, equal to itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def seen_as(value: Any, held: "Held") -> Hashable:
    """A module without what is inside it, a tensor by its version, or another object by its identity."""
    if isinstance(value, nn.Module):
        return _identity(value, held), _of_module(value, held)
    return _of_value(value, held, 0)


class Held(list[Any]):
    """The objects that a fingerprint knows by identity, and the modules it has looked at, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: set[int] = set()


def _of(module: nn.Module, held: Held) -> Hashable:
    modules = modules_in(module, {})
    held.modules |= modules.keys()
    return tuple([_of_module(module, held) for module in modules.values()])


def _identity(thing: Any, held: Held) -> int:
    held.append(thing)
    return id(thing)


def modules_in(module: nn.Module, found: dict[int, nn.Module]) -> dict[int, nn.Module]:
    """A module and those inside it, by id; quicker than `modules()`, which makes names."""
    if id(module) not in found:
        found[id(module)] = module
        for child in module._modules.values():
            if child is not None:
                modules_in(child, found)
    return found


def _of_module(module: nn.Module, held: Held) -> Hashable:
    own = attributes_of(module)
    hooks = [
        _of_value(hook, held)
        for name in HOOKS
        if (hooks_of := own.get(name))
        for hook in hooks_of.values()
    ]
    return (
        type(module),
        tuple([(name, _of_value(v, held)) for name, v in own.items() if name not in _INTERNAL]),
        tuple([(name, p is None or id(p)) for name, p in module._parameters.items()]),
        tuple([(name, buffer is None) for name, buffer in module._buffers.items()]),
        tuple([(name, _identity(child, held)) for name, child in module._modules.items()]),
        tuple(hooks),
    )


def attributes_of(thing: Any) -> dict[str, Any]:
    """The attributes of an object by name: those of its `__dict__`, and what stands in slots.

    >>> class Point:
    ...     __slots__ = ("x", "y")
    >>> point = Point()
    >>> point.x = 1
    >>> attributes_of(point)
    {'x': 1}
    """
    own = getattr(thing, "__dict__", None)
    attributes = own if isinstance(own, dict) else {}
    for name, slot in slots_of(type(thing)).items():
        with suppress(AttributeError):  # which has no value yet
            attributes = attributes | {name: slot.__get__(thing)}
    return attributes


def slots_of(kind: type) -> dict[str, MemberDescriptorType]:
    """The slots of a class, as far as it is written in Python, by name."""
    return _slots_of(cast(Any, kind))


@lru_cache(maxsize=256)
def _slots_of(kind: Any) -> dict[str, MemberDescriptorType]:
    return {
        name: member
        for base in reversed(kind.__mro__)
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, MemberDescriptorType)
    }


def plainly(value: Any) -> Hashable:
    """A plain value by its type, and a zero by its sign.

    >>> plainly(1) == plainly(1.0), plainly(0.0) == plainly(-0.0)
    (False, False)
    """
    return type(value), value, None if value else repr(value)


def _layout(tensor: Tensor) -> Hashable:
    """Shape, strides, dtype and device, which `tensor.data = other` may change."""
    with suppress(RuntimeError, ValueError):  # of nested tensors, and of lazy ones without a shape
        strides = tensor.stride() if tensor.layout is torch.strided else tensor.layout
        return tensor.shape, strides, tensor.dtype, tensor.device
    return None


def _of_function(function: FunctionType, held: Held, depth: int) -> Hashable:
    values = tuple([_of_value(value, held, depth) for value in held_by(function)])
    return _identity(function, held), function.__code__, values


def held_by(function: FunctionType) -> list[Any]:
    """The values that a function closes over, and its defaults.

    >>> held_by(lambda x=1, *, y=2: x + y)
    [1, 2]
    """
    named = (function.__kwdefaults__ or {}).values()
    return [*cell_contents(function), *(function.__defaults__ or ()), *named]


def cell_contents(function: FunctionType) -> Iterator[Any]:
    """The values that a function closes over, in the order of its free variables."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield None


def _of_value(value: Any, held: Held, depth: int = 3) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return plainly(value)
    if isinstance(value, Tensor):
        moves = isinstance(value, nn.Parameter) or value.is_inference()
        return _identity(value, held), None if moves else value._version, _layout(value)
    for base in _CONTAINERS:  # as the base has it: no method of a subclass is called
        if issubclass(kind, base):
            size = base.__len__(value)
            if depth and size <= LONG:
                items = dict.items(value) if base is dict else base.__iter__(value)
                return kind, tuple([_of_value(item, held, depth - 1) for item in items])
            return _identity(value, held), size
    if issubclass(kind, nn.Module) and id(value) not in held.modules:
        return _identity(value, held), _of(value, held)  # that stands in an attribute alone
    if kind is FunctionType and depth:
        return _of_function(value, held, depth - 1)
    if kind is MethodType:
        return _identity(value.__func__, held), _identity(value.__self__, held)
    return _identity(value, held)
