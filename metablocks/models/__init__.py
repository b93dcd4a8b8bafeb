"""Models for recipes. Blocks work on any `nn.Module`; these are the ones of the literature."""

from metablocks.models.conv4 import Conv4
from metablocks.models.linnet import append_linear, collapse_linear
from metablocks.models.mlp import MLP
from metablocks.models.per_step_norm import PerStepBatchNorm
from metablocks.models.per_step_surgery import norm_patterns, per_step_batch_norm
from metablocks.models.tnet import fold_tnet, insert_tnet, transform_patterns

__all__ = [
    "MLP",
    "Conv4",
    "PerStepBatchNorm",
    "append_linear",
    "collapse_linear",
    "fold_tnet",
    "insert_tnet",
    "norm_patterns",
    "per_step_batch_norm",
    "transform_patterns",
]
