"""Models for recipes, and surgery. Blocks work on any `nn.Module`."""

from metablocks.models.conv4 import Conv4
from metablocks.models.gru import GRU
from metablocks.models.huggingface import huggingface_model
from metablocks.models.linnet import append_linear, collapse_linear
from metablocks.models.lora import fold_lora, insert_lora
from metablocks.models.mlp import MLP
from metablocks.models.per_step_norm import PerStepBatchNorm
from metablocks.models.per_step_surgery import norm_patterns, per_step_batch_norm
from metablocks.models.tnet import fold_tnet, insert_tnet, transform_patterns
from metablocks.models.torchvision_net import torchvision_classifier
from metablocks.models.transformer import Transformer

__all__ = [
    "GRU",
    "MLP",
    "Conv4",
    "PerStepBatchNorm",
    "Transformer",
    "append_linear",
    "collapse_linear",
    "fold_lora",
    "fold_tnet",
    "huggingface_model",
    "insert_lora",
    "insert_tnet",
    "norm_patterns",
    "per_step_batch_norm",
    "torchvision_classifier",
    "transform_patterns",
]
