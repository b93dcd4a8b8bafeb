"""Modules that know the inner step, and the rows of blocks that have one for each step.

A per-step block is made for a number of steps. Past the last of them it either refuses (`"error"`)
or goes on with its last row (`"last"`); a learner asks for its limit when it is built and before it
evaluates with more steps than it was trained with.
"""

from typing import Literal, TypeAlias

from torch import nn

from metablocks.errors import BlockError, MetablocksError

Beyond: TypeAlias = Literal["error", "last"]
"""Behaviour of a per-step block at steps past the last one it was made for."""


class StepAware(nn.Module):
    """A module that takes part in the inner loop. Subclass it in place of `nn.Module`.

    >>> import torch
    >>> class StepBias(StepAware):
    ...     max_steps = 3
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bias = nn.Parameter(torch.zeros(3))
    ...
    ...     def forward(self, x):
    ...         return x + self.bias[self.inner_step]
    >>> StepBias()(torch.ones(1))
    tensor([1.], grad_fn=<AddBackward0>)
    """

    inner_step: int = 0
    """The index of the inner step that a pass belongs to; a learner sets it, and so may a user."""
    max_steps: int | None = None
    """The most inner steps that it can serve; None for any number."""
    collects_buffers: bool = False
    """True if a learner's `backward` is to bring its buffers up to date (see `MetaLearner`)."""
    keeps_statistics: bool = False
    """True if predictions rest on statistics that it has stored."""

    def at_step(self, index: int) -> nn.Module | None:
        """The plain module that it is at inner step `index`; None to stay as it is."""
        return None


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
