"""LoRA: a low-rank update beside a layer's weight, which adapts in its place.

    y = W x + b + (1/r) B A x        A: r × inputs, random; B: outputs × r, zero at first

W stays put inside a task, and A, B move: of a layer of n × n numbers, 2 r n. The factor is the α/r of
Hu et al. 2021 (section 4.1) with α = 1.

A and B are layers beside W, not a `torch.nn.utils.parametrize` of it: that would make W + (1/r) B A, a
matrix of W's size, in every pass, and keep it in the graph of every inner step, several times the
memory. The price: a layer whose weight is read past it (in `nn.MultiheadAttention`) is refused.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError, concerning
from metablocks.models.surgery import choose_layers, holders, modules_of, obstacle
from metablocks.selection import select


class Factors(nn.Module):
    """(1/r) B A, as two layers: `down` is A, `up` is B."""

    weights_are_read = True

    def __init__(self, down: nn.Module, up: nn.Module, rank: int) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.rank = rank

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.up(self.down(inputs)) / self.rank
        return output

    def weight(self) -> Tensor:
        """(1/r) B A, of the shape of the layer's weight."""
        up: Any = self.up.weight
        down: Any = self.down.weight
        product: Tensor = up.flatten(1) @ down.flatten(1)
        return product.reshape(len(up), *down.shape[1:]) / self.rank


class LowRank(nn.Module):
    """Mixin of a layer with a low-rank update: `lora` added to its output."""

    lora: Factors

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs) + self.lora(inputs)
        return output


class LowRankLinear(LowRank, nn.Linear):
    """W x + b + (1/r) B A x. `insert_lora` makes it."""


class LowRankConv2d(LowRank, nn.Conv2d):
    """W ∗ x + b + (1/r) B (A ∗ x), B a 1×1 convolution. `insert_lora` makes it."""


_LOW_RANK: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LowRankLinear,
    nn.Conv2d: LowRankConv2d,
}


@checked()
def insert_lora(
    model: nn.Module,
    *,
    rank: Count,
    layers: str | Sequence[str] = "*",
    freeze: str | Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` in which linear layers and 2-D convolutions have a low-rank update.

        y = W x + b + (1/r) B A x        r = rank

    A starts as PyTorch's layers do, uniform within ±1/√inputs, and B at zero, so that the function is
    unchanged, exactly. A layer keeps its names, `weight` and `bias`; beside them are
    `lora.down.weight` (A) and `lora.up.weight` (B). To adapt these alone: `adapt="*lora.*"`, with the
    head `["*lora.*", "head.*"]`; the outer loop then learns where A and B start, and W.

    - `rank`: the rank r of the update.
    - `layers`: patterns over the names of the layers' weights: `["*query*", "*value*"]`.
    - `freeze`: patterns of the model's own parameters that stay as they are, in the outer loop too:
      `["*", "!head.*"]` for a pre-trained model.

    It comes last of several surgeries. `fold_lora` gives the plain model back.

    Law: with B = 0, trajectory and meta-gradient of what was there are those of the model without.

    Source: Hu et al. 2021 (LoRA). Deviations: 1. the factor α/r has α = 1 at every r, where the paper
    sets α to the first r it tries; tune the rate of A and B, as it does; 2. A starts uniform, as in the
    released code, not Gaussian; 3. no dropout.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> [name for name, _ in mb.insert_lora(model, rank=1, layers="2.*").named_parameters()]
    ['0.weight', '0.bias', '2.weight', '2.bias', '2.lora.down.weight', '2.lora.up.weight']

    Raises `BlockError` for a `rank` below 1 or above a layer's inputs or outputs, a model without such
    layers or with low-rank updates already, and for selected layers that can have none: grouped,
    transposed and other convolutions, classes of one's own, lazy layers before the first batch, layers
    whose weight is read past them (as in `nn.MultiheadAttention`), tied, or with hooks.
    `SelectionError` for a pattern that matches nothing.
    """
    if modules_of(model, LowRank):
        kind = type(model).__name__
        raise BlockError(f"insert_lora: {kind} has low-rank updates already; insert them once")
    chosen = choose_layers("insert_lora", model, layers)
    _check(model, chosen, rank)
    frozen: tuple[str, ...] = ()
    if freeze:
        with concerning("insert_lora", "freeze"):
            frozen = select(freeze, dict(model.named_parameters()))

    copied = copy.deepcopy(model)
    for name in frozen:
        copied.get_parameter(name).requires_grad_(False)
    for name in chosen:
        layer: Any = copied.get_submodule(name)
        layer.lora = _factors(layer, rank)
        layer.__class__ = _LOW_RANK[type(layer)]
    return copied


@checked()
@torch.no_grad()
def fold_lora(model: nn.Module) -> nn.Module:
    """A copy of `model` without its low-rank updates, which are added to the weights: the same function.

        W ← W + (1/r) B A

    Every layer is of the class it was before `insert_lora`, with its names and shapes, so that the
    `state_dict` loads into the original model. Parameters are new leaves; no gradient flows back.

    Law: outputs are equal up to rounding. Fold what `learner.adapt` returns to predict with it.

    >>> import torch
    >>> import metablocks as mb
    >>> mb.fold_lora(mb.insert_lora(torch.nn.Linear(3, 2), rank=1))
    Linear(in_features=3, out_features=2, bias=True)

    Raises `BlockError` for a model without low-rank updates.
    """
    copied = copy.deepcopy(model)
    changed: list[Any] = modules_of(copied, LowRank)
    if not changed:
        raise BlockError(
            f"fold_lora: {type(model).__name__} has no low-rank update to fold; insert_lora makes them"
        )
    plain = {low_rank: kind for kind, low_rank in _LOW_RANK.items()}
    for layer in changed:
        weight = layer.weight
        layer.weight = nn.Parameter(weight + layer.lora.weight(), weight.requires_grad)
        del layer.lora
        layer.__class__ = plain[type(layer)]
    return copied


def _factors(layer: Any, rank: int) -> Factors:
    """A and B of a layer, as they start: of the layer's dtype, on its device."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    down: Any
    up: Any
    if isinstance(layer, nn.Linear):
        down = nn.Linear(layer.in_features, rank, bias=False, **place)
        up = nn.Linear(rank, layer.out_features, bias=False, **place)
    else:
        down = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
            **place,
        )
        up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, **place)
    nn.init.zeros_(up.weight)
    return Factors(down, up, rank).train(layer.training)


def _check(model: nn.Module, chosen: Sequence[str], rank: int) -> None:
    """Raise `BlockError` for the first chosen layer that cannot have an update of this rank."""
    held = holders(model)
    for name in chosen:
        layer: Any = model.get_submodule(name)
        leave = f'; to leave it without one: layers=["*", "!{name}.weight"]' if name else ""
        reason = obstacle(model, name, layer, _LOW_RANK)
        if not reason and getattr(layer, "groups", 1) > 1:
            reason = f"has {layer.groups} groups, of which a low-rank update knows nothing"
        others = [] if reason else [n for n, m in held[id(layer.weight)] if m is not layer]
        if others:
            reason = f"shares its weight with {others[0]}, which folding would change"
        if reason:
            raise BlockError(f"insert_lora: {name or 'the model'} {reason}{leave}")
        most = min(len(layer.weight), layer.weight[0].numel())
        if rank > most:
            weight = f"{name or 'the model'} has a weight of rank {most} at most"
            raise BlockError.about("insert_lora", "rank", f"is {rank}, and {weight}{leave}")
