"""Signatures as a schema: the keyword parameters of a block are the fields of its recipe entry.

`fields(target)` reads a class or function; `check(node, annotation, …)` validates the value of a field
by pydantic, and turns what that finds wrong into `Problem`s with their places. Ranges stand in the
annotation (`Annotated[int, Ge(1)]`) or in the constructor, which is tried later.
"""

import dataclasses
import inspect
import json
import math
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from metablocks.checks import IN_CODE, LISTS, MAPPINGS, takes
from metablocks.errors import RecipeError, suggest
from metablocks.recipe.layout import is_section, slot_of
from metablocks.recipe.outer import GroupOptions
from metablocks.recipe.parse import Node, Problem, join, plain, show
from metablocks.recipe.slots import SLOTS

REQUIRED: Any = inspect.Parameter.empty
INVALID: Any = object()
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_PLAIN = (int, float, str, object, tuple, Annotated, types.UnionType, *LISTS)


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
    """The fields of a block: its parameters in order, without those of code and of the builder.

    Raises `RecipeError` for a signature that cannot be read.

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
        if p.kind not in variable
        and p.name not in context
        and IN_CODE not in getattr(hints.get(p.name), "__metadata__", ())
    }


def arguments(known: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a block as its signature asks for them, from the resolved values of its entry."""
    made: dict[str, Any] = {}
    for name, field in known.items():
        value = values.get(name)
        if value is not None and is_groups(field):
            made[name] = {pattern: arguments(known, options) for pattern, options in value.items()}
        elif name in values:
            made[name] = adapter(field.annotation).validate_json(json.dumps(value))
    return made


def is_groups(field: Field) -> bool:
    """True for the groups of an optimiser, whose options are its other fields."""
    members = (field.annotation, *get_args(field.annotation))
    return any(isinstance(mark, GroupOptions) for part in members for mark in get_args(part))


def supplied(target: Callable[..., Any], context: dict[str, Any]) -> dict[str, Any]:
    """The part of `context` that the target's signature asks for."""
    return {n: v for n, v in context.items() if n in inspect.signature(target).parameters}


def is_plain(value: Any) -> bool:
    """True for a value that can stand in a recipe as it is."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    finite = type(value) is float and math.isfinite(value)
    return value is None or type(value) in (bool, int, str) or finite


def check(node: Node, annotation: Any, path: str, problems: list[Problem]) -> Any:
    """The node's value as `annotation` asks for it (tuples for tuples, floats for floats).

    Returns `INVALID`, and appends everything that is wrong, for a value that does not fit.

    >>> from metablocks.recipe.parse import Place, to_node
    >>> problems = []
    >>> check(to_node([0, 5], Place("x.yaml")), tuple[float, float], "domain", problems)
    (0.0, 5.0)
    >>> check(to_node("fast", Place("x.yaml")), float, "lr", problems) is INVALID
    True
    >>> print(problems[0])
    x.yaml: lr: takes a finite number, given "fast"
    """
    try:
        return adapter(annotation).validate_json(json.dumps(plain(node)))
    except ValidationError as error:
        found = [_problem(item, node, annotation, path) for item in error.errors()]
    paths = [problem.path for problem in found]
    for problem in found:  # of a union's members, the one of which only an entry does not fit
        if not any(other != problem.path and within(other, problem.path) for other in paths):
            problems.append(problem)
    return INVALID


def fits(node: Node, annotation: Any) -> bool:
    """True if the node's value is one that `annotation` takes."""
    problems: list[Problem] = []
    check(node, annotation, "", problems)
    return not problems


def describe(annotation: Any) -> str | None:
    """A field's value in words; None for a type that cannot be written in a recipe.

    >>> from metablocks.checks import Count
    >>> describe(bool | None), describe(Count)
    ('null, true or false', 'a whole number, 1 or more')
    """
    return takes(annotation, _in_yaml) or None


def _in_yaml(annotation: Any) -> list[str] | None:
    """Words for what YAML writes otherwise than Python, and none for what it cannot write."""
    if annotation is bool:
        return ["true", "false"]
    if annotation is types.NoneType:
        return ["null"]
    if is_section(annotation):
        return [f"a mapping of {', '.join(fields(annotation))}"]
    if mark := slot_of(annotation):
        kind = "a list of blocks" if mark.at_least is not None else "a block"
        return [f"{kind}: {', '.join(SLOTS[mark.slot].blocks)}"]
    kind = get_origin(annotation) or annotation
    if kind in MAPPINGS:
        return ["a mapping"]
    return [] if inspect.isclass(kind) and kind not in _PLAIN else None


def within(path: str, outer: str) -> bool:
    """True if `path` is `outer` or a part of it.

    >>> within("inner.rule[0]", "inner.rule"), within("inner.rules", "inner.rule")
    (True, False)
    """
    return path.startswith(outer) and path[len(outer) :][:1] in ("", ".", "[")


def adapter(annotation: Any) -> TypeAdapter[Any]:
    """Pydantic's reader of a type. Raises `RecipeError` for a type of which there is none."""
    try:
        return _adapter(annotation)
    except TypeError:  # marks of an annotation may have no hash
        return _adapter.__wrapped__(annotation)
    except PydanticUserError as error:
        raise RecipeError(f"its signature cannot be read ({error.message})") from None


@lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_strict(annotation), config=STRICT)


def _strict(annotation: Any) -> Any:
    """An annotation as pydantic is to read it: lists for what may be iterated."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if slot_of(annotation):
        return Any  # read block by block, by `resolve`
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(member) for member in arguments)]  # noqa: UP007
    if origin in LISTS or annotation in LISTS:
        return list[_strict(arguments[0])] if arguments else list[Any]  # type: ignore[misc]
    return annotation


def _default(target: Any, parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            if field.name == parameter.name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    return parameter.default


def _problem(item: ErrorDetails, node: Node, annotation: Any, path: str) -> Problem:
    """An error of pydantic's, placed. A location also names members of unions, which are not keys."""
    for key in item["loc"]:
        if _holds(node, key):
            node, annotation, path = node.value[key], _below(annotation, key), join(path, key)
    words = describe(annotation)
    if words is None:
        name = getattr(annotation, "__name__", str(annotation))
        return Problem(node.place, path, f"a {name} cannot be written in a recipe")
    message = f"takes {words}, given {show(node)}{_hint(annotation, node.value)}"
    return Problem(node.place, path, message)


def _holds(node: Node, key: Any) -> bool:
    if isinstance(node.value, dict):
        return key in node.value
    return isinstance(node.value, list) and isinstance(key, int) and key < len(node.value)


def _below(annotation: Any, key: Any) -> Any:
    """The annotation of an entry of what `annotation` describes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _below(arguments[0], key)
    if origin in (Union, types.UnionType):
        entries = (_below(member, key) for member in arguments)
        return next((entry for entry in entries if entry is not Any), Any)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return arguments[key] if key < len(arguments) else Any
    if arguments and (origin is tuple or origin in LISTS):
        return arguments[0]
    return arguments[1] if arguments and origin in MAPPINGS else Any


def _hint(annotation: Any, value: Any) -> str:
    word = str(value).lower()
    if annotation is bool and word in ("yes", "no", "on", "off", "0", "1"):
        return f"; write {'true' if word in ('yes', 'on', '1') else 'false'}"
    if get_origin(annotation) is Literal and isinstance(value, str):
        return suggest(
            value, [choice for choice in get_args(annotation) if isinstance(choice, str)]
        )
    return ""
