"""Random values for the fields of a block, read from its signature.

A field's annotation says what it takes; sizes are small and rates moderate, so that whatever is built
runs at once and diverges for no reason of its own. A field whose name or type is new needs no entry
here: `RANGES` and `PATTERNS` are for those where the general rule would draw only what is refused.
"""

import collections.abc
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from metablocks.recipe.outer import GroupOptions
from metablocks.recipe.parse import Node, Place, Problem
from metablocks.recipe.schema import Field, check

PATTERNS = st.sampled_from(
    [
        *("*", "head.*", "!head.*", "body.*", "*.weight", "*.bias", "*.transform.*"),
        *("!*.transform.*", "model.*", "rule.*", "*rates*", "model.head.*", "nothing.*"),
    ]
)
"""Names of parameters, of the model and of the learner; some match nothing."""

RANGES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["resnet18", "fuzz"]),  # of torchvision's, and of a recipe
    "weights": st.none(),
    # Else its 20 batch norms, over two examples of one pixel, may grow without bound.
    "options": st.just({"zero_init_residual": True}),
    "width": st.sampled_from([4, 8]),  # which heads share
    "files": st.sampled_from(["*", "*.py"]),
    "config": st.just(
        {
            "model_type": "vit",
            "patch_size": 4,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        }
    ),
    "head": st.sampled_from(["head", "head", "head", "body"]),
    "pattern": st.sampled_from(["*.bias", "*.bias", "head.*", ["*.bias", "!head.*"], "nothing.*"]),
    "device": st.just("cpu"),
    "seed": st.integers(0, 3),
    "steps": st.sampled_from([1, 2, 3, 0]),
    "ways": st.integers(2, 3),
    "shots": st.integers(1, 3),  # ranges make tasks of unequal size, which only Loop takes
    "splits": st.just([0.34, 0.33, 0.33]),
    "size": st.integers(8, 14),
    "memory": st.sampled_from([None, "1GiB", "1KiB", 1]),
    "compile": st.sampled_from([*[False] * 6, "trace", "auto", True]),
}
"""Fields by name of which the first few values would say little, or most cost seconds."""

STATED = ("file", "splits")
"""Fields that have a default, and in most recipes need another value."""

_RATES = [*[0.01, 0.001, 0.003, 0.02, 0.037, 0.05, 0.075, 0.1] * 3, 0.0]

JUNK: list[Any] = [
    *(None, True, -1, 0, 0.5, "", "nothing", "*", [], {}, [[1]], [1, "a"], {"block": "nothing"}),
    *({"block": "loop"}, "1e-3", float("nan"), "é\u200b"),
]
"""What a field does not take, or takes to no good end."""


def value(field: Field, siblings: collections.abc.Collection[Field] = ()) -> Any:
    """A strategy for a field; `siblings` are all fields of its block, for optimiser groups."""
    if field.name == "folder" and not field.required:
        return st.none()  # of texts the library's, of a model a configuration
    if field.name == "size" and len(siblings) == 1:
        return st.integers(1, 4)  # of mini-batches, not of images
    if field.name in RANGES:
        return RANGES[field.name]
    return _of(field.annotation, siblings)


def always_drawn(field: Field) -> bool:
    """Whether the default is no recipe, or a size (40 × 40, 64 filters) that a fuzz has no time for."""
    if field.name in ("config", "options"):
        return True
    sizes = field.default if isinstance(field.default, tuple) else (field.default,)
    return any(type(size) is int and size > 8 for size in sizes)


def _of(annotation: Any, siblings: collections.abc.Collection[Field]) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = arguments[1:]
        if any(isinstance(mark, GroupOptions) for mark in marks):
            return _groups(siblings)
        return _number(arguments[0], marks, siblings)
    if origin in (Union, types.UnionType):
        return st.one_of([_of(member, siblings) for member in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        # Sorted: many pairs are (low, high).
        return st.tuples(*[_of(member, siblings) for member in arguments]).map(_ordered)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return st.dictionaries(PATTERNS, _of(arguments[1], siblings), max_size=2)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return st.lists(_of(arguments[0], siblings), max_size=2)
    return _number(annotation, (), siblings)


def _number(kind: Any, marks: tuple[Any, ...], siblings: collections.abc.Collection[Field]) -> Any:
    if kind in (int, float):
        numbers = [*[1, 2, 3] * 10, 0, -1] if kind is int else _RATES
        return st.sampled_from([n for n in numbers if _fits(n, marks)])
    simple = {bool: st.booleans(), str: PATTERNS, types.NoneType: st.none(), None: st.none()}
    if get_origin(kind) is not None:
        return _of(kind, siblings)
    return simple.get(kind, st.sampled_from([0.01, 1, True, "*", None]))


def _fits(number: float, marks: tuple[Any, ...]) -> bool:
    problems: list[Problem] = []
    check(Node(number, Place("")), Annotated[(float, None, *marks)], "", problems)
    return not problems


def _groups(siblings: collections.abc.Collection[Field]) -> Any:
    own = {f.name: value(f) for f in siblings if f.name != "groups"}
    return st.dictionaries(PATTERNS, st.fixed_dictionaries({}, optional=own), max_size=2)


def _ordered(items: tuple[Any, ...]) -> list[Any]:
    try:
        return sorted(items)
    except TypeError:
        return list(items)
