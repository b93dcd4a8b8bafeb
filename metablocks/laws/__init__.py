"""The laws that blocks obey, as plain functions: one file a protocol.

Each takes blocks and a small problem (`laws.problem`), and raises `LawError` where the law breaks.
The tests run them over every shipped block; run them on a block of your own just so:

>>> from metablocks import Chain, LearningRate, UpdateRule
>>> from metablocks.laws import problem, rules
>>> class Halve(UpdateRule):
...     def forward(self, updates, state, step):
...         return {name: u / 2 for name, u in updates.items()}, state
>>> rules.zero_hessian(Halve)
>>> rules.same_as_without(Halve, problem.regression())
Traceback (most recent call last):
metablocks.errors.LawError: identity, loss: relative error ...
"""

from metablocks.laws import (
    estimators,
    gradients,
    linnet,
    orders,
    problem,
    purity,
    rules,
    sources,
    step_losses,
)

__all__ = [
    "estimators",
    "gradients",
    "linnet",
    "orders",
    "problem",
    "purity",
    "rules",
    "sources",
    "step_losses",
]
