"""Model surgery: other modules in the places of some."""

from collections.abc import Callable

from torch import nn


def replace_modules(
    model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put `convert(name, module)` in the place of every module for which it gives one, in place.

    A module that stands in several places is converted once. Returns the model, or what stands in
    its place.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> replace_modules(model, lambda name, m: nn.Tanh() if isinstance(m, nn.ReLU) else None)[1]
    Tanh()
    """
    made: dict[int, nn.Module | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            made[id(module)] = convert(name, module)
        new = made[id(module)]
        if new is None:
            continue
        if not name:
            return new
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    return model
