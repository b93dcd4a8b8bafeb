"""Proofs of what a user has put together, run on request: is the gradient of this recipe right?"""

from metablocks.prove.gradient_report import GradientReport
from metablocks.prove.recipes import check_gradients

__all__ = ["GradientReport", "check_gradients"]
