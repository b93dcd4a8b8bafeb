"""Whole functions of tensors, traced once for each kind of arguments, and compiled.

What is traced contains its own derivatives: the function runs once under a tracer that sees through
`torch.func`. The flat graph of operations that comes out may run as it is, without the many layers of
Python and of transforms above them, or go to `torch.compile`. (A double backward *through* a compiled
region is what `torch.compile` does not do.)
"""

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metablocks.devices import has_float64, in_float64
from metablocks.errors import BlockError, caller_stacklevel
from metablocks.generators import devices_of, is_random, kept_draws

Compile = bool | Literal["trace", "auto"]

log = logging.getLogger("metablocks")

_ROUNDS = 3  # timed runs of every way, for "auto"
_MOST = 64  # functions that are kept; the oldest goes
_KNOWN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class CompileWarning(UserWarning):
    """Warns that a function could not be traced or compiled and runs as it is."""


class Compiler:
    """Runs functions of tensors, traced or compiled where that gives the same numbers.

    `compiler(function, key, *args)` is `function(*args)`. `key` stands for all that the function
    depends on besides its arguments, which are trees of tensors; the first call with a new key, or
    with tensors of other shapes, strides, dtypes or devices, makes it anew. Without a key the function
    runs as it is. The settings are

    - False: the function itself;
    - "trace": the operations that the function came down to, one after another. It takes seconds to
      make and keeps their order, and so the function's memory;
    - True: those, fused and compiled by `torch.compile`. It takes a minute or two to make;
    - "auto": whichever of the two, or the function itself, is fastest; all are timed on that call.

    On that call the result is held to the function's own, to what rounding explains: the square root
    of the dtype's precision, or as much as is measured in double precision. Where it differs by more,
    where the function draws random numbers or has sizes that depend on the data, or where it cannot be
    traced or compiled, a `CompileWarning` says why, and the function runs as it is. Threads may share
    one.

    What a learner puts into its key are the fingerprints of model, rule, loss and metric: the module
    `metablocks.fingerprint` says what they see, and what they do not. A change that is seen makes the
    function anew, and one that goes back to what was finds what was made.

    >>> compiler = Compiler("trace")
    >>> add = lambda x: x + 1
    >>> [int(compiler(add, "add", torch.tensor(n))) for n in (1, 2)], compiler.count
    ([2, 3], 1)
    """

    def __init__(self, setting: Compile) -> None:
        self.setting = setting
        self._made: dict[Hashable, Callable[..., Any] | None] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """The number of compiled functions."""
        return sum(made is not None for made in self._made.values())

    def __call__(self, function: Callable[..., Any], key: Hashable | None, *args: Any) -> Any:
        if not self.setting or key is None:
            return function(*args)
        leaves, spec = pytree.tree_flatten(args)
        kind = (key, spec, *map(_kind, leaves), *_autocast(leaves))
        try:
            known = kind in self._made
        except TypeError as error:
            raise BlockError(
                f"what is to be compiled cannot be told by its key: {error}"
            ) from error
        if not known:
            with self._lock:  # the threads that come meanwhile wait, and find it made
                if kind not in self._made:
                    expected = function(*args)
                    if len(self._made) >= _MOST:
                        del self._made[next(iter(self._made))]
                    outputs = pytree.tree_leaves(expected)
                    self._made[kind] = self._make(_Flat(function, spec), leaves, outputs)
                    return expected
        made = self._made[kind]
        return function(*args) if made is None else made(leaves)

    def __deepcopy__(self, memo: Any) -> "Compiler":
        return Compiler(self.setting)

    def __reduce__(self) -> Any:
        return Compiler, (self.setting,)

    def _make(
        self, flat: "_Flat", leaves: list[Any], expected: list[Any]
    ) -> Callable[[list[Any]], Any] | None:
        """The compiled callable of the leaves, or None to keep calling the function."""
        ways: dict[str, Callable[..., list[Tensor]]] = {"as it is": flat}
        if self.setting != "trace":
            log.info("compiling, once for these shapes; that takes a minute or two")
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about PyTorch
                graph = _trace(flat, leaves)
                if self.setting is not True:
                    _check(graph(*leaves), expected, flat, leaves)
                    ways["traced"] = graph
                if self.setting != "trace":
                    compiled = _compile(graph)
                    _check(compiled(*leaves), expected, flat, leaves)
                    ways["compiled"] = compiled
            log.info("%s in %.0f s", list(ways)[-1], time.perf_counter() - started)
        except Exception as error:  # whatever tracer, torch.compile and the C++ compiler raise
            what = "" if isinstance(error, _Unfit) else f"{type(error).__name__}: "
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            done = "only traced" if "traced" in ways else "run as it is"
            message = f"not {'traced' if self.setting == 'trace' else 'compiled'}, but {done}: "
            message += f"{what}{' '.join(lines[:3])}"
            warnings.warn(message, CompileWarning, stacklevel=caller_stacklevel())
        best = list(ways)[-1]
        if self.setting == "auto" and len(ways) > 1:
            times = {way: _best_time(run, leaves) for way, run in ways.items()}
            best = min(times, key=lambda way: times[way])
            figures = ", ".join(f"{way} {1000 * seconds:.3g} ms" for way, seconds in times.items())
            log.info("a call takes %s", figures)
        run = ways[best]
        return (
            None
            if run is flat
            else lambda leaves: pytree.tree_unflatten(run(*leaves), flat.out_spec)
        )


