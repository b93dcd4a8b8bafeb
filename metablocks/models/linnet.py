"""LinNet: linear layers behind the last one, which change how fast a model adapts, not what it is.

    y = W_L … W_1 (W x + b)        collapsed:  W ← W_L … W_1 W,   b ← Σ_i (Π_{j>i} W_j) b_i

Without a non-linearity the extra layers add nothing that the model can express, but the gradient of
the product is preconditioned by them: upper layers learn to be the step size of the lower ones. A
shallow model may have no way to adapt fast, while a deep linear one adapts exactly (Arnold, Iqbal,
Sha 2021).
"""

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Le
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError, suggest_then
from metablocks.models.layers import DEEPEST
from metablocks.models.surgery import holders, modules_of, obstacle
from metablocks.models.tnet import Transformed

Init: TypeAlias = Literal["identity", "random"]


class DeepLinear(nn.Linear):
    """A linear layer and the linear layers `appended` to it. `append_linear` makes it.

    `weight` and `bias` are those of the layer that it was, `appended.0.weight`, … the others'.
    """

    appended: nn.Sequential

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.appended(super().forward(inputs))
        return output


@checked()
def append_linear(
    model: nn.Module,
    *,
    depth: Annotated[Count, Le(DEEPEST)],
    width: Count | None = None,
    init: Init = "identity",
    layer: str | None = None,
    features: Count | None = None,
) -> nn.Module:
    """A copy of `model` with `depth` linear layers more behind its last linear layer.

        y = W_L … W_1 (W x + b)        L = depth

    There is no non-linearity between them, so `collapse_linear` gives back a model of the original
    size, class and names. They come right behind the last linear layer, whose outputs are taken to be
    the model's: `head.weight` keeps its name, and `head.appended.0.weight`, … join it, with biases
    if the head has one. `"head.*"` selects them all.

    - `depth`: how many layers, 1 or more; from the layer's outputs F to F.
    - `width`: of what lies between them, `[F → width → … → width → F]`; F unless given.
    - `init`: `"identity"`: the function is unchanged, exactly, and `width` is at least F. Units
      beyond F start with random weights in front (Xavier-uniform) and zeros behind: they receive
      gradients, but do not contribute to the output at first. `"random"`: Xavier-uniform, biases
      zero, any width.
    - `layer`: the name of the layer to append to, if it is not the last linear one, in the order
      in which the model registers its modules.
    - `features`: for a model that does not end in a linear layer, how many outputs
      `[..., features]` it has. The result is `nn.Sequential(model=…, linear=…)`, the first of the
      `depth` layers being `linear` itself, with a bias; collapsed, that one linear layer stays.

    Laws: collapsing keeps the function; collapsing after adaptation gives the adapted function, and
    collapsing before loses the preconditioner, and so gives another one.

    Source: Arnold, Iqbal, Sha 2021 (LinNet). Note: 1. how units beyond F start is our choice, not
    the paper's.

    >>> from torch import nn
    >>> import metablocks as mb
    >>> model = mb.append_linear(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), depth=2)
    >>> [name for name, _ in model.named_parameters() if "weight" in name]
    ['0.weight', '2.weight', '2.appended.0.weight', '2.appended.1.weight']

    Raises `BlockError` for sizes below 1, a `depth` above 1000, a `width` that cannot be the
    identity, a model whose last linear layer cannot be determined or is not its end, for `layer` together
    with `features`, and for a last layer that cannot be collapsed: a class of one's own, tied to
    another, with hooks or a T.
    """
    kind = type(model).__name__
    if modules_of(model, DeepLinear):
        raise BlockError(f"append_linear: {kind} has appended layers already; give one depth")
    if features is not None and layer is not None:
        raise BlockError(
            "append_linear takes layer, for a model with that linear layer, or features, for one "
            "without; given both"
        )
    if features is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
        first, *rest = _layers(features, depth, width, init, like, bias=True)
        parts = {"model": copy.deepcopy(model), "linear": _deep(first, rest)}
        return nn.Sequential(OrderedDict(parts)).train(model.training)
    name = _last_linear(model) if layer is None else layer
    _check(model, name)

    copied = copy.deepcopy(model)
    last: Any = copied.get_submodule(name)
    bias = last.bias is not None
    _deep(last, _layers(last.out_features, depth, width, init, last.weight, bias=bias))
    return copied


