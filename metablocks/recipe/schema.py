"""Signatures to checks: the keyword parameters of a block are the fields of its recipe entry.

`fields(target)` reads a class or function; `check(node, annotation, …)` turns a YAML value into
what the annotation asks for, or appends a `Problem` that says what it takes and what was given.
Ranges stand in the annotation (`Annotated[int, Interval(at_least=1)]`) or in the block's own
constructor, which is tried later.
"""

import collections.abc
import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from metablocks.errors import RecipeError, suggest
from metablocks.recipe.parse import Node, Problem, join, plain, show

REQUIRED: Any = inspect.Parameter.empty
INVALID: Any = object()
LARGEST = 2**63 - 1
"""The largest integer that sizes and counts of tensors are held in."""
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping)


@dataclass(frozen=True)
class Interval:
    """A range of numbers, for `Annotated`.

    >>> 1.0 in Interval(at_least=0, below=1), 0.5 in Interval(at_least=0, below=1)
    (False, True)
    >>> str(Interval(at_least=0, below=1))
    'at least 0 and below 1'
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return " and ".join(f"{n.replace('_', ' ')} {b}" for n, b in bounds if b is not None)


@dataclass(frozen=True)
class GroupOptions:
    """Marks an optimiser's `groups`: name pattern to a mapping of the optimiser's own fields."""


@dataclass(frozen=True)
class Field:
    """One parameter of a block: its name, its annotation, its default (or `REQUIRED`)."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def fields(target: Callable[..., Any], context: Collection[str] = ()) -> dict[str, Field]:
    """The fields of a block: its parameters in order, without what the builder supplies.

    Raises `RecipeError` where the signature cannot be read.

    >>> def warmup(optimizer, *, epochs: int, start: float = 0.0): ...
    >>> [(f.name, f.required) for f in fields(warmup, context=["optimizer"]).values()]
    [('epochs', True), ('start', False)]
    """
    try:
        parameters = inspect.signature(target).parameters.values()
        init = target.__init__ if inspect.isclass(target) else target
        hints = get_type_hints(init, include_extras=True)
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise RecipeError(f"its signature cannot be read ({error})") from None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        p.name: Field(p.name, hints.get(p.name, Any), _default(target, p))
        for p in parameters
        if p.kind not in variable and p.name not in context
    }


def supplied(target: Callable[..., Any], context: dict[str, Any]) -> dict[str, Any]:
    """The part of `context` that the target's signature asks for."""
    return {n: v for n, v in context.items() if n in inspect.signature(target).parameters}


def is_plain(value: Any) -> bool:
    """Whether a value can stand in a recipe as it is."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, str) or _is_finite(value)


def check(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    """The node's value as `annotation` asks for it (tuples for tuples, floats for floats).

    Returns `INVALID`, and appends what is wrong, where it does not fit.

    >>> from metablocks.recipe.parse import Place, to_node
    >>> problems = []
    >>> check(to_node([0, 5], Place("x.yaml")), tuple[float, float], "domain", problems)
    (0.0, 5.0)
    >>> check(to_node("fast", Place("x.yaml")), float, "lr", problems) is INVALID
    True
    >>> print(problems[0])
    x.yaml: lr: takes a number, given "fast"
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(node, annotation, path, problems)
    if origin in (Union, types.UnionType):
        return _union(node, annotation, path, problems)
    if annotation is Any or annotation is object:
        return plain(node)
    if origin is Literal:
        return _literal(node, annotation, path, problems)
    if origin is tuple or annotation is tuple:
        return _tuple(node, annotation, path, problems)
    if origin in _LISTS or annotation in _LISTS:
        item = arguments[0] if arguments else Any
        return _items(node, [item] * _length(node), list, annotation, path, problems)
    if origin in _MAPPINGS or annotation in _MAPPINGS:
        return _mapping(node, annotation, path, problems)
    value = node.value
    if annotation in (None, types.NoneType) and value is None:
        return None
    if annotation in (bool, str) and type(value) is annotation:
        return value
    if annotation is int and type(value) is int and abs(value) <= LARGEST:
        return value
    if annotation is float and type(value) in (int, float):
        number = _as_float(value)
        if math.isfinite(number):
            return number
    if describe(annotation) is None:
        name = getattr(annotation, "__name__", str(annotation))
        return _refuse(node, path, problems, f"a {name} cannot be written in a recipe")
    return _wrong(node, annotation, path, problems, _hint(annotation, value))


