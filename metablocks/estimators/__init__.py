"""Estimators: how the meta-gradient of one task is computed."""

from metablocks.estimators.adjoint import Adjoint
from metablocks.estimators.base import Estimator, TaskGradient
from metablocks.estimators.implicit import Implicit
from metablocks.estimators.reptile import Reptile
from metablocks.estimators.unrolled import Unrolled

__all__ = ["Adjoint", "Estimator", "Implicit", "Reptile", "TaskGradient", "Unrolled"]
