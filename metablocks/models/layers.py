"""Activations by name, and what the shipped models share."""

from typing import Literal

from torch import nn

from metablocks.errors import BlockError

Activation = Literal["relu", "leaky_relu", "tanh", "gelu", "softplus"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}

DEEPEST = 1000
"""The most layers of a net: making one of a billion would not end."""


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


def check_tokens(block: str, input_shape: tuple[int, ...]) -> None:
    """Raise `BlockError` for inputs that are not sequences of tokens."""
    if len(input_shape) != 1:
        raise BlockError(
            f"{block} takes tokens [examples, length]; the tasks have inputs of shape "
            f"{tuple(input_shape)}. For images use conv4 or torchvision",
            block=block,
        )
