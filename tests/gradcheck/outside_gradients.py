"""Blocks from outside metablocks whose gradients are wrong, once only, drawn or kinked."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metablocks.rules import StepInfo, UpdateRule

Tensors = dict[str, Tensor]


class Gain(UpdateRule):
    """u = −0.1 · gain · g with a learned gain for each tensor, and ways to get its gradient wrong."""

    def __init__(self, *, fault: str = "none") -> None:
        super().__init__()
        self.fault = fault
        self.names: list[str] = []
        self.gains = nn.ParameterList()

    def setup(self, params: Tensors, steps: int) -> "Gain":
        self.names = list(params)
        like = next(iter(params.values()))
        self.gains = nn.ParameterList([torch.ones((), dtype=like.dtype) for _ in params])
        return self

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        moved = {}
        for name, gain in zip(self.names, self.gains, strict=True):
            own = updates[name]
            if self.fault == "gradient":
                own = own.detach()
            if self.fault == "gain" and step.index > 0:
                gain = gain.detach()
            if self.fault == "silent":
                gain = gain.detach()
            if self.fault == "params":
                own = own + 0.1 * step.params[name].detach()
            moved[name] = -0.1 * gain * own
        return moved, state


class _Tanh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (1 - x.tanh() ** 2) * grad


class _OldTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (1 - x.tanh() ** 2) * grad


class _WrongTanh(_Tanh):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (1 - x.detach().tanh() ** 2) * grad


class Custom(nn.Module):
    """tanh by a function of its own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One head of fused attention over the units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[None, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)[0, 0]


class Rewriting(nn.Module):
    """tanh of what it has scaled, shifted and masked in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5).sub_(0.2)
        x[..., 0].zero_()
        return x.tanh_()


def net(*, input_shape: tuple[int, ...], outputs: int, middle: str = "tanh") -> nn.Module:
    """A linear layer, something in the middle, a linear layer."""
    kinds = {
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "dropout": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.3)),
        "once": lambda: Custom(_Tanh),
        "old": lambda: Custom(_OldTanh),
        "wrong": lambda: Custom(_WrongTanh),
        "attention": lambda: Attention(4),
        "elu in place": lambda: nn.ELU(inplace=True),
        "relu6 in place": lambda: nn.ReLU6(inplace=True),
        "dropout in place": lambda: nn.Dropout(0.3, inplace=True),
        "rewriting": Rewriting,
        "unused": nn.Tanh,
        "zero head": nn.Tanh,
    }
    size = 1
    for n in input_shape:
        size *= n
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 4), kinds[middle](), nn.Linear(4, outputs))
    if middle == "zero head":
        nn.init.zeros_(model[-1].weight)
    if middle == "unused":
        model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    return model
