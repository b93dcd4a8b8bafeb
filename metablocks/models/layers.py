"""What the shipped models share: activations by name, and their initialisation."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

from metablocks.errors import BlockError, suggest

Activation = Literal["relu", "leaky_relu", "tanh", "gelu", "softplus"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


DEEPEST = 1000


def xavier(model: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, in place, for every linear and convolutional layer.

    >>> layer = nn.Linear(3, 2)
    >>> xavier(layer)
    >>> layer.bias.tolist()
    [0.0, 0.0]
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_depth(field: str, layers: int) -> None:
    """Raise `BlockError` for a net so deep that making it would not end: above 1000 layers.

    >>> check_depth("layers", 4)
    """
    if layers > DEEPEST:
        raise BlockError(f"{field} asks for {layers} layers; it takes {DEEPEST} at most")


def check_choice(field: str, given: str, choices: Iterable[str]) -> None:
    """Raise `BlockError` unless `given` is one of `choices`.

    >>> check_choice("norm", "batch", ["batch", "none"])
    """
    choices = list(choices)
    if given not in choices:
        raise BlockError(
            f'{field} is "{given}"{suggest(str(given), choices)}; it is one of {", ".join(choices)}'
        )
