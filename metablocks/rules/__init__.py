"""Update rules: how a gradient becomes an update.

`RULES` is the table of blocks for the slot `rule` of recipes. A rule of a name there, imported here, is
known everywhere: in recipes, to `metablocks verify`, and as a name of `metablocks`.
"""

from collections.abc import Callable

from metablocks.rules.base import Chain, NamedTensors, StepInfo, UpdateRule
from metablocks.rules.gradient_mask import MTMask
from metablocks.rules.kronecker import KFO
from metablocks.rules.learning_rate import Granularity, LearningRate, lslr, meta_sgd
from metablocks.rules.meta_curvature import MetaCurvature
from metablocks.rules.optimizers import Adagrad, Adam, Adamax, Momentum, RMSprop
from metablocks.rules.regularizers import ClipNorm, Proximal, WeightDecay

RULES: dict[str, Callable[..., UpdateRule]] = {
    "learning_rate": LearningRate,
    "meta_sgd": meta_sgd,
    "lslr": lslr,
    "kfo": KFO,
    "meta_curvature": MetaCurvature,
    "mt_mask": MTMask,
    "momentum": Momentum,
    "adam": Adam,
    "adamax": Adamax,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
    "clip_norm": ClipNorm,
    "weight_decay": WeightDecay,
    "proximal": Proximal,
}

__all__ = [
    "KFO",
    "RULES",
    "Adagrad",
    "Adam",
    "Adamax",
    "Chain",
    "ClipNorm",
    "Granularity",
    "LearningRate",
    "MTMask",
    "MetaCurvature",
    "Momentum",
    "NamedTensors",
    "Proximal",
    "RMSprop",
    "StepInfo",
    "UpdateRule",
    "WeightDecay",
    "lslr",
    "meta_sgd",
]
