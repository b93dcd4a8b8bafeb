"""Models for recipes. Blocks work on any `nn.Module`; these are the ones of the literature."""

from metablocks.models.conv4 import Conv4
from metablocks.models.mlp import MLP

__all__ = ["MLP", "Conv4"]
