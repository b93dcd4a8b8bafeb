"""Model surgery: replace modules, and change linear and convolutional layers.

A layer of a copied model is changed where it is: it becomes one of a subclass, with a module more, so
that settings, names, ties and numbers stay. A layer that cannot be changed so is refused by name.
"""

import dis
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from metablocks.errors import BlockError, concerning
from metablocks.selection import select

LINEAR_LIKE = (nn.Linear, nn.Bilinear, _ConvNd)
"""Layers with a weight that multiplies: the ordinary ones, and the unusual that are refused."""

_READ_THE_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that hand their layers' weights to a kernel, which would skip what a layer adds."""

_Kind = TypeVar("_Kind", bound=nn.Module)


def replace_modules(
    model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Replace every module for which `convert(name, module)` gives another one, in place.

    A module that is registered in several places is converted once. Returns the model, or its
    replacement.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> replace_modules(model, lambda name, m: nn.Tanh() if isinstance(m, nn.ReLU) else None)[1]
    Tanh()
    """
    converted: dict[int, nn.Module | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in converted:
            converted[id(module)] = convert(name, module)
        new = converted[id(module)]
        if new is None:
            continue
        if not name:
            return new
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    return model


def outer_loop_patterns(
    model: nn.Module, parameters: Callable[[nn.Module], Iterable[str]]
) -> list[str]:
    """Patterns for `adapt` that leave the `parameters(module)` of each module to the outer loop.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
    >>> outer_loop_patterns(model, lambda m: ["bias"] if isinstance(m, nn.Linear) else [])
    ['*', '!0.bias']
    """
    names = [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules(remove_duplicate=False)
        for parameter in parameters(module)
    ]
    return ["*", *(f"!{name}" for name in names)]


def modules_of(model: nn.Module, kind: type[_Kind]) -> list[_Kind]:
    """The modules of a class in a model.

    >>> modules_of(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), nn.Tanh)
    [Tanh()]
    """
    return [module for module in model.modules() if isinstance(module, kind)]


def choose_layers(
    block: str, model: nn.Module, layers: str | Sequence[str], *, trainable: bool = False
) -> list[str]:
    """The names of the linear and convolutional layers that patterns over their weights select.

    With `trainable`, of those whose weight is trainable. Raises `BlockError` if the model has none,
    and `SelectionError` for a pattern that matches nothing.

    >>> choose_layers("insert_lora", nn.Sequential(nn.Linear(1, 1), nn.Tanh()), "0.*")
    ['0']
    """
    candidates = {
        f"{name}.weight" if name else "weight": name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_LIKE) and (module.weight.requires_grad or not trainable)
    }
    if not candidates:
        which = " with a trainable weight" if trainable else ""
        kind = type(model).__name__
        raise BlockError(f"{block}: {kind} has no linear or convolutional layer{which}")
    with concerning(block, "layers"):
        return [candidates[weight] for weight in select(layers, candidates)]


def obstacle(
    model: nn.Module, name: str, layer: nn.Module, kinds: Collection[type[nn.Module]]
) -> str:
    """The reason why a layer of `model` cannot be changed by a block that takes `kinds`, or "".

    >>> model = nn.Sequential(nn.ConvTranspose1d(1, 1, 2))
    >>> obstacle(model, "0", model[0], [nn.Conv1d])
    'is a ConvTranspose1d; it takes Conv1d'
    """
    kind = type(layer).__name__
    if isinstance(layer, LazyModuleMixin):
        return f"is a {kind} that has no shape yet; run the model on one batch first"
    if type(layer) not in kinds:
        return f"is a {kind}; it takes {', '.join(known.__name__ for known in kinds)}"
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    known = isinstance(owner, _READ_THE_WEIGHTS) or getattr(owner, "weights_are_read", False)
    if known or _reads_the_weight(owner, leaf):
        return f"belongs to a {type(owner).__name__}, which reads its weight and passes by the rest"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "has hooks, which would be lost"
    return ""


def _reads_the_weight(owner: nn.Module, leaf: str) -> bool:
    """True if a module's `forward` takes the weight of its layer `leaf`, and never calls the layer.

    So does the attention of torchvision's Swin transformers.
    """
    try:
        code = list(dis.get_instructions(type(owner).forward))
    except TypeError:  # it is not written in Python
        return False
    names = [i.argval for i in code if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    after = [second for first, second in pairwise([*names, ""]) if first == leaf]
    return "weight" in after and set(after) <= {"weight", "bias"}


def holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """For each parameter, by its id, the modules that hold it, with their names."""
    modules: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            modules.setdefault(id(parameter), []).append((name, module))
    return modules
