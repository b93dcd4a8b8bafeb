"""Estimators: how the meta-gradient of one task is computed."""

from metablocks.estimators.base import Estimator, TaskGradient
from metablocks.estimators.implicit import Implicit
from metablocks.estimators.reptile import Reptile
from metablocks.estimators.unrolled import Unrolled

__all__ = ["Estimator", "Implicit", "Reptile", "TaskGradient", "Unrolled"]
