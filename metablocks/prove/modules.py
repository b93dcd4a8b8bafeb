"""Which module of a model a missing or wrong derivative comes from: each is tried by itself.

Fused attention, cuDNN's recurrent layers and functions of one's own run forwards and backwards, and
may fail only where the meta-gradient looks through an inner step, or give zeros there without a word:
a function marked `once_differentiable` raises in plain autograd, and under `torch.func` its second
derivative is silently zero.

A module may write its inputs and buffers in place, as `nn.ReLU(inplace=True)` and batch norms do: it gets
copies, made within the derivative at hand, as a learner and the modules before it make them. Only the
batch itself is handed on as it is: `torch.func` refuses to write into what it has not seen made.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.errors import first_line
from metablocks.functional import module_arguments
from metablocks.laws.gradients import slopes
from metablocks.types import Tensors


class Call(NamedTuple):
    """The arguments of a module as they were before the call, and where they come from."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    batch: frozenset[int]
    """Which of their leaves are tensors of the batch, and not made by the model."""


Test = Callable[[nn.Module, Call], str]

_WITHIN = 1e-5  # of a slope by finite differences, relative to it


@dataclass(frozen=True)
class Finding:
    """A module, and what is wrong with it."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


def without_second_derivative(model: nn.Module, inputs: Any) -> list[Finding]:
    """The innermost modules whose gradient cannot be differentiated, on the inputs that they get.

    >>> without_second_derivative(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2))
    []
    """
    return _innermost(model, inputs, _no_second_derivative)


def refused_by_transforms(model: nn.Module, inputs: Any) -> list[Finding]:
    """The innermost modules that `torch.func` cannot run.

    >>> refused_by_transforms(nn.Sequential(nn.Linear(2, 2), nn.ELU(inplace=True)), torch.ones(1, 2))
    []
    """
    return _innermost(model, inputs, _refused)


def with_wrong_derivative(model: nn.Module, inputs: Any) -> list[Finding]:
    """The innermost modules whose first or second derivative is not the slope of what it is of.

    >>> with_wrong_derivative(nn.Linear(2, 2).double(), torch.ones(3, 2).double())
    []
    """
    return _innermost(model, inputs, _wrong)


def _innermost(model: nn.Module, inputs: Any, test: Test) -> list[Finding]:
    model = copy.deepcopy(model)
    calls = _calls(model, inputs)
    found: dict[str, Finding] = {}
    for name in sorted(calls, key=_depth, reverse=True):
        start = f"{name}." if name else ""
        if any(other.startswith(start) for other in found):
            continue
        module = model.get_submodule(name)
        with torch.random.fork_rng(devices=[]):
            reason = test(module, calls[name])
        if reason:
            path = f"model.{name}" if name else "model"
            found[name] = Finding(path, type(module).__name__, reason)
    return list(found.values())


def _calls(model: nn.Module, inputs: Any) -> dict[str, Call]:
    """The first call of every module in one pass of the model, by the module's name."""
    calls: dict[str, Call] = {}
    handles = []
    args, kwargs = _copied(module_arguments(inputs))
    batch = {_whole(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)}
    for name, module in model.named_modules():

        def remember(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if name not in calls:
                leaves = enumerate(pytree.tree_leaves((args, kwargs)))
                given = frozenset(k for k, x in leaves if _is_tensor(x) and _whole(x) in batch)
                calls[name] = Call(_copied((args, kwargs)), given)

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return calls


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _no_second_derivative(module: nn.Module, call: Call) -> str:
    leaves, value = _scalar(module, call)
    loss = value()
    if not loss.requires_grad:
        return ""
    try:
        slope = _slope(loss, leaves)
        if slope.requires_grad:
            # Not `grad`, which would pass by a node that does nothing but raise.
            torch.autograd.backward(slope)
    except RuntimeError as error:
        return first_line(error)
    return ""


def _refused(module: nn.Module, call: Call) -> str:
    params = dict(module.named_parameters())
    leaves, spec = pytree.tree_flatten(_copied(call.arguments))
    made = {k: x for k, x in enumerate(leaves) if _is_tensor(x) and k not in call.batch}

    def run(params: Tensors, floats: dict[int, Tensor]) -> Any:
        # As if the model had made them: a copy is known to the derivative and to no one else.
        own = _copied(made | floats)
        args, kwargs = pytree.tree_unflatten([own.get(k, x) for k, x in enumerate(leaves)], spec)
        tensors = params | _copied(dict(module.named_buffers()))
        outputs = torch.func.functional_call(module, tensors, args, kwargs)
        return [x for x in pytree.tree_leaves(outputs) if _is_float(x)]

    try:
        torch.func.vjp(run, params, {k: x for k, x in made.items() if _is_float(x)})
    except RuntimeError as error:
        return first_line(error)
    return ""


def _wrong(module: nn.Module, call: Call) -> str:
    leaves, value = _scalar(module, call)
    loss = value()
    if not loss.requires_grad:
        return ""
    named = {str(k): leaf for k, leaf in enumerate(leaves)}

    def off(tensors: Sequence[Tensor | None], function: Callable[[], Tensor]) -> float:
        directions, found = slopes(named, function)
        pairs = zip(tensors, named, strict=True)
        got = {n: 0.0 if g is None else float((g * directions[n]).sum()) for g, n in pairs}
        scale = max(1e-3, *(abs(float(slope)) for slope in found.values()))
        return max(abs(got[name] - float(found[name])) for name in named) / scale

    try:
        first = torch.autograd.grad(loss, leaves, allow_unused=True)
        error = off(first, lambda: value().detach())
        if not error <= _WITHIN:
            return f"its gradient is off its slope by {error:.1e}"
        slope = _slope(value(), leaves)
        second: Sequence[Tensor | None] = [None] * len(leaves)
        if slope.requires_grad:
            second = torch.autograd.grad(slope, leaves, allow_unused=True)
        error = off(second, lambda: _slope(value(), leaves).detach())
    except RuntimeError as raised:
        return first_line(raised)
    return "" if error <= _WITHIN else f"its second derivative is off by {error:.1e}"


def _scalar(module: nn.Module, call: Call) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Tensors that a module's output depends on, and a number made of the output."""

    def fresh(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_() if _is_float(leaf) else leaf

    arguments = pytree.tree_map(fresh, call.arguments)
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if _is_float(leaf)]
    leaves += [p for p in module.parameters() if p.requires_grad]

    def value() -> Tensor:
        torch.manual_seed(0)
        with torch.enable_grad():
            args, kwargs = _copied(arguments)
            outputs = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if _is_float(x)]
            return torch.stack(
                [(x + x.square()).mean() for x in outputs] or [torch.zeros(())]
            ).sum()

    return leaves, value


def _slope(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """A number made of the gradient of `loss`, with the graph that it has."""
    with torch.enable_grad():
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        return torch.stack([(g + g.square()).sum() for g in grads if g is not None]).sum()


def _copied(tree: Any) -> Any:
    """The tree with copies of its tensors, differentiable in them."""
    return pytree.tree_map(lambda leaf: leaf.clone() if _is_tensor(leaf) else leaf, tree)


def _whole(tensor: Tensor) -> int:
    """Which tensor this is, or is a view of."""
    return id(tensor if tensor._base is None else tensor._base)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
