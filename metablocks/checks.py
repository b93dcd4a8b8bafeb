"""Checks of the arguments of blocks, driven by their signatures.

A block, class or function, is `@checked()`: what it is called with is held to its annotations, ranges
included (`Count`, `Annotated[float, Lt(1)]`), before any of it runs. Integers and floats of NumPy are
numbers; booleans, infinities and NaN are not.
"""

import collections.abc
import inspect
import math
import operator
import types
from collections.abc import Callable
from functools import cache, wraps
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from metablocks.errors import AnswerError, ArgumentError, BlockError, MetablocksError, suggest_then


class Such(NamedTuple):
    """Mark of an annotation: what it takes in words, and what holds for its values."""

    holds: Callable[[Any], bool]
    words: str


class Blocks(NamedTuple):
    """Mark of a recipe's field that holds a block of a slot, or a list of at least `at_least`."""

    slot: str
    at_least: int | None = None


def _is_device(value: Any) -> bool:
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


Count = Annotated[int, Ge(1)]
CountFrom0 = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
Interval = Annotated[
    tuple[float, float],
    Such(
        lambda pair: pair[0] <= pair[1],
        "a pair (low, high) of finite numbers with low <= high",
    ),
]
Device = Annotated[torch.device | str, Such(_is_device, 'a device, such as "cpu" or "cuda:0"')]

UNCHECKED = "unchecked"
"""Mark of an annotation whose values are checked further in."""

IN_CODE = "in code"
"""Mark of an annotation whose values no recipe can state: its parameter is no field of one."""

Words: TypeAlias = Callable[[Any], list[str] | None]
"""Words for the alternatives of annotations that are described otherwise; None for all others."""

Block = TypeVar("Block", bound=Callable[..., Any])

_BOUNDS: dict[Any, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("below", operator.lt),
}
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping)


def checked(error: type[MetablocksError] = BlockError) -> Callable[[Block], Block]:
    """A decorator: arguments that do not fit the annotations raise `error`, with block and field.

    What fits is handed on as the annotation has it: NumPy's numbers as Python's, lists for tuples as
    tuples. Defaults are not looked at. Names that are no parameters, and parameters that are missing,
    are an `ArgumentError`.

    >>> @checked()
    ... def warm_up(*, epochs: Count, linear: bool = True): ...
    >>> warm_up(epochs=3, linear="no")
    Traceback (most recent call last):
    metablocks.errors.BlockError: warm_up linear is 'no'; it takes True or False
    >>> warm_up(epoch=3)
    Traceback (most recent call last):
    metablocks.errors.ArgumentError: warm_up has no parameter epoch; did you mean "epochs"? It takes
    epochs, linear
    """

    def decorate(block: Block) -> Block:
        if not inspect.isclass(block):
            return _checked_call(block, block.__name__, error)  # type: ignore[return-value]
        block.__init__ = _checked_call(block.__init__, block.__name__, error)
        return block

    return decorate


def _checked_call(
    function: Callable[..., Any], block: str, error: type[MetablocksError]
) -> Callable[..., Any]:
    signature = inspect.signature(function)
    hints = cache(lambda: get_type_hints(function, include_extras=True))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as refusal:
            raise _unbound(block, signature, hints(), kwargs, str(refusal)) from None
        for name, value in bound.arguments.items():
            annotation = hints().get(name, Any)
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(
                    check(block, f"{name}[{index}]", item, annotation, error)
                    for index, item in enumerate(value)
                )
            elif kind is not inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = check(block, name, value, annotation, error)
        return function(*bound.args, **bound.kwargs)

    return call


def _unbound(
    block: str,
    signature: inspect.Signature,
    hints: dict[str, Any],
    given: dict[str, Any],
    refusal: str,
) -> ArgumentError:
    """The error of a call that does not fit the signature."""
    names = [name for name in signature.parameters if name != "self"]
    for name in given:
        if name not in names:
            words = f"it takes {', '.join(names)}" if names else "it takes none"
            message = f"{block} has no parameter {name}{suggest_then(name, names, words)}"
            return ArgumentError(message, block=block, field=name)
    for name in names:
        if f"'{name}'" in refusal:
            message = f"{block} {name} is missing; it takes {takes(hints.get(name, Any))}"
            return ArgumentError(message, block=block, field=name)
    return ArgumentError(f"{block}: {refusal}; it takes {', '.join(names)}", block=block)