@checked()
@torch.no_grad()
def collapse_linear(model: nn.Module) -> nn.Module:
    """A copy of `model` with its appended layers multiplied into the one before: the same function.

        W ← W_L … W_1 W,    b ← Σ_i (Π_{j>i} W_j) b_i

    The layer is an `nn.Linear` again, with its names and shapes, so that the `state_dict` loads into
    the original model. Parameters are new leaves; no gradient flows back.

    Law: outputs are equal up to rounding. Collapse what `learner.adapt` returns; collapsing before
    adaptation keeps the function too, but not how it adapts.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Linear(3, 2)
    >>> mb.collapse_linear(mb.append_linear(model, depth=3, width=8))
    Linear(in_features=3, out_features=2, bias=True)

    Raises `BlockError` for a model without appended layers.
    """
    copied = copy.deepcopy(model)
    changed = modules_of(copied, DeepLinear)
    if not changed:
        raise BlockError(
            f"collapse_linear: {type(model).__name__} has no appended layers; append_linear "
            "appends them"
        )
    for layer in changed:
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        for factor in layer.appended:
            assert isinstance(factor, nn.Linear)
            weight = factor.weight @ weight
            bias = None if bias is None else factor.weight @ bias + factor.bias
        layer.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
        layer.out_features = len(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), layer.bias.requires_grad)
        del layer.appended
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    return copied


def _layers(
    size: int, depth: int, width: int | None, init: Init, like: Tensor, *, bias: bool
) -> list[nn.Linear]:
    """`depth` linear layers from `size` to `size`, of the dtype and on the device of `like`."""
    width = size if width is None else width
    if init == "identity" and depth > 1 and width < size:
        raise BlockError.about(
            "append_linear",
            "width",
            f"is {width}, narrower than the {size} outputs: no such layers are the identity; take "
            f'{size} or more, or init="random"',
        )
    sizes = [size, *[width] * (depth - 1), size]
    made = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs, bias=bias, device=like.device, dtype=like.dtype)
        nn.init.xavier_uniform_(layer.weight)
        if bias:
            nn.init.zeros_(layer.bias)
        if init == "identity":
            # Only the first keeps random rows, for units beyond `size`; the last multiplies them by 0.
            rows = size if index == 0 else outputs
            with torch.no_grad():
                nn.init.eye_(layer.weight[:rows])
        made.append(layer)
    return made


def _deep(layer: nn.Linear, appended: list[nn.Linear]) -> nn.Linear:
    """Append to a layer, which becomes a `DeepLinear`."""
    layer.appended = nn.Sequential(*appended).train(layer.training)
    layer.__class__ = DeepLinear
    return layer


def _last_linear(model: nn.Module) -> str:
    """The name of the linear layer that the model ends in, as far as its modules tell."""
    end, path = model, ""
    while isinstance(end, nn.Sequential) and len(end):
        leaf, end = list(end.named_children())[-1]
        path = f"{path}.{leaf}" if path else leaf
    transforms = [m.transform for m in end.modules() if isinstance(m, Transformed)]
    names = [
        name
        for name, module in end.named_modules()
        if isinstance(module, nn.Linear) and not any(module is t for t in transforms)
    ]
    if not names:
        raise BlockError(
            f"append_linear: {type(model).__name__} ends in a {type(end).__name__}, which has no "
            "linear layer to append to; say how many features it gives, features=…, or which linear "
            "layer it is, layer=…"
        )
    return ".".join(filter(None, [path, names[-1]]))


def _check(model: nn.Module, name: str) -> None:
    """Raise `BlockError` unless layers can be appended to this one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        there_are = f"the linear layers are {', '.join(linear) or 'none'}"
        near = suggest_then(name, linear, there_are)
        raise BlockError.about("append_linear", "layer", f'is "{name}"{near}')
    layer, called = modules[name], name or "the model"
    reason = obstacle(model, name, layer, [nn.Linear])
    if reason:
        raise BlockError(f"append_linear: {called} {reason}")
    held = holders(model)
    for parameter in layer.parameters(recurse=False):
        for other, module in held[id(parameter)]:
            if module is not layer:
                raise BlockError(
                    f"append_linear: {called} shares a parameter with {other}, which collapsing "
                    "the one would change"
                )
