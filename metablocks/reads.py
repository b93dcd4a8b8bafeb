"""Values that functions, modules and objects read, as their code shows.

Looked at are the globals that code names, what it closes over and its defaults, and those attributes of
the objects and classes found on the way that code found on the way names; and all of that again for the
functions, methods and objects that these are. What Python calls by itself of a user's class counts as
named: operators, descriptors, `with`, `for`. Containers are looked into, the standard library's too. Not
seen is what is named in no code (an attribute whose name is put together, a file, the environment, the
clock), what C++ keeps, and globals of installed packages.
"""

import dis
import functools
import sys
import threading
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from importlib.util import resolve_name
from operator import attrgetter, methodcaller
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, cast

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
    plainly,
    seen_as,
)

_MOST = 10_000  # values
_DYNAMIC = frozenset(("getattr", "vars", "__dict__", "asdict", "astuple"))  # names not in the code
_ANY = frozenset(("__getattr__", "__getitem__"))  # of an object that has attributes by other names
_PACKAGE = __file__.removesuffix("reads.py")
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_ABSTRACT = (Mapping, Sequence, Set)
_NUMBERS = (Tensor, np.ndarray)
_CALLED = (FunctionType, MethodType, partial)
_SETTINGS = (Namespace, SimpleNamespace, threading.local)
_CACHED = type(lru_cache(len))
_NAMING = (attrgetter, methodcaller)
_MADE = frozenset(("__init__", "__new__", "__post_init__"))  # called where a class makes an object
_UNASKED = _MADE | {  # not called by Python itself where an object is used
    *("__del__", "__setattr__", "__delattr__", "__repr__", "__dir__", "__sizeof__"),
    *("__init_subclass__", "__class_getitem__", "__set_name__", "__subclasshook__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]


def reading(*things: Any, known: Iterable[nn.Module] = ()) -> Fingerprint:
    """The fingerprint of all that things read: equal ones read equal values.

    Modules that are `known` by fingerprints of their own are looked at for what these do not see.
    Raises `Unbounded` if that is too much to look at.

    >>> settings = {"scale": 1.0}
    >>> def scaled(x):
    ...     return x * settings["scale"]
    >>> before = reading(lambda x: scaled(x))
    >>> settings["scale"] = 2.0
    >>> reading(lambda x: scaled(x)) == before
    False
    """
    held, values = Held(), reached(*things, known=known)
    if len(values) > _MOST:
        raise Unbounded(
            f"its code reaches more than {_MOST} values that may change from call to call; give it what "
            "it reads, not what holds everything"
        )
    return Fingerprint(tuple([_known(value, held) for value in values]), [*held, *values])


def reached(*things: Any, known: Iterable[nn.Module] = ()) -> list[Any]:
    """The values that things read, in one order; not all if they are very many.

    >>> rate = 0.25
    >>> 0.25 in reached(lambda x: rate * x)
    True
    """
    return _Reads(known, things).found


class Unbounded(Exception):  # noqa: N818  (a reason, which becomes a warning)
    """The reason that not all that code reads is looked at."""


class _Reads:
    """The values found so far, and where to look on."""

    def __init__(self, known: Iterable[nn.Module], things: Iterable[Any]) -> None:
        self.found: list[Any] = []
        self.seen: set[Hashable] = set()
        self.names = {"forward", "init"}  # the methods of modules that are called from outside
        self.owners: list[tuple[Any, bool]] = []
        self.done: dict[tuple[int, int], set[str]] = {}  # names, by the owner and where it has them
        self.known: dict[int, nn.Module] = {}
        for module in known:
            modules_in(module, self.known)
        self.waiting = deque((thing, True) for thing in (*known, *things))
        before = -1, -1
        while self.waiting or before != (before := (len(self.names), len(self.owners))):
            for owner, every in self.owners:  # which grows meanwhile
                self.members(owner, every=every)
            while self.waiting:
                value, every = self.waiting.popleft()
                self.visit(value, every=every)
                if len(self.found) > _MOST:
                    return

    def look(self, value: Any, *, every: bool = False) -> None:
        """Look at a value later, and at its attributes that are named, or at `every` one."""
        self.waiting.append((value, every))

    def visit(self, value: Any, *, every: bool) -> None:
        """Look at a value now."""
        kind = type(value)
        if not isinstance(value, nn.Module):
            self.found.append(value)
        if kind in PLAIN or isinstance(value, _NUMBERS):
            return
        key = id(value), every
        if key in self.seen:
            return
        self.seen.add(key)
        if isinstance(value, _CONTAINERS):
            self.items(value, every=every)
            if _written(cast(Any, kind)):
                self.owns(value, every=every)
        elif kind is FunctionType:
            self.read(value, None)
        elif kind is MethodType:
            if isinstance(value.__self__, nn.Module):
                self.look(value.__self__)
            if isinstance(value.__func__, FunctionType):
                self.read(value.__func__, value.__self__)
        elif isinstance(value, partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.look(part, every=every)
        elif isinstance(value, nn.Module):
            for hook in (hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()):
                self.look(hook, every=True)
            for module in modules_in(value, {}).values():
                self.module(module)
        elif isinstance(value, _NAMING):
            self.names |= {part for name in _named_by(value) for part in name.split(".")}
        elif isinstance(value, ContextVar):
            self.look(value.get(None), every=every)
        elif isinstance(value, weakref.ref):
            self.look(value(), every=every)
        elif isinstance(value, _CACHED):
            self.look(value.__wrapped__)
        else:
            place = value.__name__ if isinstance(value, ModuleType) else kind.__module__
            place = value.__module__ if isinstance(value, type) else place
            if kind in _SETTINGS or not _is_library(place):
                self.owns(value, every=every and not isinstance(value, ModuleType))
            elif isinstance(value, _ABSTRACT) and kind is not range:
                self.items(value, every=every)

    def items(self, value: Any, *, every: bool) -> None:
        """Look at what a container holds."""
        for item in value if len(value) <= LONG else ():
            self.look(item, every=every)
            if isinstance(value, Mapping):
                self.look(value[item], every=every)

    def read(self, function: FunctionType, owner: Any) -> None:
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
            values += _imported(function)
        for value in values:
            self.look(value, every=every)
        if isinstance(wrapped := own.get("__wrapped__"), FunctionType):
            self.read(wrapped, owner)
        if owner is not None:
            self.owns(owner, every=every and not isinstance(owner, nn.Module))

    def owns(self, owner: Any, *, every: bool = False) -> None:
        """Look at attributes of an object later."""
        key = id(owner), "owner", every
        if key not in self.seen:
            self.seen.add(key)
            self.owners.append((owner, every))

    def members(self, owner: Any, *, every: bool) -> None:
        """Look at attributes of an object, and of its class as far as that is a user's."""
        is_class, kind = isinstance(owner, type), cast(Any, type(owner))
        bases = (*_written(owner), *_written(kind)) if is_class else _written(kind)
        if not isinstance(owner, nn.Module):
            every |= any(not _ANY.isdisjoint(vars(base)) for base in bases)
            every |= isinstance(owner, _ABSTRACT)
        places = [] if is_class else [attributes_of(owner)]
        for number, place in enumerate((*places, *map(vars, bases))):
            inside = number >= len(places)  # in a class
            named = self.names.intersection(place)
            if every:
                named |= {name for name in place if not (inside and name[:2] == "__")}
            if inside:
                named |= _called_by_python(bases[number - len(places)], made=is_class)
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
                    self.read(value, owner)
                else:
                    self.look(value, every=every)

    def module(self, module: nn.Module) -> None:
        """Look at one module without those inside it: functions, hooks, class; itself unless known."""
        own = vars(module)
        if id(module) not in self.known:
            self.found.append(module)
            self.found += [*own["_parameters"].values(), *own["_buffers"].values()]
        for name in HOOKS:
            for hook in (own.get(name) or {}).values():
                self.look(hook, every=True)
        for value in [*own.values()]:
            if isinstance(value, _CALLED):
                self.look(value)
        kind: Any = type(module)
        if _written(kind):
            self.owns(module)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The names that code reads, also those of functions in it, and words in it that may be names."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    words = [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]
    read = [
        step.argval
        for step in dis.get_instructions(code)
        if step.opcode in dis.hasname and not step.opname.startswith(("STORE", "DELETE"))
    ]
    return frozenset((*read, *words)).union(*inner)


@lru_cache(maxsize=4096)
def _imports_in(code: CodeType) -> tuple[str, ...]:
    """The modules that code imports where it runs, relative ones with their dots."""
    found: list[str] = []
    before: list[Any] = [None, None]
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            found.append("." * before[-2] + step.argval)
        before.append(step.argval)
    inner = [_imports_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return (*found, *(name for names in inner for name in names))


def _imported(function: FunctionType) -> list[ModuleType]:
    """The modules that a function imports where it runs, as far as they are there."""
    names: list[str] = []
    for name in _imports_in(function.__code__):
        if name[0] == ".":
            with suppress(ImportError):  # of a package that there is not
                names.append(resolve_name(name, function.__globals__.get("__package__")))
        else:
            names += [name, name.partition(".")[0]]
    return [sys.modules[name] for name in names if name in sys.modules]


def _named_by(value: Any) -> list[str]:
    """The names of attributes that an `attrgetter` or `methodcaller` reads."""
    names = value.__reduce__()[1]
    return [name for name in names if isinstance(name, str)]


def _called_by_python(kind: Any, *, made: bool) -> frozenset[str]:
    """The methods of a class that Python calls by itself where an object is used, or is `made`."""
    return frozenset(
        name
        for name, value in vars(kind).items()
        if name[:2] == "__"
        and isinstance(getattr(value, "__func__", value), FunctionType)
        and (name not in _UNASKED or (made and name in _MADE))
        and not _is_generated(getattr(value, "__func__", value).__code__)
    )


def _is_generated(code: CodeType) -> bool:
    """True for methods that a dataclass is given, which read all fields."""
    return code.co_filename.startswith(("<string>", "<attrs"))


def _known(value: Any, held: Held) -> Hashable:
    """The part of a value that is to be equal; what it holds is found apart."""
    kind = type(value)
    if kind in PLAIN:
        return plainly(value)
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
