"""What blocks with one row for each inner step share: which row a step gets, and what comes after.

A per-step block is made for a number of steps. Past the last of them it either refuses (`"error"`)
or goes on with its last row (`"last"`); a learner asks for its limit when it is built and before it
evaluates with more steps than it was trained with.
"""

from typing import Literal, TypeAlias

from metablocks.errors import BlockError, MetablocksError

Beyond: TypeAlias = Literal["error", "last"]
"""What a per-step block does at steps past the last one it was made for."""


def limit(steps: int, beyond: Beyond) -> int | None:
    """The most steps that a block of `steps` rows can take; None where any number will do.

    >>> limit(5, "error"), limit(5, "last")
    (5, None)
    """
    return steps if beyond == "error" else None


def row(
    block: str,
    index: int,
    steps: int,
    beyond: Beyond,
    error: type[MetablocksError] = BlockError,
) -> int:
    """The row of step `index` in a block of `steps` rows.

    >>> row("LearningRate", 4, 5, "error"), row("LearningRate", 7, 5, "last")
    (4, 4)
    >>> row("LearningRate", 5, 5, "error")
    Traceback (most recent call last):
    metablocks.errors.BlockError: LearningRate was made for 5 inner steps, and step index 5 was asked
    for. Take at most 5 steps, or say beyond="last" to go on with the last row

    Raises `error` for a step past the last row where `beyond` is "error".
    """
    if index < steps:
        return index
    if beyond == "last" and steps > 0:
        return steps - 1
    raise error(
        f"{block} was made for {steps} inner steps, and step index {index} was asked for. Take at "
        f'most {steps} steps, or say beyond="last" to go on with the last row'
    )
