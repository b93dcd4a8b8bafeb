"""Values that functions, modules and objects read, as their code shows.

Looked at are the globals that code names, what it closes over and its defaults, and those attributes of
the objects and classes found on the way that code found on the way names; and all of that again for the
functions, methods and objects that these are. Containers are looked into. Not seen is what is named in
no code (an attribute whose name is put together, a file, the clock), what C++ keeps, and globals of
installed packages.
"""

import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Hashable, Iterable
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from metablocks.fingerprint import (
    HOOKS,
    LONG,
    PLAIN,
    Fingerprint,
    Held,
    attributes_of,
    held_by,
    modules_in,
    seen_as,
)

_DEPTH = 8  # calls, attributes and containers inside each other
_MOST = 3000  # values; what lies beyond is not looked into
_DYNAMIC = frozenset(("getattr", "vars", "__dict__", "asdict"))  # whose names code may put together
_ANY = frozenset(("__getattr__", "__getitem__"))  # of an object that has attributes by other names
_PACKAGE = __file__.removesuffix("reads.py")
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_NUMBERS = (Tensor, np.ndarray)
_CALLED = (FunctionType, MethodType, partial)
_SETTINGS = (Namespace, SimpleNamespace)
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]


def reading(*things: Any, known: Iterable[nn.Module] = ()) -> Fingerprint:
    """The fingerprint of all that things read: equal ones read equal values.

    Modules that are `known` by fingerprints of their own are looked at for what these do not see.

    >>> settings = {"scale": 1.0}
    >>> def scaled(x):
    ...     return x * settings["scale"]
    >>> before = reading(lambda x: scaled(x))
    >>> settings["scale"] = 2.0
    >>> reading(lambda x: scaled(x)) == before
    False
    """
    held, values = Held(), reached(*things, known=known)
    return Fingerprint(tuple([_known(value, held) for value in values]), [*held, *values])


def reached(*things: Any, known: Iterable[nn.Module] = ()) -> list[Any]:
    """The values that things read, in one order.

    >>> rate = 0.25
    >>> 0.25 in reached(lambda x: rate * x)
    True
    """
    return _Reads(known, things).found


