"""Update rules: how a gradient becomes an update."""

from metablocks.rules.base import Chain, NamedTensors, StepInfo, UpdateRule
from metablocks.rules.kronecker import KFO
from metablocks.rules.mask import MTMask
from metablocks.rules.meta_curvature import MetaCurvature
from metablocks.rules.optimizers import Adam, Momentum
from metablocks.rules.rates import Granularity, LearningRate, lslr, meta_sgd
from metablocks.rules.shaping import ClipNorm, Proximal, WeightDecay

__all__ = [
    "KFO",
    "Adam",
    "Chain",
    "ClipNorm",
    "Granularity",
    "LearningRate",
    "MTMask",
    "MetaCurvature",
    "Momentum",
    "NamedTensors",
    "Proximal",
    "StepInfo",
    "UpdateRule",
    "WeightDecay",
    "lslr",
    "meta_sgd",
]
