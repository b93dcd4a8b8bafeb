"""Whole functions of tensors, traced once for each kind of arguments and compiled.

What is compiled contains its own derivatives: the function runs once under a tracer that sees through
`torch.func`, and the flat graph of operations that comes out is what `torch.compile` gets. (A double
backward *through* a compiled region is what `torch.compile` does not do.)
"""

import logging
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.errors import BlockError

Compile = bool | Literal["auto"]

log = logging.getLogger("metablocks")

_ROUNDS = 3  # timed runs of either way, for "auto"


class CompileWarning(UserWarning):
    """What was to be compiled runs as it is, and why."""


class Compiler:
    """Runs functions of tensors, compiled where that gives the same numbers.

    `compiler(function, key, *args)` is `function(*args)`. `key` stands for all that the function
    depends on besides its arguments, which are trees of tensors; the first call with a new key, or
    with tensors of other shapes, dtypes or devices, compiles: seconds to minutes, once.

    On that call the compiled result is held to the function's own, to the square root of the dtype's
    precision. Where it differs, where the function draws random numbers, or where it cannot be traced
    or compiled, a `CompileWarning` says why, and the function runs as it is. With `auto` both ways are
    timed as well, and the faster one stays.

    >>> compiler = Compiler()
    >>> compiler.count
    0
    """

    @classmethod
    def of(cls, owner: str, setting: Compile) -> "Compiler | None":
        """What an executor with this setting compiles with; None where it does not.

        Raises `BlockError` for another setting than True, False or "auto".
        """
        if setting is not True and setting is not False and setting != "auto":
            raise BlockError(f'{owner} compile is {setting!r}; it takes True, False or "auto"')
        return cls(auto=setting == "auto") if setting else None

    def __init__(self, *, auto: bool = False) -> None:
        self.auto = auto
        self._made: dict[Hashable, Callable[..., Any] | None] = {}

    @property
    def count(self) -> int:
        """How many compiled functions there are."""
        return sum(made is not None for made in self._made.values())

    def __call__(self, function: Callable[..., Any], key: Hashable, *args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        kind = (key, spec, *map(_kind, leaves), *_autocast(leaves))
        try:
            known = kind in self._made
        except TypeError as error:
            raise BlockError(
                f"what is to be compiled cannot be told by its key: {error}"
            ) from error
        if not known:
            expected = function(*args)
            self._made[kind] = self._make(_Flat(function, spec), leaves, expected)
            return expected
        made = self._made[kind]
        return function(*args) if made is None else made(leaves)

    def __deepcopy__(self, memo: Any) -> "Compiler":
        return Compiler(auto=self.auto)

    def __reduce__(self) -> Any:
        return _fresh, (self.auto,)

    def _make(
        self, flat: "_Flat", leaves: list[Any], expected: Any
    ) -> Callable[[list[Any]], Any] | None:
        """The compiled function of leaves; None, with a warning, where it is not to be used."""
        started = time.perf_counter()
        log.info("compiling, once for these shapes; that takes a minute or two")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about PyTorch
                compiled = _compile(flat, leaves)
                _check(compiled(*leaves), pytree.tree_leaves(expected))
        except Exception as error:  # whatever tracer, torch.compile and the C++ compiler raise
            what = "" if isinstance(error, _Unfit) else f"{type(error).__name__}: "
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message = f"not compiled, but run as it is: {what}{' '.join(lines[:3])}"
            warnings.warn(message, CompileWarning, stacklevel=_TO_THE_CALLER)
            return None
        log.info("compiled in %.0f s", time.perf_counter() - started)
        if self.auto:
            plain, fast = (_best_time(way, leaves) for way in (flat, compiled))
            log.info("a call takes %.3g ms, compiled %.3g ms", 1000 * plain, 1000 * fast)
            if fast >= plain:
                return None
        return lambda leaves: pytree.tree_unflatten(compiled(*leaves), flat.out_spec)


class _Unfit(Exception):  # noqa: N818  (a reason, which becomes a warning)
    """Why a function is not compiled."""


class _Flat:
    """A function of trees as one of a list of leaves, to a list of leaves."""

    def __init__(self, function: Callable[..., Any], spec: Any) -> None:
        self.function = function
        self.spec = spec
        self.out_spec: Any = None

    def __call__(self, *leaves: Any) -> list[Any]:
        result = self.function(*pytree.tree_unflatten(list(leaves), self.spec))
        outputs, self.out_spec = pytree.tree_flatten(result)
        return outputs


def _compile(flat: _Flat, leaves: list[Any]) -> Callable[..., list[Tensor]]:
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and rarely needed

    devices = {x.device for x in leaves if _on_accelerator(x)}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([d.index for d in devices], device_type=kind):
        graph: torch.fx.GraphModule = make_fx(flat)(*leaves)  # runs the function
    graph.graph.eliminate_dead_code()
    graph.recompile()
    drawing = {
        str(node.target)
        for node in graph.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    }
    if drawing:
        raise _Unfit(f"it draws random numbers ({', '.join(sorted(drawing))})")
    compiled: Callable[..., list[Tensor]] = torch.compile(graph, dynamic=False, fullgraph=True)
    return compiled


def _check(got: Sequence[Tensor], due: Sequence[Tensor]) -> None:
    """Raise `_Unfit` where ‖got − due‖ / ‖due‖ over all numbers is more than rounding explains."""
    within = max((torch.finfo(x.dtype).eps ** 0.5 for x in due if x.is_floating_point()), default=0)
    difference = norm = 0.0
    for a, b in zip(got, due, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            raise _Unfit("it gives nan in other places than the function itself")
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
    error = (difference / norm if norm else difference) ** 0.5
    if not error <= within:
        raise _Unfit(
            f"its results differ from the function's own by {error:.1e}, relatively; rounding "
            f"explains {within:.0e}"
        )


_TO_THE_CALLER = 8  # frames up to whoever asks a learner for a meta-gradient


def _best_time(function: Callable[..., Any], leaves: list[Any]) -> float:
    def once() -> float:
        started = time.perf_counter()
        function(*leaves)
        for leaf in leaves:
            if _on_accelerator(leaf):
                torch.accelerator.synchronize(leaf.device)
                break
        return time.perf_counter() - started

    return min(once() for _ in range(_ROUNDS))


def _kind(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _autocast(leaves: list[Any]) -> list[Hashable]:
    types = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
    return [torch.is_autocast_enabled(t) and torch.get_autocast_dtype(t) for t in types]


def _on_accelerator(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "cpu"


def _fresh(auto: bool) -> Compiler:
    return Compiler(auto=auto)
