"""Recipes: one YAML file states one experiment, completely and strictly.

recipe = load("maml_sinusoid", ["inner.steps=3"])     # checked, resolved, every value placed
experiment = build(recipe)                            # learner, tasks, optimiser, schedule
"""

from metablocks.recipe.build import Experiment, build
from metablocks.recipe.load import from_text, load, shipped
from metablocks.recipe.record import Recipe

__all__ = [
    "Experiment",
    "Recipe",
    "build",
    "from_text",
    "load",
    "shipped",
]
