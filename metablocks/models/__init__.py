"""Models for recipes. Blocks work on any `nn.Module`; these are the ones of the literature."""

from metablocks.models.conv4 import Conv4
from metablocks.models.mlp import MLP
from metablocks.models.per_step_norm import PerStepBatchNorm, norm_patterns, per_step_batch_norm

__all__ = ["MLP", "Conv4", "PerStepBatchNorm", "norm_patterns", "per_step_batch_norm"]
