"""Which module has a kernel that cannot be differentiated twice: a grad-of-grad probe of each.

Fused attention, cuDNN's recurrent layers and functions of one's own marked `once_differentiable` run
forwards and backwards, and fail only where the meta-gradient looks through an inner step.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.functional import module_arguments


@dataclass(frozen=True)
class OnceOnly:
    """A module whose gradient has no gradient."""

    name: str
    kind: str
    reason: str
    """What PyTorch said."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


REMEDY = (
    "use order: {block: first_order}; or an operation with a second derivative: for fused attention "
    "run under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for cuDNN's recurrent layers under "
    "torch.backends.cudnn.flags(enabled=False)"
)


def once_only(model: nn.Module, inputs: Any) -> list[OnceOnly]:
    """The innermost modules that fail a second derivative, on the inputs that they get.

    >>> once_only(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2))
    []
    """
    model = copy.deepcopy(model)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for name, module in model.named_modules():

        def remember(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls.setdefault(name, (args, kwargs))

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    args, kwargs = module_arguments(inputs)
    with torch.enable_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    found: dict[str, OnceOnly] = {}
    for name in sorted(calls, key=lambda name: -name.count(".") - bool(name)):
        inside = any(other.startswith(f"{name}." if name else "") for other in found)
        reason = "" if inside else _fails(model.get_submodule(name), *calls[name])
        if reason:
            path = f"model.{name}" if name else "model"
            found[name] = OnceOnly(path, type(model.get_submodule(name)).__name__, reason)
    return list(found.values())


def _fails(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What PyTorch says of the second derivative of a module's output; empty where it has one."""

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.requires_grad_() if leaf.is_floating_point() else leaf

    args, kwargs = pytree.tree_map(fresh, (args, kwargs))
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if _differentiable(x)]
    inputs += [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        outputs = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if _differentiable(x)]
        if not inputs or not outputs:
            return ""
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        try:
            grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
            slope = [g.square().sum() for g in grads if g is not None and g.requires_grad]
            if slope:
                torch.autograd.grad(torch.stack(slope).sum(), inputs, allow_unused=True)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