class _Unfit(Exception):  # noqa: N818  (a reason, which becomes a warning)
    """The reason that a function is not compiled."""


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


def _trace(flat: _Flat, leaves: list[Any]) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and rarely needed

    alien = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _KNOWN)}
    if alien:
        raise _Unfit(
            f"its arguments hold {', '.join(sorted(alien))}, whose tensors would be taken for constants; "
            "hand over tuples, lists and dicts of tensors"
        )
    with kept_draws(devices_of(leaves)):
        graph: torch.fx.GraphModule = make_fx(flat)(*map(_apart, leaves))  # runs the function
    drawing = {
        str(node.target)
        for node in graph.graph.nodes
        if is_random(node.target, node.args, node.kwargs)
    }
    if drawing:
        raise _Unfit(f"it draws random numbers ({', '.join(sorted(drawing))})")
    sized = {str(node.target) for node in graph.graph.nodes if _has_size_of_data(node)}
    if sized:
        raise _Unfit(
            f"sizes in it depend on the data ({', '.join(sorted(sized))}), and a trace would keep those "
            "of the first task"
        )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _apart(leaf: Any) -> Any:
    """The same tensor as another object: of one that is given twice a trace makes one argument."""
    return torch.ops.aten.alias(leaf) if isinstance(leaf, Tensor) else leaf


def _has_size_of_data(node: Any) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    masks = (index.meta.get("val") for index in node.args[1] if index is not None)
    return any(mask is None or mask.dtype in (torch.bool, torch.uint8) for mask in masks)


def _compile(graph: torch.fx.GraphModule) -> Callable[..., list[Tensor]]:
    compiled: Callable[..., list[Tensor]] = torch.compile(graph, dynamic=False, fullgraph=True)
    return compiled


def _check(
    got: Sequence[Tensor], expected: Sequence[Tensor], function: _Flat, leaves: list[Any]
) -> None:
    """Raise `_Unfit` where a result is further from the function's own than rounding explains.

    That is the square root of the dtype's precision. Where a kink of the net or a low precision makes
    more of it, rounding is measured: the function itself in double precision is the truth, and the
    result may be twice as far from it as the function's own is.
    """
    within = max(
        (torch.finfo(x.dtype).eps ** 0.5 for x in expected if x.is_floating_point()), default=0
    )
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in zip(got, expected, strict=True)):
        raise _Unfit("it gives nan in other places than the function itself")
    error = _distance(got, expected)
    if error <= within:
        return
    message = f"its results differ from the function's own by {error:.1e}, relatively; rounding "
    truth = _in_double(function, leaves)
    if truth is None:
        raise _Unfit(f"{message}explains {within:.0e}")
    error, usual = (_distance(result, truth) for result in (got, expected))
    if not error <= 2 * usual:
        raise _Unfit(
            f"{message}explains {within:.0e}, and {usual:.1e} as measured in double precision"
        )


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all numbers; nan counts as zero."""
    difference = norm = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = in_float64(x).nan_to_num(), in_float64(y).nan_to_num()
        difference += float((x - y).square().sum())
        norm += float(y.square().sum())
    return math.sqrt(difference / norm if norm else difference)


def _in_double(function: _Flat, leaves: list[Any]) -> list[Tensor] | None:
    """The function at its arguments in float64; None where it is there already, or cannot be."""
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if all(x.dtype == torch.float64 for x in floats):
        return None
    try:
        return function(*map(_double, leaves))
    except Exception:  # a module that has no double precision, or is bound to its device
        return None


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return in_float64(leaf)
    return leaf if has_float64(leaf.device) else leaf.cpu()


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


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return (leaf if isinstance(leaf, _KNOWN) else type(leaf),)


def _autocast(leaves: list[Any]) -> list[Hashable]:
    types = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
    return [torch.is_autocast_enabled(t) and torch.get_autocast_dtype(t) for t in types]


def _on_accelerator(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "cpu"
