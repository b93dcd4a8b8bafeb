"""Training and evaluation of recipes: plain loops over the contract."""

from metablocks.meta_steps import accuracy
from metablocks.runs.commands import evaluate_run, train_recipe
from metablocks.runs.loading import load_recipe
from metablocks.runs.scores import Scores, score
from metablocks.runs.train import Stopped, final_scores, train

__all__ = [
    "Scores",
    "Stopped",
    "accuracy",
    "evaluate_run",
    "final_scores",
    "load_recipe",
    "score",
    "train",
    "train_recipe",
]
