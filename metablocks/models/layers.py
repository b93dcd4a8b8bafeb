"""Activations by name, and the initialisation of the shipped models."""

from typing import Literal

from torch import nn

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
