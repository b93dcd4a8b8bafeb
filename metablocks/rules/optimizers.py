"""Optimisers inside a task: momentum, Adam, Adamax, RMSprop and Adagrad.

All give a direction that is still a gradient, and a learning rate behind them negates it:
`Chain(Momentum(0.9), LearningRate(0.1))`. A task starts with empty moments. A complex parameter is a
pair of real ones: its real and imaginary part have moments of their own.

With `learn=True` the outer loop learns momentum, β₁ and β₂ beside everything else: `rule.momentum`,
say, is the logit of μ, so that μ stays between 0 and 1.
"""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from metablocks.checks import Decay, NonNegative, checked
from metablocks.errors import RuleError
from metablocks.rules.base import StepInfo
from metablocks.rules.learned import LearnedRule, Number, like, share
from metablocks.types import Tensors

Eps = Annotated[float, Ge(1e-12)]
"""A number that keeps roots and quotients finite; float32 cannot hold the square and slopes of less."""


@checked(RuleError)
class Momentum(LearnedRule):
    """Heavy-ball momentum: v ← μ v + g, and v is the direction; with `nesterov`, g + μ v.

    v starts as zero in every task, so that the first direction is g. This is the convention of
    `torch.optim.SGD` without dampening: the rate stands outside of v.

    - `momentum`: μ, in [0, 1).
    - `nesterov`: True for Nesterov's direction, g + μ v.
    - `learn`: True if μ is a meta-parameter, stored as its logit.

    Laws: `Chain(Momentum(μ), LearningRate(α))` takes the steps of `torch.optim.SGD(lr=α,
    momentum=μ)`; `Momentum(0.0)` is the identity.

    Source: Polyak 1964; Sutskever, Martens, Dahl, Hinton 2013 (torch.optim.SGD).

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(1)}
    >>> rule, ones = mb.Momentum(0.5), {"w": torch.ones(1)}
    >>> state = rule.init(params)
    >>> for index in range(3):
    ...     updates, state = rule(ones, state, mb.StepInfo(index, 3, params))
    ...     print(float(updates["w"]))
    1.0
    1.5
    1.75
    >>> [name for name, _ in mb.Momentum(learn=True).setup(params, steps=3).named_parameters()]
    ['momentum']

    Raises `RuleError` for a `momentum` outside [0, 1), and for `nesterov` or `learn` with momentum 0.
    """

    negates = False
    momentum: Number

    def __init__(
        self, momentum: Decay = 0.9, *, nesterov: bool = False, learn: bool = False
    ) -> None:
        super().__init__(learn, momentum=momentum)
        if nesterov and not momentum:
            raise RuleError(
                "Momentum nesterov is True, but momentum is 0; give momentum, as 0.9",
                block="Momentum",
                field="momentum",
            )
        self.nesterov = nesterov

    def extra_repr(self) -> str:
        return f"{self._shown('momentum')}, nesterov={self.nesterov}{self._learns}"

    def init(self, params: Tensors) -> Tensors:
        """The velocity of a new task: zeros."""
        return _zeros(params)

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        momentum = share(self.momentum)
        velocity = {name: like(g, momentum) * state[name] + g for name, g in updates.items()}
        if not self.nesterov:
            return dict(velocity), velocity
        return {
            name: g + like(g, momentum) * velocity[name] for name, g in updates.items()
        }, velocity


class Moments(NamedTuple):
    """Running means of a task's gradients and of their sizes, as real tensors; a pytree.

    Those of a complex parameter `[*shape]` are `[*shape, 2]`, its real and imaginary part.
    """

    first: Tensors
    second: Tensors


class _Scaled(LearnedRule):
    """A gradient by the size that gradients have had in a task, which is `eps` at least."""

    negates = False

    def __init__(self, eps: float, *, learn: bool = False, **numbers: float) -> None:
        super().__init__(learn, **numbers)
        self.eps = eps

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={self._shown(name)}" for name in self._names)
        return f"{numbers}, eps={self.eps}{self._learns}"


class _OfMoments(_Scaled):
    """A rule by two running figures of a task's gradients, with decays that may be learned."""

    beta1: Number
    beta2: Number

    def __init__(
        self,
        *,
        beta1: Decay = 0.9,
        beta2: Decay = 0.999,
        eps: Eps = 1e-8,
        learn: bool = False,
    ) -> None:
        super().__init__(eps, learn=learn, beta1=beta1, beta2=beta2)

    def init(self, params: Tensors) -> Moments:
        """The moments of a new task: zeros."""
        return Moments(_zeros(_parts(params)), _zeros(_parts(params)))


