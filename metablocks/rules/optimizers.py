"""Optimisers inside a task: momentum and Adam.

Both give a direction that is still a gradient, and a learning rate behind them negates it:
`Chain(Momentum(0.9), LearningRate(0.1))`. A task starts with empty moments.
"""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from metablocks.checks import Decay, checked
from metablocks.errors import RuleError
from metablocks.rules.base import StepInfo, UpdateRule
from metablocks.types import Tensors


@checked(RuleError)
class Momentum(UpdateRule):
    """Heavy-ball momentum: v ← μ v + g, and v is the direction; with `nesterov`, g + μ v.

    μ is `momentum`, in [0, 1); v starts as zero in every task, so that the first direction is g. This
    is the convention of `torch.optim.SGD` without dampening: the rate stands outside of v.

    Laws: `Chain(Momentum(μ), LearningRate(α))` takes the steps of `torch.optim.SGD(lr=α,
    momentum=μ)`; `Momentum(0.0)` is the identity.

    Source: Polyak 1964; Sutskever, Martens, Dahl, Hinton 2013 (torch.optim.SGD).

    >>> params = {"w": torch.zeros(1)}
    >>> rule, ones = Momentum(0.5), {"w": torch.ones(1)}
    >>> state = rule.init(params)
    >>> for index in range(3):
    ...     updates, state = rule(ones, state, StepInfo(index, 3, params))
    ...     print(float(updates["w"]))
    1.0
    1.5
    1.75

    Raises `RuleError` for a `momentum` outside [0, 1), and for `nesterov` with momentum 0.
    """

    negates = False

    def __init__(self, momentum: Decay = 0.9, *, nesterov: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        if nesterov and not self.momentum:
            raise RuleError(
                "Momentum nesterov is True, but momentum is 0; give momentum, as 0.9",
                block="Momentum",
                field="momentum",
            )
        self.nesterov = nesterov

    def extra_repr(self) -> str:
        return f"{self.momentum}, nesterov={self.nesterov}"

    def init(self, params: Tensors) -> Tensors:
        """The velocity of a new task: zeros."""
        return _zeros(params)

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        velocity = {name: self.momentum * state[name] + g for name, g in updates.items()}
        if not self.nesterov:
            return dict(velocity), velocity
        return {name: g + self.momentum * velocity[name] for name, g in updates.items()}, velocity


class Moments(NamedTuple):
    """Running means of a task's gradients and of their squares, as real tensors; a pytree.

    Those of a complex parameter `[*shape]` are `[*shape, 2]`, its real and imaginary part.
    """

    first: Tensors
    second: Tensors


@checked(RuleError)
class Adam(UpdateRule):
    """Adam's direction, with its bias corrected: m̂ / √(v̂ + eps²).

        m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
        m̂ = m / (1 − β₁ᵗ),        v̂ = v / (1 − β₂ᵗ)          t = 1, 2, … the inner step

    m and v start as zero in every task. `beta1=0.0` is the inner optimiser of Reptile. A complex
    parameter is a pair of real ones: its real and imaginary part have moments of their own.

    Law: where √v̂ is far above `eps`, `Chain(Adam(), LearningRate(α))` takes the steps of
    `torch.optim.Adam(lr=α)`.

    Source: Kingma, Ba 2015. Deviation:
    1. eps stands inside the root, m̂ / √(v̂ + eps²) for m̂ / (√v̂ + eps), since √v̂ has no derivative
       at v̂ = 0: the meta-gradient of a parameter whose gradient is exactly zero would be nan. The
       two agree where v̂ = 0 and where √v̂ ≫ eps, and differ by at most a factor √2 between.

    Near a zero gradient the direction turns with the slope 1/eps, and so does the meta-gradient at
    second order: an eps of 1e-3, say, keeps it tame.

    >>> params = {"w": torch.zeros(2)}
    >>> rule = Adam()
    >>> gradients = {"w": torch.tensor([-3.0, 0.0])}
    >>> updates, _ = rule(gradients, rule.init(params), StepInfo(0, 1, params))
    >>> updates["w"].round(decimals=4).tolist()
    [-1.0, 0.0]

    Raises `RuleError` for `beta1` or `beta2` outside [0, 1), and for an `eps` below 1e-12, whose
    square and slopes float32 cannot hold.
    """

    negates = False

    def __init__(
        self,
        *,
        beta1: Decay = 0.9,
        beta2: Decay = 0.999,
        eps: Annotated[float, Ge(1e-12)] = 1e-8,
    ) -> None:
        super().__init__()
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    def extra_repr(self) -> str:
        return f"beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}"

    def init(self, params: Tensors) -> Moments:
        """The moments of a new task: zeros."""
        parts = {name: _parts(parameter) for name, parameter in params.items()}
        return Moments(_zeros(parts), _zeros(parts))

    def forward(self, updates: Tensors, state: Moments, step: StepInfo) -> tuple[Tensors, Moments]:
        count = step.at + 1
        parts = {name: _parts(g) for name, g in updates.items()}
        first = {n: self.beta1 * state.first[n] + (1 - self.beta1) * g for n, g in parts.items()}
        second = {
            n: self.beta2 * state.second[n] + (1 - self.beta2) * g * g for n, g in parts.items()
        }

        def direction(name: str) -> Tensor:
            mean = first[name] / _of_dtype(1 - self.beta1**count, first[name])
            square = second[name] / _of_dtype(1 - self.beta2**count, second[name])
            unit = mean / (square + self.eps**2).sqrt()
            return torch.complex(*unit.unbind(-1)) if updates[name].is_complex() else unit

        return {name: direction(name) for name in updates}, Moments(first, second)


def _of_dtype(number: float | Tensor, like: Tensor) -> float | Tensor:
    return number.to(like.dtype) if isinstance(number, Tensor) else number


def _parts(tensor: Tensor) -> Tensor:
    """A real tensor as it is, a complex one as its real and imaginary part `[*shape, 2]`."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(parameter) for name, parameter in params.items()}
