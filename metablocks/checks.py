"""Checks of the values that blocks take: counts, numbers, choices and intervals.

Each check gets the name of the block and of its field, and raises an error that carries both. Integers
and floats of NumPy are numbers; booleans, infinities and NaN are not.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, get_args

from metablocks.errors import BlockError, MetablocksError, suggest


def count(
    block: str,
    field: str,
    value: object,
    *,
    least: int = 1,
    most: int | None = None,
    error: type[MetablocksError] = BlockError,
) -> int:
    """A whole number from `least` to `most` (None: without bound), as an `int`.

    >>> count("Loop", "workers", 0)
    Traceback (most recent call last):
    metablocks.errors.BlockError: Loop workers is 0; it takes a whole number, 1 or more

    Raises `error`, with `block` and `field`, for anything else.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and least <= int(value) and (most is None or int(value) <= most):  # type: ignore[call-overload]
        return int(value)  # type: ignore[call-overload, no-any-return]
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    takes = f"it takes a whole number, {bounds}"
    raise error(f"{block} {field} is {value!r}; {takes}", block=block, field=field)


def number(
    block: str,
    field: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    error: type[MetablocksError] = BlockError,
) -> float:
    """A finite number within the bounds, as a `float`.

    >>> number("Momentum", "momentum", 0.9, at_least=0, below=1)
    0.9
    >>> number("Momentum", "momentum", float("nan"), at_least=0, below=1)
    Traceback (most recent call last):
    metablocks.errors.BlockError: Momentum momentum is nan; it takes a finite number at least 0 and
    below 1

    Raises `error`, with `block` and `field`, for anything else.
    """
    real = as_float(value)
    if (
        math.isfinite(real)
        and (at_least is None or real >= at_least)
        and (above is None or real > above)
        and (below is None or real < below)
    ):
        return real
    bounds = (("at least", at_least), ("above", above), ("below", below))
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    takes = f"it takes a finite number {words}".rstrip()
    raise error(f"{block} {field} is {value!r}; {takes}", block=block, field=field)


def choice(
    block: str,
    field: str,
    value: object,
    choices: Any,
    *,
    error: type[MetablocksError] = BlockError,
) -> None:
    """Raise `error`, with `block` and `field`, unless `value` is one of `choices`.

    `choices` is a collection of texts, or a `Literal` of them.

    >>> choice("Conv4", "norm", "bach", ["batch", "none"])
    Traceback (most recent call last):
    metablocks.errors.BlockError: Conv4 norm is 'bach'; did you mean "batch"? It is one of batch, none
    """
    options: Iterable[str] = get_args(choices) or choices
    names = list(options)
    if not isinstance(value, str) or value not in names:
        near = suggest(str(value), names)
        there_are = f"{' I' if near else '; i'}t is one of {', '.join(names)}"
        message = f"{block} {field} is {value!r}{near}{there_are}"
        raise error(message, block=block, field=field)


def interval(
    block: str, field: str, value: object, *, error: type[MetablocksError] = BlockError
) -> None:
    """Raise `error`, with `block` and `field`, unless `value` is (low, high) with low <= high.

    >>> interval("Sinusoid", "phase", (3.0, 1.0))
    Traceback (most recent call last):
    metablocks.errors.BlockError: Sinusoid phase is (3.0, 1.0); it takes a pair (low, high) of finite
    numbers with low <= high
    """
    ends = [as_float(end) for end in value] if isinstance(value, tuple | list) else []
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
        raise error(
            f"{block} {field} is {value!r}; it takes a pair (low, high) of finite numbers with "
            "low <= high",
            block=block,
            field=field,
        )


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