@checked(RuleError)
class Adam(_OfMoments):
    """Adam's direction, with its bias corrected: m̂ / √(v̂ + eps²).

        m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
        m̂ = m / (1 − β₁ᵗ),        v̂ = v / (1 − β₂ᵗ)          t = 1, 2, … the inner step

    m and v start as zero in every task.

    - `beta1`: β₁, in [0, 1); 0 in the inner optimiser of Reptile.
    - `beta2`: β₂, in [0, 1).
    - `eps`: the bound of the direction's slope: that is at most 1/eps.
    - `learn`: True if β₁ and β₂ are meta-parameters, stored as their logits.

    Laws: where √v̂ is far above `eps`, `Chain(Adam(), LearningRate(α))` takes the steps of
    `torch.optim.Adam(lr=α)`, and `Chain(Adam(), WeightDecay(d), LearningRate(α))`, with the decay
    behind it, those of `torch.optim.AdamW(lr=α, weight_decay=d)`.

    Source: Kingma, Ba 2015; AdamW: Loshchilov, Hutter 2019. Deviation:
    1. eps stands inside the root, m̂ / √(v̂ + eps²) for m̂ / (√v̂ + eps), since √v̂ has no derivative
       at v̂ = 0: the meta-gradient of a parameter whose gradient is exactly zero would be nan. The
       two agree where v̂ = 0 and where √v̂ ≫ eps, and differ by at most a factor √2 between.

    Near a zero gradient the direction turns with the slope 1/eps, and so does the meta-gradient at
    second order: an eps of 1e-3, say, keeps it tame.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2)}
    >>> rule = mb.Adam()
    >>> gradients = {"w": torch.tensor([-3.0, 0.0])}
    >>> updates, _ = rule(gradients, rule.init(params), mb.StepInfo(0, 1, params))
    >>> updates["w"].round(decimals=4).tolist()
    [-1.0, 0.0]

    Raises `RuleError` for `beta1` or `beta2` outside [0, 1), for 0 with `learn`, and for an `eps`
    below 1e-12, whose square and slopes float32 cannot hold.
    """

    def forward(self, updates: Tensors, state: Moments, step: StepInfo) -> tuple[Tensors, Moments]:
        count, parts = step.at + 1, _parts(updates)
        beta1, beta2 = share(self.beta1), share(self.beta2)
        first = _running_mean(beta1, state.first, parts)
        second = _running_mean(beta2, state.second, {name: g * g for name, g in parts.items()})

        def direction(name: str) -> Tensor:
            mean = first[name] / like(first[name], 1 - beta1**count)
            square = second[name] / like(second[name], 1 - beta2**count)
            unit: Tensor = mean / (square + self.eps**2).sqrt()
            return unit

        return _joined({name: direction(name) for name in parts}, updates), Moments(first, second)


@checked(RuleError)
class Adamax(_OfMoments):
    """Adam by the largest of the past gradients in place of their mean square: m̂ / u.

        m ← β₁ m + (1 − β₁) g,    u ← max(β₂ u, |g| + eps),    m̂ = m / (1 − β₁ᵗ)

    m and u start as zero in every task.

    - `beta1`: β₁, in [0, 1).
    - `beta2`: β₂, in [0, 1).
    - `eps`: added to |g|.
    - `learn`: True if β₁ and β₂ are meta-parameters, stored as their logits.

    Law: `Chain(Adamax(), LearningRate(α))` takes the steps of `torch.optim.Adamax(lr=α)`.

    Source: Kingma, Ba 2015, section 7.1.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2)}
    >>> rule = mb.Adamax(beta1=0.0, beta2=0.5)
    >>> state = rule.init(params)
    >>> for size in (4.0, 1.0):
    ...     gradients = {"w": torch.tensor([size, 0.0])}
    ...     updates, state = rule(gradients, state, mb.StepInfo(0, 2, params))
    >>> updates["w"].tolist()
    [0.5, 0.0]

    Raises `RuleError` as `Adam` does.
    """

    def forward(self, updates: Tensors, state: Moments, step: StepInfo) -> tuple[Tensors, Moments]:
        parts, beta1, beta2 = _parts(updates), share(self.beta1), share(self.beta2)
        first = _running_mean(beta1, state.first, parts)
        largest = {
            name: torch.maximum(like(g, beta2) * state.second[name], g.abs() + self.eps)
            for name, g in parts.items()
        }

        def direction(name: str) -> Tensor:
            bias = 1 - beta1 ** (step.at + 1)
            unit: Tensor = first[name] / like(first[name], bias) / largest[name]
            return unit

        return _joined({name: direction(name) for name in parts}, updates), Moments(first, largest)


