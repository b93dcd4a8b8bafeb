"""Functions of tensors as flat graphs of operations, run as they are or compiled."""

import linecache
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from metablocks.devices import has_float64, in_float64
from metablocks.generators import EXPORTING, Calls, is_random

Graph: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Unfit(Exception):  # noqa: N818  (a reason, which becomes a warning)
    """The reason that a function is not traced or compiled."""


class Traced(NamedTuple):
    """The operations that a function of tensors came down to."""

    graph: torch.fx.GraphModule
    constants: list[Tensor]
    """Tensors that it takes first, made or met on the way."""


def trace(function: Callable[..., list[Tensor]], leaves: Sequence[Tensor]) -> Traced:
    """The operations that a function of tensors comes down to; it is run for that.

    Raises `Unfit` where they would not be those of other numbers.
    """
    from torch._guards import TracingContext, tracing  # slow to import, and rarely needed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {torch.ops.aten.native_batch_norm.default: _writing_batch_norm}
    # Without one in the context, the tracer makes a mode for each operation, and takes twice as long.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        with Calls(_refuse_numbers):
            graph: torch.fx.GraphModule = make_fx(function, decomposition_table=table)(
                *map(_apart, leaves)  # runs the function
            )
        if any(
            getattr(node.target, "_schema", None) and node.target._schema.is_mutable
            for node in graph.graph.nodes
        ):
            pure = torch.func.functionalize(graph, remove="mutations")
            graph = make_fx(pure)(*map(_apart, leaves))
    for node in graph.graph.nodes:
        drawn = is_random(node.target, node.args, node.kwargs)
        if drawn and node.kwargs.get("generator") is not None:
            raise Unfit(f"it draws random numbers from a generator of its own ({node.target})")
    sized = {str(node.target) for node in graph.graph.nodes if _has_size_of_data(node)}
    if sized:
        raise Unfit(
            f"sizes in it depend on the data ({', '.join(sorted(sized))}), and a trace would keep those "
            "of the first task"
        )
    constants = _lift_constants(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Traced(graph, constants)


_CONVERTING: tuple[Any, ...] = (
    *(Tensor.item, Tensor.__bool__, Tensor.__index__),
    *(Tensor.__int__, Tensor.__float__, Tensor.__complex__),
)


def _refuse_numbers(function: Any, args: tuple[Any, ...]) -> None:
    """Raise `Unfit` where numbers of a tensor leave PyTorch, past the trace: it would keep them."""
    held = function in _CONVERTING and _is_held(args[0])
    if held or function in (*EXPORTING, Tensor.tolist):
        raise Unfit(
            f"it takes numbers out of PyTorch (Tensor.{function.__name__}), and a trace would keep those "
            "of the first task"
        )


def _is_held(tensor: Tensor) -> bool:
    """True for a tensor that was there before the trace, in which it is, and may be written unseen."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot  # as make_fx

    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    mode = get_proxy_mode()
    return mode is not None and get_proxy_slot(tensor, mode.tracer, None) is None


def _writing_batch_norm(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *rest: Any,
) -> Any:
    """The operation by the name under which it says that it writes into running statistics."""
    if mean is None or variance is None:
        return NotImplemented
    given = (inputs, weight, bias, mean, variance, *rest)
    return torch.ops.aten._native_batch_norm_legit.default(*given)


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make arguments, which come first, of the tensors that a trace took for constants."""
    constants: dict[str, tuple[Tensor, Any]] = {}
    first = next(iter(graph.graph.nodes))
    for node in [*graph.graph.nodes]:
        if node.op == "get_attr":
            if node.target not in constants:
                value = getattr(graph, node.target)
                with graph.graph.inserting_before(first):
                    place = graph.graph.placeholder(f"constant_{len(constants)}")
                place.meta["val"] = value
                constants[node.target] = value, place
            node.replace_all_uses_with(constants[node.target][1])
            graph.graph.erase_node(node)
    return [value for value, _ in constants.values()]


def _apart(tensor: Tensor) -> Tensor:
    """The same tensor as another object: of one that is given twice a trace makes one argument."""
    return torch.ops.aten.alias(tensor)  # type: ignore[no-any-return]


def _has_size_of_data(node: Any) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    masks = (index.meta.get("val") for index in node.args[1] if index is not None)
    return any(mask is None or mask.dtype in (torch.bool, torch.uint8) for mask in masks)


def compiled(traced: Traced, leaves: Sequence[Tensor], *, fuse: bool) -> Graph:
    """The graph as a function of a list of tensors, fused by PyTorch's compiler or as it is."""
    run = _compiled(traced.graph, [*traced.constants, *leaves], fuse)
    return _after(traced.constants, run)


def compiled_apart(
    traced: Traced, leaves: Sequence[Tensor], inputs: int, outputs: int, *, fuse: bool
) -> tuple[Graph, Graph]:
    """A graph cut in two: the first `outputs` of the first `inputs`, and what comes back by the others.

    The way forwards returns what the way back takes first, behind its own outputs.
    """
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graph, given = traced.graph, [*traced.constants, *leaves]
    inputs += len(traced.constants)
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(places):  # names by which the partition goes
        kind, number = ("primals", index) if index < inputs else ("tangents", index - inputs)
        node.name = node.target = f"{kind}_{number + 1}"
    graph.graph = fx_graph_cse(graph.graph)
    forward, backward = min_cut_rematerialization_partition(graph, given, num_fwd_outputs=outputs)
    left = [node.name for node in next(iter(reversed(forward.graph.nodes))).args[0][outputs:]]
    left += [node.name for node in places[inputs:]]
    taken = [left.index(n.name) for n in backward.graph.nodes if n.op == "placeholder"]
    run = _compiled(forward, given[:inputs], fuse)
    saved = [*run(given[:inputs])[outputs:], *given[inputs:]]
    back = _compiled(backward, [saved[index] for index in taken], fuse)
    whole = _after(traced.constants, run)
    if taken == [*range(len(saved))]:
        return whole, back
    return whole, lambda leaves: back([leaves[index] for index in taken])


def _compiled(graph: torch.fx.GraphModule, leaves: Sequence[Tensor], fuse: bool) -> Graph:
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = [index for index, node in enumerate(places) if node.users]
    for node in places:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    if not fuse:
        for node in graph.graph.nodes:  # which served to make it, and takes more than the graph
            node.meta.clear()
        return lambda leaves: graph(*[leaves[index] for index in used])
    run = fused(graph, [leaves[index] for index in used])
    return lambda leaves: run([leaves[index] for index in used])


def fused(graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Graph:
    """The graph compiled, without the layers around it that serve autograd and changed inputs.

    What it returns takes a list of its own, and empties it.
    """
    from torch._guards import TracingContext, tracing  # slow to import, and rarely needed
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import decompositions
    from torch._inductor.exc import CppCompileError
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without the environment of shapes, in which there is nothing, no graph is kept for the next process.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes = [mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
    settings = {
        "cpp.dynamic_threads": True,  # fewer within a loop's workers than when it is made
        "fallback_random": True,  # the random numbers are those of PyTorch's own operations
        "size_asserts": False,  # of arguments of other sizes there is another graph
    }
    # To try which instructions the C++ compiler knows takes longer than to compile a small net. So
    # they are tried only where it does not know those of the processor.
    for known in (True, None):
        with mode:
            lowered = make_fx(graph, decomposition_table=decompositions)(*fakes)
        lowered.graph.eliminate_dead_code()
        output = next(iter(reversed(lowered.graph.nodes)))
        output.meta["user_visible_output_idxs"] = [*range(len(output.args[0]))]
        with config.patch(settings | {"cpp.vec_isa_ok": known}), tracing(TracingContext(mode)):
            try:
                made: Any = compile_fx_inner(joint_graph_passes(lowered), fakes, is_inference=True)
                break
            except CppCompileError:
                if known is None:
                    raise
    # Around it are a profiler's mark and what serves CUDA's autotuning, each time anew.
    return getattr(made, "current_callable", None) or made  # type: ignore[no-any-return]


def _after(constants: list[Tensor], run: Graph) -> Graph:
    return (lambda leaves: run([*constants, *leaves])) if constants else run


@contextmanager
def forgetting_sources() -> Iterator[None]:
    """Forget the sources of the graphs that are made meanwhile.

    torch.fx keeps the Python source of each graph for tracebacks, for as long as the process lives.
    """
    loader = getattr(torch.fx.graph_module, "_loader", None)  # torch's own, which may go
    kept: dict[str, str] = getattr(loader, "eval_cache", {})
    before = {*kept}
    try:
        yield
    finally:
        for key in kept.keys() - before:
            kept.pop(key, None)
            linecache.cache.pop(key, None)


def difference(
    got: Sequence[Tensor], expected: Sequence[Tensor], in_double: Callable[[], Sequence[Tensor]]
) -> str | None:
    """The difference of results from the expected ones, in words; None if rounding explains it.

    That is the square root of the dtype's precision. Where a kink of the net or a low precision makes
    more of it, rounding is measured: what is expected in double precision is the truth, and the result
    may be twice as far from it as the expected one is.
    """
    within = max(
        (torch.finfo(x.dtype).eps ** 0.5 for x in expected if x.is_floating_point()), default=0
    )
    if [x.shape for x in got] != [x.shape for x in expected]:
        return "its results have other shapes than the function's own"
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in zip(got, expected, strict=True)):
        return "it gives nan in other places than the function itself"
    error = _distance(got, expected)
    if error <= within:
        return None
    message = f"its results differ from the function's own by {error:.1e}, relatively; rounding "
    truth = None
    if any(x.dtype != torch.float64 for x in expected if x.is_floating_point()):
        # A module may have no double precision, or be bound to its device.
        with suppress(Exception):
            truth = in_double()
    if truth is None:
        return f"{message}explains {within:.0e}"
    error, usual = (_distance(result, truth) for result in (got, expected))
    if error <= 2 * usual:
        return None
    return f"{message}explains {within:.0e}, and {usual:.1e} as measured in double precision"


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all numbers; what is not finite counts as zero."""
    difference = norm = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = (in_float64(t).nan_to_num(0.0, 0.0, 0.0) for t in (x, y))
        difference += float((x - y).square().sum())
        norm += float(y.square().sum())
    return math.sqrt(difference / norm if norm else difference)


def double(leaf: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    if leaf.is_floating_point():
        return in_float64(leaf)
    return leaf if has_float64(leaf.device) else leaf.cpu()
