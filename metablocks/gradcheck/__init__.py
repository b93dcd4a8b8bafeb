"""Check a meta-gradient: every meta-parameter of a learner, or of a recipe made small and smooth."""

from metablocks.gradcheck.recipes import check_gradients
from metablocks.gradcheck.report import GradientReport

__all__ = ["GradientReport", "check_gradients"]
