"""The outer loop's blocks: optimisers and schedules of `torch.optim`, and clipping before their step.

Optimisers and clipping take the learner's named parameters. `groups` gives some of them other options,
and `only` clips some, by patterns over their names (`model.*`, `rule.*`, see `selection`):

    clip: {block: value, maximum: 10.0, only: "model.*"}
    optimizer: {block: adam, lr: 1e-3, groups: {"rule.*": {lr: 1e-4}}}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from metablocks.checks import Count, Decay, NonNegative, Positive, checked
from metablocks.errors import BlockError, concerning
from metablocks.selection import select


@dataclass(frozen=True)
class GroupOptions:
    """Marks an optimiser's `groups`: name pattern to a mapping of the optimiser's own fields."""


NamedParameters: TypeAlias = Iterable[tuple[str, nn.Parameter]]
Groups: TypeAlias = Annotated[Mapping[str, Mapping[str, Any]], GroupOptions()]


@checked()
def adam(
    parameters: NamedParameters,
    *,
    lr: NonNegative,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    groups: Groups | None = None,
) -> Optimizer:
    """Adam: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← θ − lr · m̂ / (√v̂ + eps).

    - `lr`: the outer learning rate.
    - `betas`: β₁ and β₂, the decays of the running means of g and g².
    - `eps`: added to the root in the denominator.
    - `weight_decay`: factor of the L2 penalty, whose gradient is added to g.
    - `groups`: other values of these fields for some parameters, `{"rule.*": {lr: 1e-4}}`, by
      patterns over the learner's parameter names.

    Source: Kingma, Ba 2015 (torch.optim.Adam).

    >>> model = nn.Linear(1, 1)
    >>> optimizer = adam(model.named_parameters(), lr=1e-3, groups={"bias": {"lr": 1e-4}})
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.0001]

    Raises what `split` does for a pattern of `groups` that selects nothing or overlaps another.
    """
    return torch.optim.Adam(
        split(parameters, groups), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


@checked()
def adamw(
    parameters: NamedParameters,
    *,
    lr: NonNegative,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.01,
    groups: Groups | None = None,
) -> Optimizer:
    """AdamW: Adam, with the decay taken off the parameters, θ ← θ − lr · weight_decay · θ.

    - `lr`: the outer learning rate.
    - `betas`: β₁ and β₂, the decays of the running means of g and g².
    - `eps`: added to the root in the denominator.
    - `weight_decay`: share of a parameter, times lr, that every step takes off.
    - `groups`: other values of these fields for some parameters, `{"rule.*": {lr: 1e-4}}`, by
      patterns over the learner's parameter names.

    Source: Loshchilov, Hutter 2019 (torch.optim.AdamW).

    Raises what `split` does for a pattern of `groups` that selects nothing or overlaps another.
    """
    return torch.optim.AdamW(
        split(parameters, groups), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


@checked()
def sgd(
    parameters: NamedParameters,
    *,
    lr: NonNegative,
    momentum: NonNegative = 0.0,
    nesterov: bool = False,
    weight_decay: NonNegative = 0.0,
    groups: Groups | None = None,
) -> Optimizer:
    """Stochastic gradient descent: b ← momentum · b + g, θ ← θ − lr · b.

    - `lr`: the outer learning rate.
    - `momentum`: how much of b the next step keeps.
    - `nesterov`: True for Nesterov's momentum.
    - `weight_decay`: factor of the L2 penalty, whose gradient is added to g.
    - `groups`: other values of these fields for some parameters, `{"rule.*": {lr: 1e-4}}`, by
      patterns over the learner's parameter names.

    Source: Robbins, Monro 1951; Sutskever et al. 2013 (torch.optim.SGD).

    Raises `BlockError` for Nesterov momentum without momentum, and what `split` does.
    """
    if nesterov and momentum == 0:
        message = "nesterov is true, but momentum is 0; give momentum, such as 0.9"
        raise BlockError(message, block="sgd", field="nesterov")
    return torch.optim.SGD(
        split(parameters, groups),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


@checked()
def constant(optimizer: Optimizer) -> LRScheduler | None:
    """The optimiser's own rates, unchanged: lr(e) = lr."""
    return None


@checked()
def cosine(optimizer: Optimizer, *, final: NonNegative, epochs: Count) -> LRScheduler | None:
    """Cosine annealing, per epoch e: lr(e) = final + ½ (lr − final) (1 + cos(π e / epochs)).

    Every group of the optimiser goes from its own rate to `final`.

    - `final`: the rate of the last epoch and after.
    - `epochs`: the epochs until then: in a recipe, all.

    Source: Loshchilov, Hutter 2017; MAML++ uses it (torch.optim.lr_scheduler.CosineAnnealingLR).

    >>> optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    >>> cosine(optimizer, final=0.0, epochs=10).T_max
    10

    Raises `BlockError` if `final` is above a rate of the optimiser.
    """
    _check_final(optimizer, final)
    return CosineAnnealingLR(optimizer, T_max=epochs, eta_min=final)