class _Reads:
    """The values found so far, and where to look on."""

    def __init__(self, known: Iterable[nn.Module], things: Iterable[Any]) -> None:
        self.found: list[Any] = []
        self.seen: set[Hashable] = set()
        self.names = {"forward", "init"}  # the methods of modules that are called from outside
        self.owners: list[tuple[Any, bool, int]] = []
        self.done: dict[tuple[int, int], set[str]] = {}  # names, by the owner and where it has them
        self.known: dict[int, nn.Module] = {}
        for module in known:
            modules_in(module, self.known)
        for thing in (*known, *things):
            self.look(thing, _DEPTH, every=True)
        before = -1, -1
        while before != (before := (len(self.names), len(self.owners))):
            for owner, every, depth in self.owners:  # which grows meanwhile
                self.members(owner, depth, every=every)

    def look(self, value: Any, depth: int, *, every: bool = False) -> None:
        """Look at a value, and later at its attributes that are named, or at `every` one."""
        kind = type(value)
        if not isinstance(value, nn.Module):
            self.found.append(value)
        if kind in PLAIN or isinstance(value, _NUMBERS):
            return
        key = id(value), every
        if not depth or key in self.seen or len(self.found) > _MOST:
            return
        self.seen.add(key)
        depth -= 1
        if isinstance(value, _CONTAINERS):
            items = (*value, *value.values()) if isinstance(value, dict) else value
            for item in items if len(value) <= LONG else ():
                self.look(item, depth, every=every)
        elif kind is FunctionType:
            self.read(value, None, depth)
        elif kind is MethodType:
            if isinstance(value.__self__, nn.Module):
                self.look(value.__self__, depth)
            if isinstance(value.__func__, FunctionType):
                self.read(value.__func__, value.__self__, depth)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.look(part, depth, every=every)
        elif isinstance(value, nn.Module):
            for hook in (hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()):
                self.look(hook, depth, every=True)
            for module in modules_in(value, {}).values():
                self.module(module, depth)
        else:
            place = value.__name__ if isinstance(value, ModuleType) else kind.__module__
            place = value.__module__ if isinstance(value, type) else place
            if kind in _SETTINGS or not _is_library(place):
                self.owns(value, depth, every=every and not isinstance(value, ModuleType))

    def read(self, function: FunctionType, owner: Any, depth: int) -> None:
        """Look at what a function reads, as a method of `owner` if that is given."""
        key = id(function), id(owner)
        if key in self.seen or (_is_library(function.__module__) and not function.__closure__):
            return
        self.seen.add(key)
        self.found.append(function.__code__)
        names, own = names_in(function.__code__), function.__dict__
        self.names |= names
        installed = _is_installed(function.__code__.co_filename)
        every = not installed and not names.isdisjoint(_DYNAMIC)
        values = [*held_by(function), *(own[name] for name in own if name in names)]
        if not installed:
            known = function.__globals__
            values += [known[name] for name in names if name in known]
        for value in values:
            self.look(value, depth, every=every)
        if isinstance(wrapped := own.get("__wrapped__"), FunctionType):
            self.read(wrapped, owner, depth)
        if owner is not None:
            self.owns(owner, depth, every=every and not isinstance(owner, nn.Module))

    def owns(self, owner: Any, depth: int, *, every: bool = False) -> None:
        """Look at attributes of an object later."""
        key = id(owner), "owner", every
        if key not in self.seen:
            self.seen.add(key)
            self.owners.append((owner, every, depth))

    def members(self, owner: Any, depth: int, *, every: bool) -> None:
        """Look at attributes of an object, and of its class as far as that is a user's."""
        kind = owner if isinstance(owner, type) else type(owner)
        bases = _written(kind)
        if not isinstance(owner, nn.Module):
            every |= any(not _ANY.isdisjoint(vars(base)) for base in bases)
        places = [] if owner is kind else [attributes_of(owner)]
        for number, place in enumerate((*places, *map(vars, bases))):
            inside = number >= len(places)  # in a class
            named = self.names.intersection(place)
            if every:
                named |= {name for name in place if not (inside and name[:2] == "__")}
            if "__call__" in place and owner is not kind:
                named.add("__call__")
            done = self.done.setdefault((id(owner), number), set())
            for name in named - done:
                done.add(name)
                value = place[name]
                if isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                elif isinstance(value, property):
                    value = value.fget
                elif isinstance(value, functools.cached_property):
                    value = value.func
                if inside and isinstance(value, FunctionType):
                    self.read(value, owner, depth)
                else:
                    self.look(value, depth, every=every)

    def module(self, module: nn.Module, depth: int) -> None:
        """Look at one module without those inside it: functions, hooks, class; itself unless known."""
        own = vars(module)
        if id(module) not in self.known:
            self.found.append(module)
            self.found += [*own["_parameters"].values(), *own["_buffers"].values()]
        for name in HOOKS:
            for hook in (own.get(name) or {}).values():
                self.look(hook, depth, every=True)
        for value in [*own.values()]:
            if isinstance(value, _CALLED):
                self.look(value, depth)
        kind: Any = type(module)
        if _written(kind):
            self.owns(module, depth)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The names that code reads, also those of functions in it, and words in it that may be names."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    words = [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]
    return frozenset((*code.co_names, *words)).union(*inner)


def _known(value: Any, held: Held) -> Hashable:
    """The part of a value that is to be equal; what it holds is found apart."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is FunctionType:
        return id(value.__code__)
    if kind is MethodType:
        return id(value.__func__), id(value.__self__)
    if isinstance(value, partial):
        return kind.__name__
    if isinstance(value, _CONTAINERS):
        return kind, len(value), id(value) if len(value) > LONG else None
    if kind is np.ndarray:
        return id(value), value.tobytes() if value.size <= LONG else None
    return seen_as(value, held)


@lru_cache(maxsize=1024)
def _written(kind: Any) -> tuple[type, ...]:
    """The classes among a class and its bases that are neither a library's nor this package's."""
    own = __name__.partition(".")[0]
    return tuple(
        base
        for base in kind.__mro__
        if not _is_library(base.__module__) and base.__module__.partition(".")[0] != own
    )


@lru_cache(maxsize=4096)
def _is_library(module: str) -> bool:
    """True for PyTorch, NumPy and the standard library, whose code reads nothing of a user's."""
    top = str(module).partition(".")[0]
    return top in ("torch", "numpy") or top in sys.stdlib_module_names


def _is_installed(file: str) -> bool:
    """True for code of packages of others and of this one, whose globals stay as they are."""
    return "-packages" in file or file.startswith(_PACKAGE)
