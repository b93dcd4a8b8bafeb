"""Training and evaluation of recipes: plain loops over the contract."""

from metablocks.run.commands import allowed_packages, evaluate_run, train_recipe
from metablocks.run.scores import Scores, accuracy, score
from metablocks.run.train import Stopped, final_scores, train

__all__ = [
    "Scores",
    "Stopped",
    "accuracy",
    "allowed_packages",
    "evaluate_run",
    "final_scores",
    "score",
    "train",
    "train_recipe",
]
