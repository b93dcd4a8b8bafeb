"""T-net: a learned linear map behind every layer, which the inner loop leaves alone.

    y = T (W x + b)        W, b move inside a task; T is meta-learned, and starts as the identity

Seen from A = T W, a gradient step on W is A ← A − α T Tᵀ ∇_A L: T is a learned metric of the layer's
activation space (Lee, Choi 2018).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.checks import checked
from metablocks.errors import BlockError
from metablocks.models.surgery import (
    choose_layers,
    holders,
    modules_of,
    obstacle,
    outer_loop_patterns,
)


class Transformed(nn.Module):
    """Mixin of a layer with a T: `transform` applied to its output."""

    transform: nn.Module

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.transform(super().forward(inputs))
        return output


class TransformedLinear(Transformed, nn.Linear):
    """T (W x + b), T square `[out, out]`. `insert_tnet` makes it."""


class TransformedConv1d(Transformed, nn.Conv1d):
    """T (W ∗ x + b), T a convolution of width 1. `insert_tnet` makes it."""


class TransformedConv2d(Transformed, nn.Conv2d):
    """T (W ∗ x + b), T a 1×1 convolution. `insert_tnet` makes it."""


class TransformedConv3d(Transformed, nn.Conv3d):
    """T (W ∗ x + b), T a 1×1×1 convolution. `insert_tnet` makes it."""


_TRANSFORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TransformedLinear,
    nn.Conv1d: TransformedConv1d,
    nn.Conv2d: TransformedConv2d,
    nn.Conv3d: TransformedConv3d,
}


@checked()
def insert_tnet(model: nn.Module, *, layers: str | Sequence[str] = "*") -> nn.Module:
    """A copy of `model` in which every linear and convolutional layer is followed by its own T.

        y = T (W x + b)

    T is a square linear map without bias, or a 1×1 convolution; it comes right behind the layer,
    before norm and activation, and starts as exactly the identity. The layer keeps its names,
    `conv.weight` and `conv.bias`; its T is `conv.transform.weight`.

    T is for the outer loop: leave it out of the inner one with `adapt=transform_patterns(model)`, or
    in a recipe `adapt: ["*", "!*.transform.*"]`. `fold_tnet` gives the plain model back.

    Layers with a frozen weight get none: the inner loop leaves them alone.
    Layers that share their weight share their T. The model is left as it is.

    - `layers`: patterns over the names of weights: which layers get a T; `"!head.*"` is all but the
      head.

    Law: with T = I, trajectory and meta-gradient of W, b are those of the model without. One step
    moves A = T W by −α T Tᵀ ∇_A L.

    Source: Lee, Choi 2018, and its released code (T behind the bias, on the logits too). Deviation:
    1. the T of a grouped convolution, of which the code has none, is grouped alike, so that it folds.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> [name for name, _ in mb.insert_tnet(model).named_parameters()]
    ['0.weight', '0.bias', '0.transform.weight', '2.weight', '2.bias', '2.transform.weight']

    Raises `BlockError` for a model without trainable layers of this kind, with transforms already,
    and for selected layers that can have none: transposed convolutions, `Bilinear`, classes of one's
    own, lazy layers before the first batch, layers whose weight is read past them (as in
    `nn.MultiheadAttention`), with hooks, or tied to what gets no T. `SelectionError` for a pattern
    that matches nothing.
    """
    if modules_of(model, Transformed):
        kind = type(model).__name__
        raise BlockError(f"insert_tnet: {kind} has transforms already; insert them once")
    chosen = choose_layers("insert_tnet", model, layers, trainable=True)
    _check(model, chosen)
    transforms: dict[int, nn.Module] = {}
    copied = copy.deepcopy(model)
    for name in chosen:
        layer: Any = copied.get_submodule(name)
        layer.transform = transforms.setdefault(id(layer.weight), _identity(layer))
        layer.__class__ = _TRANSFORMED[type(layer)]
    return copied


@checked()
@torch.no_grad()
def fold_tnet(model: nn.Module) -> nn.Module:
    """A copy of `model` without its transforms, which are folded into the layers: the same function.

        W ← T W,  b ← T b

    Every layer is of the class it was before `insert_tnet`, with its names and shapes, so that the
    `state_dict` loads into the original model. Parameters are new leaves; no gradient flows back.

    Law: outputs are equal up to rounding. Fold what `learner.adapt` returns to predict with it;
    folding *before* adaptation loses the learned metric.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Linear(3, 2)
    >>> mb.fold_tnet(mb.insert_tnet(model))
    Linear(in_features=3, out_features=2, bias=True)

    Raises `BlockError` for a model without transforms.
    """
    copied = copy.deepcopy(model)
    changed: list[Any] = modules_of(copied, Transformed)
    if not changed:
        raise BlockError(
            f"fold_tnet: {type(model).__name__} has no transform to fold; insert_tnet makes them"
        )
    plain = {transformed: kind for kind, transformed in _TRANSFORMED.items()}
    folded: dict[nn.Parameter, nn.Parameter] = {}

    def fold(layer: Any, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if parameter not in folded:  # tied parameters stay tied
            groups = getattr(layer, "groups", 1)
            rows = parameter.reshape(groups, len(parameter) // groups, -1)
            transform = layer.transform.weight.reshape(groups, rows.shape[1], -1)
            values = (transform @ rows).reshape(parameter.shape)
            folded[parameter] = nn.Parameter(values, parameter.requires_grad)
        return folded[parameter]

    for layer in changed:
        layer.weight, layer.bias = fold(layer, layer.weight), fold(layer, layer.bias)
        del layer.transform
        layer.__class__ = plain[type(layer)]
    return copied


@checked()
def transform_patterns(model: nn.Module) -> list[str]:
    """Patterns for `adapt` that leave every T to the outer loop.

    >>> import torch
    >>> import metablocks as mb
    >>> mb.transform_patterns(mb.insert_tnet(torch.nn.Sequential(torch.nn.Linear(3, 2))))
    ['*', '!0.transform.weight']
    """
    return outer_loop_patterns(
        model, lambda module: ["transform.weight"] if isinstance(module, Transformed) else []
    )


def _identity(layer: Any) -> nn.Module:
    """The T of a layer, as it starts: of the layer's dtype, on its device."""
    weight = layer.weight
    count, groups = len(weight), getattr(layer, "groups", 1)
    eye = torch.eye(count // groups, dtype=weight.dtype, device=weight.device)
    if isinstance(layer, nn.Linear):
        transform: Any = nn.Linear(count, count, bias=False, device="meta")
    else:
        transform = type(layer)(count, count, 1, groups=groups, bias=False, device="meta")
    values = eye.repeat(groups, 1).reshape(transform.weight.shape)
    transform.weight = nn.Parameter(values)
    return transform.train(layer.training)  # type: ignore[no-any-return]


def _check(model: nn.Module, chosen: Sequence[str]) -> None:
    """Raise `BlockError` for the first chosen layer that cannot have a T."""
    held = holders(model)
    for name in chosen:
        layer = model.get_submodule(name)
        leave = f'; to leave it without a T: layers=["*", "!{name}.weight"]' if name else ""
        reason = obstacle(model, name, layer, _TRANSFORMED)
        if reason:
            raise BlockError(f"insert_tnet: {name or 'the model'} {reason}{leave}")
        for parameter in layer.parameters(recurse=False):
            for other, module in held[id(parameter)]:
                if other not in chosen or not _share_a_transform(layer, module):
                    raise BlockError(
                        f"insert_tnet: {name} shares a parameter with {other}, and they could not "
                        f"share a T: folded into the one, it would change the other{leave}"
                    )


def _share_a_transform(one: nn.Module, other: nn.Module) -> bool:
    alike = type(one) is type(other) and one.weight is other.weight
    return alike and getattr(one, "groups", 1) == getattr(other, "groups", 1)
