"""Proofs of what a user has put together, run on request: is this block right, and this gradient?"""

from metablocks.prove.block_report import BlockReport, LawRow
from metablocks.prove.blocks import verify
from metablocks.prove.gradient_report import GradientReport
from metablocks.prove.recipes import check_gradients

__all__ = ["BlockReport", "GradientReport", "LawRow", "check_gradients", "verify"]
