"""Values that functions, modules and objects read, as their code shows.

Looked at are the globals that code names, what it closes over and its defaults, attributes of the object
that a method belongs to and of its class, and all of that again for the functions, methods and objects
found on the way, as far as the code at hand names their attributes. Containers are looked into. Not
seen is what is named in no code (an attribute whose name is put together, a file, the clock), what C++
keeps, and globals of installed packages.
"""

import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from metablocks.fingerprint import (
    HOOKS,
    PLAIN,
    Fingerprint,
    Held,
    attributes_of,
    cell_contents,
    modules_in,
    seen_as,
)

_DEPTH = 8  # calls, attributes and containers inside each other
_MOST = 3000  # values; what lies beyond is not looked into
_LONG = 100  # items of a container, numbers of an array, beyond which it is known by identity
_ENTRIES = frozenset(("forward", "init"))  # the methods of a module that are called from outside
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
    reads = _Reads(known)
    for thing in (*known, *things):
        reads.look(thing, None, _DEPTH)
    return reads.found


class _Reads:
    """What was found so far."""

    def __init__(self, known: Iterable[nn.Module]) -> None:
        self.found: list[Any] = []
        self.seen: set[Hashable] = set()
        self.known: dict[int, nn.Module] = {}
        for module in known:
            modules_in(module, self.known)

    def look(self, value: Any, names: frozenset[str] | None, depth: int) -> None:
        """Look at a value, at those of its attributes that are named (None: at all)."""
        kind = type(value)
        if not isinstance(value, nn.Module):
            self.found.append(value)
        if kind in PLAIN or isinstance(value, _NUMBERS):
            return
        key = id(value), names
        if not depth or key in self.seen or len(self.found) > _MOST:
            return
        self.seen.add(key)
        depth -= 1
        if isinstance(value, _CONTAINERS):
            items = (*value, *value.values()) if isinstance(value, dict) else value
            for item in items if len(value) <= _LONG else ():
                self.look(item, names, depth)
        elif kind is FunctionType:
            self.read(value, None, depth)
        elif kind is MethodType:
            owner = value.__self__
            if isinstance(owner, nn.Module):
                self.look(owner, None, depth)
            if isinstance(value.__func__, FunctionType):
                self.read(value.__func__, owner, depth)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.look(part, names, depth)
        elif isinstance(value, nn.Module):
            for hook in (hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()):
                self.look(hook, None, depth)
            for module in modules_in(value, {}).values():
                self.module(module, depth)
        elif isinstance(value, ModuleType):
            if names is not None and not _is_library(value.__name__):
                self.named(vars(value), names, names, depth)
        elif kind in _SETTINGS or not _is_library(
            (value if isinstance(value, type) else kind).__module__
        ):
            self.members(value, names, depth)

    def read(self, function: FunctionType, owner: Any, depth: int) -> None:
        """Look at what a function reads, as a method of `owner` if that is given."""
        key = id(function), id(owner)
        if key in self.seen or (_is_library(function.__module__) and not function.__closure__):
            return
        self.seen.add(key)
        self.found.append(function.__code__)
        named = names_in(function.__code__)
        installed = _is_installed(function.__code__.co_filename)
        names = (
            named if installed or not named & _DYNAMIC else None
        )  # of attributes of what it reads
        inside = function.__defaults__, (function.__kwdefaults__ or {}).values()
        for value in (*(inside[0] or ()), *inside[1], *cell_contents(function)):
            self.look(value, names, depth)
        if function.__dict__:
            self.named(function.__dict__, named, names, depth)
            if isinstance(wrapped := function.__dict__.get("__wrapped__"), FunctionType):
                self.read(wrapped, owner, depth)
        if not installed:
            self.named(function.__globals__, named, names, depth)
        if owner is not None:
            self.members(owner, named if isinstance(owner, nn.Module) else names, depth)

    def members(self, owner: Any, names: frozenset[str] | None, depth: int) -> None:
        """Look at the attributes of an object, and of its class as far as that is a user's."""
        kind = owner if isinstance(owner, type) else type(owner)
        bases = _written(kind)
        if not isinstance(owner, nn.Module) and any(_ANY & vars(base).keys() for base in bases):
            names = None
        if owner is not kind:
            self.named(attributes_of(owner), names, names, depth)
        for base in bases:
            own = vars(base)
            inside = names
            if inside is None:
                inside = frozenset(n for n in own if n == "__call__" or not n.startswith("__"))
            elif "__call__" in own and owner is not kind:
                inside = inside | {"__call__"}
            self.named(own, inside, names, depth, owner)

    def named(
        self,
        values: Mapping[str, Any],
        which: frozenset[str] | None,
        names: frozenset[str] | None,
        depth: int,
        owner: Any = None,
    ) -> None:
        """Look at the values of these names; functions among them are methods of `owner`."""
        for name in values if which is None else which:
            if name not in values:
                continue
            value = values[name]
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            elif isinstance(value, functools.cached_property):
                value = value.func
            if owner is not None and isinstance(value, FunctionType):
                self.read(value, owner, depth)
            else:
                self.look(value, names, depth)

    def module(self, module: nn.Module, depth: int) -> None:
        """Look at one module without those inside it: functions, hooks, class; itself unless known."""
        own = vars(module)
        if id(module) not in self.known:
            self.found.append(module)
            self.found += [*own["_parameters"].values(), *own["_buffers"].values()]
        for name in HOOKS:
            for hook in (own.get(name) or {}).values():
                self.look(hook, None, depth)
        for value in [*own.values()]:
            if isinstance(value, _CALLED):
                self.look(value, None, depth)
        kind: Any = type(module)
        if _written(kind):
            self.members(module, _ENTRIES, depth)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The names that code reads, also those of functions in it, and words in it that may be names."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    words = [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]
    return frozenset((*code.co_names, *words)).union(*inner)


def _known(value: Any, held: Held) -> Hashable:
    """What of a value is to be equal; what it holds is found apart."""
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
        return kind, len(value), id(value) if len(value) > _LONG else None
    if kind is np.ndarray:
        return id(value), value.tobytes() if value.size <= _LONG else None
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
