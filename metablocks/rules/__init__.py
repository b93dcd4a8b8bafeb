"""Update rules: how a gradient becomes an update."""

from metablocks.rules.base import Chain, NamedTensors, StepInfo, UpdateRule
from metablocks.rules.rates import Granularity, LearningRate, lslr, meta_sgd

__all__ = [
    "Chain",
    "Granularity",
    "LearningRate",
    "NamedTensors",
    "StepInfo",
    "UpdateRule",
    "lslr",
    "meta_sgd",
]
