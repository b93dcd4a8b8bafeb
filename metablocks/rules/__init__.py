"""Update rules: how a gradient becomes an update."""

from metablocks.rules.base import Chain, NamedTensors, StepInfo, UpdateRule
from metablocks.rules.kronecker import KFO
from metablocks.rules.mask import MTMask
from metablocks.rules.meta_curvature import MetaCurvature
from metablocks.rules.rates import Granularity, LearningRate, lslr, meta_sgd

__all__ = [
    "KFO",
    "Chain",
    "Granularity",
    "LearningRate",
    "MTMask",
    "MetaCurvature",
    "NamedTensors",
    "StepInfo",
    "UpdateRule",
    "lslr",
    "meta_sgd",
]
