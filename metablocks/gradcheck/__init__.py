"""Check a meta-gradient: of a learner, or of a recipe that is made small and smooth first."""

from metablocks.gradcheck.check import check_learner
from metablocks.gradcheck.report import GradientReport
from metablocks.gradcheck.shrink import check_gradients

__all__ = ["GradientReport", "check_gradients", "check_learner"]