@checked()
def linear(optimizer: Optimizer, *, final: NonNegative, epochs: Count) -> LRScheduler | None:
    """A straight line, per epoch e: lr(e) = lr + (final − lr) e / epochs.

    Every group of the optimiser goes from its own rate to `final`.

    - `final`: the rate of the last epoch and after.
    - `epochs`: the epochs until then: in a recipe, all.

    Source: Nichol, Achiam, Schulman 2018 (Reptile's ε, from 1 to 0) (torch.optim.lr_scheduler.LambdaLR).

    >>> optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    >>> schedule = linear(optimizer, final=0.0, epochs=4)
    >>> optimizer.step(), schedule.step(), optimizer.param_groups[0]["lr"]
    (None, None, 0.75)

    Raises `BlockError` if `final` is above a rate of the optimiser.
    """
    _check_final(optimizer, final)

    def factor(rate: float) -> Callable[[int], float]:
        ratio = final / rate if rate else 1.0
        return lambda epoch: 1 + (ratio - 1) * min(epoch / epochs, 1)

    return LambdaLR(optimizer, [factor(float(group["lr"])) for group in optimizer.param_groups])


def _check_final(optimizer: Optimizer, final: float) -> None:
    lowest = min(float(group["lr"]) for group in optimizer.param_groups)
    if final > lowest:
        message = f"final is {final}, above the optimiser's rate {lowest}; it takes less"
        raise BlockError(message, field="final")


def split(
    parameters: NamedParameters, groups: Mapping[str, Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Trainable parameters in `torch.optim` groups: those no pattern matches, then one a pattern.

    Raises `SelectionError` for a pattern that matches nothing, and `BlockError` if nothing is
    trainable, or a pattern matches only frozen parameters, or one that an earlier pattern matched.
    """
    named = dict(parameters)
    free = {name: p for name, p in named.items() if p.requires_grad}
    if not free:
        raise BlockError("no parameter is trainable; the outer loop has nothing to learn")
    result: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    with concerning(None, "groups"):
        for pattern, options in (groups or {}).items():
            matched = select(pattern, named)
            for name in matched:
                if name in taken:
                    raise BlockError(
                        f'pattern "{pattern}" matches {name}, which "{taken[name]}" matches too'
                    )
                taken[name] = pattern
            chosen = [free[name] for name in matched if name in free]
            if not chosen:
                names = ", ".join(matched[:8])
                raise BlockError(f'pattern "{pattern}" matches frozen parameters only: {names}')
            result.append({"params": chosen, **options})
    rest = [p for name, p in free.items() if name not in taken]
    return [{"params": rest}, *result] if rest else result


@runtime_checkable
class Clip(Protocol):
    """Changes the `.grad` of the parameters it was made for, in place."""

    def __call__(self) -> None:
        """Clip what stands in `.grad` now."""


class _Bound:
    """A bound, and the parameters whose meta-gradient it is for.

    - `only`: patterns over the learner's parameter names (`model.*`, `rule.*`): what is clipped.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        *,
        maximum: Positive,
        only: str | Sequence[str] = "*",
    ) -> None:
        self.maximum = maximum
        named = {name: p for name, p in parameters if p.requires_grad}
        with concerning(None, "only"):
            self.chosen: list[nn.Parameter] = [named[name] for name in select(only, named)]


@checked()
class ClipValue(_Bound):
    """Clamp every entry of the meta-gradient: g ← min(max(g, −maximum), maximum).

    - `maximum`: the largest entry that is let through.

    Source: the reference code of Antoniou, Edwards, Storkey 2018 (±10, the net only)
    (torch.nn.utils.clip_grad_value_).

    >>> layer = nn.Linear(1, 1)
    >>> layer.weight.grad = torch.tensor([[25.0]])
    >>> ClipValue(layer.named_parameters(), maximum=10.0, only="weight")()
    >>> layer.weight.grad
    tensor([[10.]])

    Raises `SelectionError` for a pattern that matches nothing.
    """

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_value_(self.chosen, self.maximum)


@checked()
class ClipNorm(_Bound):
    """Scale the meta-gradient down to a norm: g ← g · min(1, maximum / ‖g‖), ‖g‖ over all of it.

    - `maximum`: the longest meta-gradient that is let through.

    Source: Pascanu, Mikolov, Bengio 2013 (torch.nn.utils.clip_grad_norm_).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> ClipNorm(layer.named_parameters(), maximum=1.0)()
    >>> layer.weight.grad
    tensor([[0.6000, 0.8000]])

    Raises `SelectionError` for a pattern that matches nothing.
    """

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.chosen, self.maximum)