def check(
    block: str,
    field: str,
    value: Any,
    annotation: Any,
    error: type[MetablocksError] = BlockError,
) -> Any:
    """The value as the annotation has it.

    >>> check("Momentum", "momentum", 0.9, Annotated[float, Ge(0), Lt(1)])
    0.9
    >>> check("Momentum", "momentum", float("nan"), Annotated[float, Ge(0), Lt(1)])
    Traceback (most recent call last):
    metablocks.errors.BlockError: Momentum momentum is nan; it takes a finite number at least 0 and
    below 1
    >>> check("Conv4", "norm", "bach", Literal["batch", "none"])
    Traceback (most recent call last):
    metablocks.errors.BlockError: Conv4 norm is 'bach'; did you mean "batch"? It is one of batch, none

    Raises `error`, with `block` and `field`, for a value that does not fit.
    """
    try:
        return _read(value, annotation)
    except _UnfitError as unfit:
        part = unfit.part
    one_of = get_origin(annotation) is Literal
    then = f"it {'is' if one_of else 'takes'} {takes(annotation)}"
    words = [word.strip('"') for word in _words(annotation, lambda _: None) if word[:1] == '"']
    near = suggest_then(value, words, then) if isinstance(value, str) else f"; {then}"
    if inspect.isclass(value):
        near += f"; did you mean {value.__name__}(…)?"
    text = shown(value)
    if part and isinstance(value, collections.abc.Mapping) and text == f"a {type(value).__name__}":
        text += f" with {part}"
    raise error(f"{block} {field} is {text}{near}", block=block, field=field)


def wrong_answer(
    role: str, block: str, answer: object, takes: str, error: type[MetablocksError] = AnswerError
) -> MetablocksError:
    """The error of a block that answers what its protocol does not know.

    >>> print(wrong_answer("order", "Mine", "no", "True or False"))
    the order Mine returned 'no'; it returns True or False
    """
    message = f"the {role.replace('_', ' ')} {block} returned {shown(answer)}; it returns {takes}"
    return error(message, block=block, field=role)


def name_of(block: object) -> str:
    """The name of a block: that of a function, or of an object's class."""
    return str(getattr(block, "__name__", type(block).__name__))


def shown(value: Any) -> str:
    """A value in an error: its text if that is short, else what it is.

    >>> shown(float("nan")), shown(Tensor), shown(torch.zeros(2, 3))
    ('nan', 'the class Tensor', 'a Tensor [2, 3] of torch.float32')
    """
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        shape = [value.size(0), "…"] if value.is_nested else list(value.shape)
        return f"a Tensor {shape} of {value.dtype}"
    text = repr(value)
    plain = value is None or isinstance(value, str | Real | complex)
    return text if plain or (len(text) <= 60 and "\n" not in text) else f"a {type(value).__name__}"


class _UnfitError(Exception):
    """A value that does not fit an annotation; `part` says which entry of a mapping does not."""

    part = ""


