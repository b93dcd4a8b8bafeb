"""The modules of a model whose derivatives are wrong, or that `torch.func` cannot run.

A function marked `once_differentiable` raises in plain autograd, and under `torch.func` its second
derivative is silently zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metablocks.diagnose import (
    Call,
    Finding,
    copied,
    innermost,
    is_float,
    is_tensor,
    scalar,
    slope,
)
from metablocks.errors import first_line
from metablocks.laws.gradients import slopes
from metablocks.types import Tensors

_WITHIN = 1e-5  # of a slope by finite differences, relative to it


def refused_by_transforms(model: nn.Module, inputs: Any) -> list[Finding]:
    """The innermost modules that `torch.func` cannot run.

    >>> refused_by_transforms(nn.Sequential(nn.Linear(2, 2), nn.ELU(inplace=True)), torch.ones(1, 2))
    []
    """
    return innermost(model, inputs, _refused)


def with_wrong_derivative(model: nn.Module, inputs: Any) -> list[Finding]:
    """The innermost modules whose first or second derivative is not the slope of what it is of.

    >>> with_wrong_derivative(nn.Linear(2, 2).double(), torch.ones(3, 2).double())
    []
    """
    return innermost(model, inputs, _wrong)


def _refused(module: nn.Module, call: Call) -> str:
    params = dict(module.named_parameters())
    leaves, spec = pytree.tree_flatten(copied(call.arguments))
    made = {k: x for k, x in enumerate(leaves) if is_tensor(x) and k not in call.batch}

    def run(params: Tensors, floats: dict[int, Tensor]) -> Any:
        # As if the model had made them: a copy is known to the derivative and to no one else.
        copies = copied(made | floats)
        args, kwargs = pytree.tree_unflatten([copies.get(k, x) for k, x in enumerate(leaves)], spec)
        tensors = params | copied(dict(module.named_buffers()))
        outputs = torch.func.functional_call(module, tensors, args, kwargs)
        return [x for x in pytree.tree_leaves(outputs) if is_float(x)]

    try:
        torch.func.vjp(run, params, {k: x for k, x in made.items() if is_float(x)})
    except RuntimeError as error:
        return first_line(error)
    return ""


def _wrong(module: nn.Module, call: Call) -> str:
    leaves, value = scalar(module, call)
    loss = value()
    if not loss.requires_grad:
        return ""
    named = {str(k): leaf for k, leaf in enumerate(leaves)}

    def off(tensors: Sequence[Tensor | None], function: Callable[[], Tensor]) -> float:
        directions, expected = slopes(named, function)
        pairs = zip(tensors, named, strict=True)
        got = {n: 0.0 if g is None else float((g * directions[n]).sum()) for g, n in pairs}
        scale = max(1e-3, *(abs(float(slope)) for slope in expected.values()))
        return max(abs(got[name] - float(expected[name])) for name in named) / scale

    try:
        first = torch.autograd.grad(loss, leaves, allow_unused=True)
        error = off(first, lambda: value().detach())
        if not error <= _WITHIN:
            return f"its gradient is off its slope by {error:.1e}"
        second_slope = slope(value(), leaves)
        second: Sequence[Tensor | None] = [None] * len(leaves)
        if second_slope.requires_grad:
            second = torch.autograd.grad(second_slope, leaves, allow_unused=True)
        error = off(second, lambda: slope(value(), leaves).detach())
    except RuntimeError as raised:
        return first_line(raised)
    return "" if error <= _WITHIN else f"its second derivative is off by {error:.1e}"