def describe(annotation: Any, *, many: bool = False) -> str | None:
    """What a field takes, in words; None for a type that cannot be written in a recipe.

    >>> describe(tuple[float, float]), describe(Annotated[int, Interval(at_least=1)])
    ('a list of 2 numbers', 'an integer of at least 1')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    names: dict[Any, tuple[str, str]] = {
        bool: ("true or false", "booleans"),
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        str: ("text", "texts"),
        types.NoneType: ("null", "nulls"),
        Any: ("any value", "values"),
        object: ("any value", "values"),
    }
    if annotation in names:
        return names[annotation][many]
    if origin is Annotated:
        inner = describe(arguments[0], many=many)
        bounds = next((m for m in arguments[1:] if isinstance(m, Interval)), None)
        return f"{inner} of {bounds}" if bounds and inner else inner
    if origin in (Union, types.UnionType):
        parts = [describe(member, many=many) for member in arguments]
        return None if None in parts else " or ".join(part for part in parts if part)
    if origin is Literal:
        quoted = [show(choice) for choice in arguments]
        return " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
    if origin is tuple and arguments[-1] is not Ellipsis:
        items = describe(arguments[0], many=True) if len(set(arguments)) == 1 else "values"
        return f"a list of {len(arguments)} {items}"
    if origin is tuple or origin in _LISTS:
        return f"a list of {describe(arguments[0], many=True)}"
    if annotation is tuple or annotation in _LISTS:
        return "a list"
    if origin in _MAPPINGS or annotation in _MAPPINGS:
        return "a mapping"
    return None


def _hint(annotation: Any, value: Any) -> str:
    if annotation is bool and str(value).lower() in ("yes", "no", "on", "off", "0", "1"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on', '1') else 'false'}"
    if annotation is float and type(value) in (int, float):
        return "; it must be finite"
    if annotation is int and type(value) is int:
        return f"; it must be at most {LARGEST}"
    return ""


def _default(target: Any, parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            if field.name == parameter.name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    return parameter.default


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _length(node: Node) -> int:
    return len(node.value) if isinstance(node.value, list) else 0


def _refuse(node: Node, path: str, problems: list[Problem], message: str) -> Any:
    problems.append(Problem(node.place, path, message))
    return INVALID


def _wrong(node: Node, annotation: Any, path: str, problems: list[Problem], hint: str = "") -> Any:
    takes = describe(annotation)
    return _refuse(node, path, problems, f"takes {takes}, given {show(node)}{hint}")


def _annotated(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    inner, *marks = get_args(annotation)
    before = len(problems)
    value = check(node, inner, path, problems)
    bounds = [mark for mark in marks if isinstance(mark, Interval)]
    if value is INVALID:
        if bounds and len(problems) == before + 1 and problems[-1].path == path:
            problems.pop()
            return _wrong(node, annotation, path, problems)
        return INVALID
    if all(value in bound for bound in bounds):
        return value
    return _wrong(node, annotation, path, problems)


def _union(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    members = get_args(annotation)
    for member in members:
        found: list[Problem] = []
        value = check(node, member, path, found)
        if value is not INVALID:
            return value
        if found[0].path != path:  # the shape fits this member; an entry does not
            problems.extend(found)
            return INVALID
    return _wrong(node, annotation, path, problems)


def _literal(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    choices = get_args(annotation)
    if any(type(choice) is type(node.value) and choice == node.value for choice in choices):
        return node.value
    words = [choice for choice in choices if isinstance(choice, str)]
    hint = suggest(node.value, words) if isinstance(node.value, str) else ""
    return _wrong(node, annotation, path, problems, hint)


def _tuple(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    arguments = get_args(annotation) or (Any, Ellipsis)
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * _length(node)
    return _items(node, list(arguments), tuple, annotation, path, problems)


def _items(
    node: Node,
    members: list[Any],
    kind: Callable[[list[Any]], Any],
    annotation: Any,
    path: str,
    problems: list[Problem],
) -> Any:
    if not isinstance(node.value, list) or len(node.value) != len(members):
        return _wrong(node, annotation, path, problems)
    pairs = enumerate(zip(node.value, members, strict=True))
    items = [check(child, member, join(path, i), problems) for i, (child, member) in pairs]
    return INVALID if any(item is INVALID for item in items) else kind(items)


def _mapping(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(node.value, dict):
        return _wrong(node, annotation, path, problems)
    arguments = get_args(annotation)
    member = arguments[1] if arguments else Any
    entries = {k: check(c, member, join(path, k), problems) for k, c in node.value.items()}
    return INVALID if any(entry is INVALID for entry in entries.values()) else entries