def _read(value: Any, annotation: Any) -> Any:
    """The value as the annotation has it; raises `_UnfitError`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, TypeVar):
        return value
    if origin is Annotated:
        return _read_marked(value, arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        unfit = _UnfitError()
        for member in arguments:
            try:
                return _read(value, member)
            except _UnfitError as error:
                unfit = error if error.part else unfit
        raise unfit
    if annotation in _READERS:
        return _READERS[annotation](value)
    if origin is Literal:
        return _fits(value, any(type(value) is type(x) and value == x for x in arguments))
    if origin is tuple or origin in LISTS:
        return _read_list(value, origin, arguments)
    if origin in MAPPINGS:
        _fits(value, isinstance(value, collections.abc.Mapping))
        for key, item in value.items():
            try:
                _read(key, arguments[0]), _read(item, arguments[1])
            except _UnfitError as unfit:
                unfit.part = f"{key!r}: {unfit.part or shown(item)}"
                raise
        return value
    kind = origin or annotation
    if kind is collections.abc.Callable:
        made = inspect.isclass(value) and issubclass(value, nn.Module)
        return _fits(value, callable(value) and not made)
    if not inspect.isclass(kind):
        return value
    try:
        return _fits(value, isinstance(value, kind) and not inspect.isclass(value))
    except TypeError:  # a protocol that is not for isinstance
        return value


def _read_marked(value: Any, annotation: Any, marks: tuple[Any, ...]) -> Any:
    if UNCHECKED in marks:
        return value
    read = _read(value, annotation)
    for mark in marks:
        if isinstance(mark, Such):
            _fits(value, mark.holds(read))
    for kind, bound in _bounds(marks).items():
        _, holds = _BOUNDS[kind]
        _fits(value, holds(read, bound))
    return read


def _read_list(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    if origin is collections.abc.Iterable and isinstance(value, collections.abc.Iterator):
        return value  # which reading would use up
    listed = isinstance(value, list | tuple | range | collections.abc.ItemsView)
    _fits(value, listed or type(value) is np.ndarray)
    if origin is tuple and arguments[-1] is not Ellipsis:
        _fits(value, len(value) == len(arguments))
        return tuple(_read(item, kind) for item, kind in zip(value, arguments, strict=True))
    items = [_read(item, arguments[0]) for item in value]
    return tuple(items) if origin is tuple else value


def _fits(value: Any, fits: bool) -> Any:
    if not fits:
        raise _UnfitError
    return value


def _whole(value: Any) -> int:
    return int(_fits(value, isinstance(value, Integral) and not isinstance(value, bool)))


def _finite(value: Any) -> float:
    real = as_float(value)
    _fits(real, math.isfinite(real))
    return value if type(value) is int else real


def _flag(value: Any) -> bool:
    return bool(_fits(value, isinstance(value, bool | np.bool_)))


def _none(value: Any) -> None:
    _fits(value, value is None)


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _flag,
    int: _whole,
    float: _finite,
    types.NoneType: _none,
}


def takes(annotation: Any, own: Words = lambda _: None) -> str:
    """The words for what an annotation takes, None apart; empty if there are none.

    >>> takes(tuple[Count, Count]), takes(Literal["batch", "none"])
    ('a list of 2, each a whole number, 1 or more', 'one of batch, none')
    """
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    *words, last = _words(annotation, own) or [""]
    return " or ".join(filter(None, [", ".join(words), last]))


def _words(annotation: Any, own: Words) -> list[str]:
    """The words for each alternative that an annotation takes."""
    if (words := own(annotation)) is not None:
        return words
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        none_first = sorted(arguments, key=lambda member: member is not types.NoneType)
        return [word for member in none_first for word in _words(member, own)]
    if origin is Literal:
        return [f'"{x}"' if isinstance(x, str) else repr(x) for x in arguments]
    if origin is Annotated:
        return [_bounded(arguments[0], arguments[1:], own)]
    if origin is tuple and arguments[-1] is not Ellipsis:
        each = dict.fromkeys(takes(argument, own) for argument in arguments)
        return [f"a list of {len(arguments)}, {'each ' * (len(each) == 1)}{', '.join(each)}"]
    if arguments and (origin is tuple or origin in LISTS):
        return [f"a list, each {takes(arguments[0], own)}"]
    if arguments and origin in MAPPINGS:
        return [f"a dict of {takes(arguments[0], own)}: {takes(arguments[1], own)}"]
    kind = origin or annotation
    return ["a function" if kind is collections.abc.Callable else f"a {kind.__name__}"]


def _bounded(annotation: Any, marks: tuple[Any, ...], own: Words) -> str:
    for mark in marks:
        if isinstance(mark, Such):
            return mark.words
    bounds, words = _bounds(marks), takes(annotation, own)
    if annotation is int and Ge in bounds:
        most = f" to {bounds[Le]}" if Le in bounds else " or more"
        return f"{words}, {bounds[Ge]}{most}"
    return " ".join(
        [words, " and ".join(f"{_BOUNDS[k][0]} {b:g}" for k, b in bounds.items())]
    ).strip()


def _bounds(marks: tuple[Any, ...]) -> dict[Any, float]:
    """The bounds among the marks of an annotation, by their classes."""
    kinds = {type(mark): mark for mark in marks if type(mark) in _BOUNDS}
    return {kind: getattr(mark, kind.__name__.lower()) for kind, mark in kinds.items()}


_NAMES: dict[Any, list[str]] = {
    bool: ["True", "False"],
    int: ["a whole number"],
    float: ["a finite number"],
    str: ["a text"],
    nn.Module: ["an nn.Module"],
    types.NoneType: [],
    Any: ["anything"],
    object: ["anything"],
}


def as_float(value: object) -> float:
    """A number as a float: NaN for what is not a number, an infinity for what is too large.

    >>> as_float(2), as_float(True), as_float(10**400)
    (2.0, nan, inf)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
