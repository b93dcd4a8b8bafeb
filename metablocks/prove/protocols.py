"""Which protocol a block is of: told by its class, and by how it is called."""

import inspect
from typing import Any

from torch import nn

from metablocks.errors import BlockError, suggest_then
from metablocks.recipe.assemble import fits_slot
from metablocks.recipe.slots import ESTIMATOR, EXECUTOR, ORDER, RULE, STEP_LOSS
from metablocks.rules import UpdateRule

PROTOCOLS = {
    "rule": "an update rule",
    "order": "a gradient order",
    "step_loss": "a step loss",
    "estimator": "an estimator",
    "executor": "an executor",
    "norm": "a norm",
}
"""Every protocol, and what a block of it is called."""

SLOTS_OF = {slot.name: slot for slot in (RULE, ORDER, STEP_LOSS, ESTIMATOR, EXECUTOR)}
"""Where recipes have blocks of a protocol; norms have no slot of their own."""

_TAKES = {
    "rule": "it takes a subclass of metablocks.UpdateRule",
    "order": "(step, steps, progress) -> bool",
    "step_loss": "(steps, progress) -> weights [steps + 1]",
    "estimator": "(inner, meta, buffers, task) -> TaskGradient, with an attribute exact",
    "executor": "(fn, shared, buffers, tasks) -> (sum, stacked)",
    "norm": "(model, steps) -> model, or a module class that takes the number of channels",
}


def check_protocol(protocol: str | None) -> None:
    """Raises `BlockError` for the name of none; None is for the block to tell."""
    if protocol is not None and protocol not in PROTOCOLS:
        raise BlockError(
            f'no protocol is called "{protocol}"'
            + suggest_then(protocol, PROTOCOLS, f"there are: {', '.join(PROTOCOLS)}")
        )


def protocol_of(block: Any, name: str, protocol: str | None) -> str:
    """The protocol of a block, norms aside; `protocol` says which where it could be several.

    Raises `BlockError` for a block of none, of another than `protocol`, or of several.
    """
    found = _protocols(block)
    if protocol is not None:
        if protocol in found:
            return protocol
        raise BlockError(f"{name} is no {protocol}: {_TAKES[protocol]}")
    if len(found) == 1:
        return found[0]
    if found:
        raise BlockError(f"{name} could be {' or '.join(found)}; say which: --as {found[0]}")
    raise BlockError(
        f"{name} is no block. A rule is an UpdateRule; others are called: "
        + "; ".join(f"{kind}: {takes}" for kind, takes in _TAKES.items() if kind != "rule")
    )


def is_norm(block: Any, protocol: str | None) -> bool:
    """Whether it is surgery on a model, or a module class to put in a batch norm's place."""
    if protocol is not None:
        return protocol == "norm"
    if isinstance(block, type):
        return issubclass(block, nn.Module) and not issubclass(block, UpdateRule)
    return inspect.isfunction(block) and parameters(block)[:1] == ["model"]


def is_instance(block: Any, protocol: str | None) -> bool:
    """Whether it is a block itself; a class or another function makes one.

    Of a function that could be a block and could make one, the names of its parameters tell.
    """
    if isinstance(block, type):
        return False
    if protocol is not None:
        return fits_slot(block, SLOTS_OF[protocol])
    return bool(_protocols(block)) and (not inspect.isfunction(block) or _named_like(block))


def parameters(block: Any) -> list[str]:
    """The names of what it takes; none where Python cannot tell."""
    try:
        return list(inspect.signature(block).parameters)
    except (TypeError, ValueError):
        return []


def _named_like(function: Any) -> bool:
    """Whether a function's parameters are those of a protocol's call, by name."""
    names = parameters(function)
    calls = (
        ["step", "steps", "progress"],
        ["steps", "progress"],
        ["fn", "shared", "buffers", "tasks"],
    )
    return names in calls


def _protocols(block: Any) -> list[str]:
    if isinstance(block, UpdateRule):
        return ["rule"]
    if hasattr(block, "exact"):
        return ["estimator"] if fits_slot(block, ESTIMATOR) else []
    return [name for name in ("order", "step_loss", "executor") if fits_slot(block, SLOTS_OF[name])]
