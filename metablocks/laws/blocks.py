"""A block, the protocol whose laws it is held to, and the Python that makes it."""

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from metablocks.batches import Batches
from metablocks.errors import BlockError, MetablocksError, suggest_then
from metablocks.estimators import Estimator
from metablocks.executors import Executor
from metablocks.laws.norms import in_place_of_batch_norms
from metablocks.order import Order
from metablocks.rules import UpdateRule
from metablocks.start import Start
from metablocks.step_loss import StepLoss
from metablocks.tasks.base import TaskSource

PROTOCOLS: dict[str, tuple[type | None, str]] = {
    "start": (Start, "a subclass of metablocks.Start"),
    "batches": (Batches, "a subclass of metablocks.Batches"),
    "rule": (UpdateRule, "a subclass of metablocks.UpdateRule"),
    "order": (Order, "(step, steps, progress) -> bool"),
    "step_loss": (StepLoss, "(steps, progress) -> weights [steps + 1]"),
    "estimator": (Estimator, "(inner, meta, buffers, task) -> TaskGradient"),
    "executor": (Executor, "(fn, shared, buffers, tasks) -> (sum, stacked)"),
    "norm": (None, "(model, steps) -> model, or a module class that takes the number of channels"),
    "tasks": (TaskSource, "kind, input_shape, outputs, sample(split, indices) -> TaskBatch"),
}
"""Every protocol: its class, and what a block of it is."""


@dataclass(frozen=True)
class Block:
    """A block that laws are run on."""

    protocol: str
    make: Callable[[], Any]
    """A new one."""
    code: str
    """The Python that makes it, `MyRule(rate=0.1)`."""
    imports: str
    """The line that imports the names in `code`."""

    @property
    def argument(self) -> Any:
        """The argument passed to laws: a factory for rules, the block itself otherwise."""
        return self.make if self.protocol == "rule" else self.make()


def as_block(
    value: Any,
    fields: Mapping[str, Any] | None = None,
    *,
    protocol: str | None = None,
    source: tuple[str, str] | None = None,
) -> Block:
    """A class, a factory or an instance as a `Block`.

    - `fields`: arguments for a class or a factory.
    - `protocol`: one of `PROTOCOLS`; without it the block's class or, of a function, the names of its
      parameters must tell.
    - `source`: the module and the name to import it by.

    >>> from metablocks import KFO
    >>> as_block(KFO, {"hidden": 1}).code
    'KFO(hidden=1)'

    Raises `BlockError` if the value is not a block of the protocol or of any.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        there_are = f"there are: {', '.join(PROTOCOLS)}"
        raise BlockError(
            f'"{protocol}" is not a protocol{suggest_then(protocol, PROTOCOLS, there_are)}'
        )
    fields = dict(fields or {})
    name, imports = _origin(value, source)
    arguments = ", ".join(f"{field}={v!r}" for field, v in fields.items())
    if protocol == "norm" or (protocol is None and is_norm(value)):
        bound = partial(value, **fields) if fields else value
        code = f"partial({name}, {arguments})" if fields else name
        imports = f"from functools import partial\n{imports}" if fields else imports
        return Block("norm", lambda: _surgery(bound), code, imports)
    if is_instance(value, protocol, fields):
        kind = _protocol_of(value, name, protocol)
        code = name if source or inspect.isfunction(value) else repr(value).splitlines()[0]
        return Block(kind, partial(copy.deepcopy, value), code, imports)
    if isinstance(value, partial):
        inner = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        arguments = ", ".join([*inner, *([arguments] if arguments else [])])
    if not callable(value):
        raise BlockError(f"{value!r} is a {type(value).__name__}, not a class, factory or block")
    make = partial(value, **fields)
    code = f"{name}({arguments})"
    try:
        made = make()
    except MetablocksError:
        raise
    except Exception as error:
        hint = (
            "; if it is a block itself, state its protocol (--as)"
            if inspect.isfunction(value)
            else ""
        )
        raise BlockError(f"{code} failed: {type(error).__name__}: {error}{hint}") from error
    return Block(_protocol_of(made, name, protocol), make, code, imports)


def is_norm(value: Any) -> bool:
    """True if it is surgery `(model, steps)`, or a module class that is not a rule."""
    if isinstance(value, type):
        return issubclass(value, nn.Module) and not issubclass(value, UpdateRule)
    return inspect.isfunction(value) and parameters(value)[:2] == ["model", "steps"]


def is_instance(value: Any, protocol: str | None, fields: Mapping[str, Any]) -> bool:
    """True if it is a block itself, and not a class or function that makes one.

    A function is one if its parameters are those of a protocol, or the protocol is stated and it has
    parameters that must be given.
    """
    if isinstance(value, type | partial):
        return False
    if not inspect.isfunction(value):
        return True
    required = [
        p.name
        for p in inspect.signature(value).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    stated = protocol is not None and not set(required) <= set(fields)
    return stated or protocol_of(value) is not None


def protocol_of(block: Any) -> str | None:
    """The protocol of a block by its class, or else by the names of its parameters."""
    for name, (base, _) in PROTOCOLS.items():
        if base is not None and base in type(block).__mro__:
            return name
    if isinstance(block, TaskSource):
        return "tasks"
    for name, (base, _) in PROTOCOLS.items():
        call = vars(base).get("__call__") if base not in (None, UpdateRule, Start) else None
        if call is not None and parameters(block) == parameters(call)[1:]:
            return name
    return None


def parameters(function: Any) -> list[str]:
    """The names of its parameters; none if Python cannot tell."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _protocol_of(block: Any, name: str, protocol: str | None) -> str:
    kind = protocol_of(block)
    takes = "; ".join(f"{kind}: {takes}" for kind, (_, takes) in PROTOCOLS.items())
    if protocol is None and kind is None:
        raise BlockError(f"{name} is not a block, or its protocol (--as) must be stated: {takes}")
    refused = kind is not None or isinstance(block, nn.Module) or not callable(block)
    if protocol is not None and kind != protocol and (refused or protocol == "rule"):
        raise BlockError(f"{name} is not of the protocol {protocol}: {PROTOCOLS[protocol][1]}")
    return protocol or str(kind)


def _surgery(norm: Any) -> Any:
    """Surgery as it is, or surgery that puts a module class in place of batch norms."""
    if not isinstance(norm.func if isinstance(norm, partial) else norm, type):
        return norm
    surgery: Any = in_place_of_batch_norms(norm)
    surgery.module = norm
    return surgery


def _origin(value: Any, source: tuple[str, str] | None) -> tuple[str, str]:
    """The name of a class, function or object's class, and the line that imports it."""
    kind = value.func if isinstance(value, partial) else value
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    module, name = source or (kind.__module__, kind.__qualname__)
    if "<" in name:
        return "make", f"make = ...  # the block that was passed, from {module}"
    if module.startswith("metablocks.") and name in public_names():
        module = "metablocks"
    return name, f"from {module} import {name.partition('.')[0]}"


def public_names() -> set[str]:
    """The names that `metablocks` itself exports, for code that is printed."""
    return set(sys.modules["metablocks"].__all__)
