"""The module of a model that lacks a second derivative: each module is tried by itself.

Functions of one's own and some of PyTorch's kernels run forwards and backwards, and fail only where the
meta-gradient looks through an inner step.

A module may write its inputs and buffers in place, as `nn.ReLU(inplace=True)` and batch norms do: it gets
copies, made within the derivative at hand, as a learner and the modules before it make them. Only the
batch itself is handed on as it is: `torch.func` refuses to write into what it has not seen made.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.checks import shown
from metablocks.errors import first_line, is_stated
from metablocks.functional import module_arguments
from metablocks.generators import devices_of, kept_draws
from metablocks.kernels import twice_differentiable, unfused


class Call(NamedTuple):
    """The arguments of a module as they were before the call, and where they come from."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    batch: frozenset[int]
    """True for those of their leaves that are tensors of the batch, and not made by the model."""


Test = Callable[[nn.Module, Call], str]


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
    with twice_differentiable():
        return innermost(model, inputs, unfused(_no_second_derivative))


def unfit_data(error: Exception, model: nn.Module, batch: Any) -> str:
    """A sentence on the form of data, if Python or torch refused it by an error; else nothing.

    Also nothing for an error that other code states: a model's or a loss's own.

    Numbers and arrays in the place of tensors, dtypes and shapes that model or loss do not take.

    >>> unfit_data(TypeError("no Tensor"), nn.Linear(1, 1), ([[1.0]], [[2.0]]))
    'no Tensor; the inputs are a list, the target is a list: give tensors, as by torch.tensor(…)'
    """
    message = first_line(error).rstrip(".")
    if type(error) not in (TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        return ""
    if is_stated(error):
        return ""
    leaves = pytree.tree_leaves(batch)
    inputs, target = map(_form, batch)
    data = f"{message}; the inputs are {inputs}, the target is {target}"
    if any(
        isinstance(leaf, int | float | np.ndarray | np.generic) for leaf in leaves
    ) and isinstance(error, TypeError | AttributeError):
        return f"{data}: give tensors, as by torch.tensor(…)"
    if not isinstance(error, RuntimeError | IndexError | ValueError):
        return ""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and "meta" in message:
        return (
            f"{message}; {empty[0]} of the model is on the device meta, which holds no numbers: make the "
            "model with weights, as by model.to_empty(device=...) and a state dict"
        )
    places = {str(x.device) for x in leaves if isinstance(x, Tensor)}
    here = {str(parameter.device) for parameter in model.parameters()}
    if places != here and "device" in message:
        return (
            f"{message}; the data are on {', '.join(sorted(places))}, and the model is on "
            f"{', '.join(sorted(here))}: move the tasks, as by tasks.to(device)"
        )
    own = {parameter.dtype for parameter in model.parameters()}
    foreign = any(
        leaf.dtype not in known
        for tree, known in zip(batch, (own, own | {torch.int64}), strict=True)
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor)
    )
    if foreign and re.search("dtype|scalar type", message):
        return (
            f"{data}, and the model's parameters are {', '.join(sorted(map(str, own)))}: give inputs of "
            "that dtype, and class numbers as target.long()"
        )
    if re.search("size|shape|dimension|channels|out of bounds|out of range", message):
        return f"{data}, which do not fit the model or the loss"
    return ""


def _form(tree: Any) -> str:
    leaves = pytree.tree_leaves(tree)
    if isinstance(tree, Tensor) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return f"a {type(tree).__name__}" if not isinstance(tree, Tensor) else shown(tree)
    return ", ".join(map(shown, leaves)) or "nothing"


def innermost(model: nn.Module, inputs: Any, test: Test) -> list[Finding]:
    """The innermost modules that fail a test, which says why or nothing."""
    model = copy.deepcopy(model)
    devices = devices_of((dict(model.named_parameters()), inputs))
    calls = _calls(model, inputs)
    found: dict[str, Finding] = {}
    for name in sorted(calls, key=_depth, reverse=True):
        start = f"{name}." if name else ""
        if any(other.startswith(start) for other in found):
            continue
        module = model.get_submodule(name)
        with kept_draws(devices):
            reason = test(module, calls[name])
        if reason:
            path = f"model.{name}" if name else "model"
            found[name] = Finding(path, type(module).__name__, reason)
    return list(found.values())


def _calls(model: nn.Module, inputs: Any) -> dict[str, Call]:
    """The first call of every module in one pass of the model, by the module's name."""
    calls: dict[str, Call] = {}
    handles = []
    args, kwargs = copied(module_arguments(inputs))
    batch = {_whole(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if is_tensor(leaf)}
    for name, module in model.named_modules():

        def remember(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if name not in calls:
                leaves = enumerate(pytree.tree_leaves((args, kwargs)))
                given = frozenset(k for k, x in leaves if is_tensor(x) and _whole(x) in batch)
                calls[name] = Call(copied((args, kwargs)), given)

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    with kept_draws(devices_of((args, kwargs))), torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return calls


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _no_second_derivative(module: nn.Module, call: Call) -> str:
    leaves, value = scalar(module, call)
    loss = value()
    if not loss.requires_grad:
        return ""
    try:
        taken = slope(loss, leaves)
        if taken.requires_grad:
            # Not `grad`, which would pass by a node that does nothing but raise.
            torch.autograd.backward(taken)
    except RuntimeError as error:
        return first_line(error)
    return ""


def scalar(module: nn.Module, call: Call) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Tensors that a module's output depends on, and a number made of the output."""

    def fresh(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_() if is_float(leaf) else leaf

    arguments = pytree.tree_map(fresh, call.arguments)
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if is_float(leaf)]
    leaves += [p for p in module.parameters() if p.requires_grad]

    def value() -> Tensor:
        torch.manual_seed(0)
        with torch.enable_grad():
            args, kwargs = copied(arguments)
            outputs = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if is_float(x)]
            return torch.stack(
                [(x + x.square()).mean() for x in outputs] or [torch.zeros(())]
            ).sum()

    return leaves, value


def slope(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """A number made of the gradient of `loss`, with the graph that it has."""
    with torch.enable_grad():
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        return torch.stack([(g + g.square()).sum() for g in grads if g is not None]).sum()


def copied(tree: Any) -> Any:
    """The tree with copies of its tensors, differentiable in them."""
    return pytree.tree_map(lambda leaf: leaf.clone() if is_tensor(leaf) else leaf, tree)


def _whole(tensor: Tensor) -> int:
    """Identity of the tensor that this is, or is a view of."""
    return id(tensor if tensor._base is None else tensor._base)


def is_tensor(leaf: Any) -> bool:
    """True for a tensor."""
    return isinstance(leaf, Tensor)


def is_float(leaf: Any) -> bool:
    """True for a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
