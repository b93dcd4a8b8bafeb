"""Fingerprints of modules and functions: equal values, equal behaviour, as far as they look.

Looked at are, of every module, its plain attributes, flags, hooks, submodules, and the identity and
version of tensors it holds beside parameters and buffers; of a function its code, closure, defaults,
and the globals that it names, with those of their attributes that it names. Containers are looked into,
other objects are known by identity. Nothing deeper: what changes inside an object that a module holds,
or in functions that a function calls, is not seen.
"""

from collections.abc import Hashable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_LONG = 100  # items of a container beyond which it is known by identity and length
_HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)
_INTERNAL = {*nn.Module().__dict__} - {"training"}


def fingerprint(thing: Any) -> Hashable:
    """The fingerprint of a module, a function or another callable.

    >>> layer = nn.Dropout(0.5)
    >>> before = fingerprint(layer)
    >>> layer.p = 0.1
    >>> fingerprint(layer) == before
    False
    >>> layer.p = 0.5
    >>> fingerprint(layer) == before
    True
    """
    if isinstance(thing, nn.Module):
        return tuple(_of_module(module) for module in thing.modules())
    if isinstance(thing, MethodType):
        return fingerprint(thing.__func__), fingerprint(thing.__self__)
    if isinstance(thing, FunctionType):
        return _of_function(thing, named=True)
    if isinstance(thing, partial):
        return fingerprint(thing.func), tuple(
            fingerprint(x) if callable(x) else _of_value(x)
            for x in (*thing.args, *thing.keywords.values())
        )
    attributes = getattr(thing, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(thing, type | ModuleType):
        return (Same(thing), *((name, _of_value(value)) for name, value in attributes.items()))
    return _of_value(thing)


class Same:
    """An object, equal to itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _of_module(module: nn.Module) -> Hashable:
    own = module.__dict__
    hooks = [_of_value(hook) for name in _HOOKS for hook in (own.get(name) or {}).values()]
    return (
        type(module),
        tuple((name, _of_value(v)) for name, v in own.items() if name not in _INTERNAL),
        tuple((name, None if p is None else id(p)) for name, p in module._parameters.items()),
        tuple((name, buffer is None) for name, buffer in module._buffers.items()),
        tuple((name, Same(child)) for name, child in module._modules.items()),
        tuple(hooks),
    )


def _of_function(function: FunctionType, *, named: bool = False) -> Hashable:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return (
        function.__code__,
        tuple(_of_value(value) for value in defaults),
        tuple(_read(value) if named else _of_value(value, 2) for value in cell_contents(function)),
        tuple(_globals(function)) if named else Same(function),
    )


def cell_contents(function: FunctionType) -> Iterator[Any]:
    """The values that a function closes over, in the order of its free variables."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield None


def _globals(function: FunctionType) -> Iterator[Hashable]:
    """The globals that a function names, and those of their attributes that it names."""
    names = set(_names(function.__code__))
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        yield name, _read(value)
        attributes = {} if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
        for attribute in sorted(names & attributes.keys()):
            yield name, attribute, _read(attributes[attribute])


def _read(value: Any) -> Hashable:
    """Of what a loss or a rule reads by itself: of a module all."""
    return fingerprint(value) if isinstance(value, nn.Module) else _of_value(value, 2)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _of_value(value: Any, depth: int = 3) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, Tensor):
        moves = isinstance(value, nn.Parameter) or value.is_inference()
        return Same(value), None if moves else value._version
    if isinstance(value, list | tuple | dict | set | frozenset):
        if depth and len(value) <= _LONG:
            items = value.items() if isinstance(value, dict) else value
            return kind, tuple(_of_value(item, depth - 1) for item in items)
        return Same(value), len(value)
    if kind is FunctionType and depth:
        return _of_function(value)
    if kind is MethodType:
        return Same(value.__func__), Same(value.__self__)
    return Same(value)