@checked(RuleError)
class RMSprop(_Scaled):
    """A gradient by the root of its running mean square: v ← β v + (1 − β) g², and g / √(v + eps²).

    v starts as zero in every task, and its bias stays: the first direction has the size 1 / √(1 − β).

    - `beta`: β, in [0, 1).
    - `eps`: inside the root, as in `Adam`.
    - `learn`: True if β is a meta-parameter, stored as its logit.

    Laws: where √v is far above `eps`, `Chain(RMSprop(), LearningRate(α))` takes the steps of
    `torch.optim.RMSprop(lr=α)`, whose `alpha` is β, and `Chain(RMSprop(), Momentum(μ),
    LearningRate(α))` those with `momentum=μ`.

    Source: Tieleman, Hinton 2012 (torch.optim.RMSprop). Deviations: 1. eps inside the root, as in
    `Adam`, and for its reason. 2. There is no `centered` variant.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2)}
    >>> rule = mb.RMSprop(beta=0.75)
    >>> gradients = {"w": torch.tensor([-3.0, 0.0])}
    >>> updates, _ = rule(gradients, rule.init(params), mb.StepInfo(0, 1, params))
    >>> updates["w"].round(decimals=4).tolist()
    [-2.0, 0.0]

    Raises `RuleError` for a `beta` outside [0, 1), for 0 with `learn`, and for an `eps` below 1e-12.
    """

    beta: Number

    def __init__(self, *, beta: Decay = 0.99, eps: Eps = 1e-8, learn: bool = False) -> None:
        super().__init__(eps, learn=learn, beta=beta)

    def init(self, params: Tensors) -> Tensors:
        """The mean squares of a new task: zeros."""
        return _zeros(_parts(params))

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        parts = _parts(updates)
        squares = {name: g * g for name, g in parts.items()}
        mean = _running_mean(share(self.beta), state, squares)
        made = {name: g / (mean[name] + self.eps**2).sqrt() for name, g in parts.items()}
        return _joined(made, updates), mean


@checked(RuleError)
class Adagrad(_Scaled):
    """A gradient by the root of the sum of its squares: s ← s + g², and g / √(s + eps²).

    s starts as `initial` in every task; from 0, the first direction is the gradient's sign.

    - `initial`: s at the start of a task.
    - `eps`: inside the root, as in `Adam`.

    Law: where √s is far above `eps`, `Chain(Adagrad(), LearningRate(α))` takes the steps of
    `torch.optim.Adagrad(lr=α)`, whose `initial_accumulator_value` is `initial`; its `lr_decay` is a
    rate for each step, `LearningRate([…])`.

    Source: Duchi, Hazan, Singer 2011 (torch.optim.Adagrad). Deviation: eps stands inside the root, as
    in `Adam`, and for its reason.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(1)}
    >>> rule, state = mb.Adagrad(), mb.Adagrad().init(params)
    >>> for index in range(4):
    ...     gradients = {"w": torch.full((1,), 5.0)}
    ...     updates, state = rule(gradients, state, mb.StepInfo(index, 4, params))
    >>> updates["w"]
    tensor([0.5000])

    Raises `RuleError` for a negative `initial`, and for an `eps` below 1e-12.
    """

    initial: float

    def __init__(self, *, initial: NonNegative = 0.0, eps: Eps = 1e-10) -> None:
        super().__init__(eps, initial=initial)

    def init(self, params: Tensors) -> Tensors:
        """The sums of a new task."""
        return {name: torch.full_like(p, self.initial) for name, p in _parts(params).items()}

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        parts = _parts(updates)
        total = {name: state[name] + g * g for name, g in parts.items()}
        made = {name: g / (total[name] + self.eps**2).sqrt() for name, g in parts.items()}
        return _joined(made, updates), total


def _running_mean(beta: Number, mean: Tensors, values: Tensors) -> Tensors:
    """β · mean + (1 − β) · values."""
    return {
        name: like(value, beta) * mean[name] + like(value, 1 - beta) * value
        for name, value in values.items()
    }


def _parts(tensors: Tensors) -> Tensors:
    """Real tensors as they are, complex ones as their real and imaginary part `[*shape, 2]`."""
    return {n: torch.view_as_real(t) if t.is_complex() else t for n, t in tensors.items()}


def _joined(parts: Tensors, updates: Tensors) -> Tensors:
    """The inverse of `_parts`: complex tensors where the updates are."""
    return {
        name: torch.complex(*part.unbind(-1)) if updates[name].is_complex() else part
        for name, part in parts.items()
    }


def _zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(parameter) for name, parameter in params.items()}
