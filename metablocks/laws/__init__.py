"""The laws that blocks obey, as plain functions: one file a protocol.

Each takes blocks and a small problem (`laws.problem`), and raises `LawError` where the law breaks.
The tests run them over every shipped block; run them on a block of your own just so:

>>> from metablocks import Chain, LearningRate, UpdateRule
>>> from metablocks.laws import problem, rule_gradients, rules
>>> class Halve(UpdateRule):
...     def forward(self, updates, state, step):
...         return {name: u / 2 for name, u in updates.items()}, state
>>> rules.zero_hessian(Halve, problem.regression())
>>> rule_gradients.same_as_without(Halve, problem.regression())
Traceback (most recent call last):
metablocks.errors.LawError: identity, loss: relative error ...
"""

from metablocks.laws import (
    cases,
    end_points,
    estimators,
    executors,
    gradients,
    kronecker,
    linnet,
    norms,
    orders,
    plain,
    problem,
    purity,
    rule_gradients,
    rules,
    sources,
    step_losses,
    surgery,
)

__all__ = [
    "cases",
    "end_points",
    "estimators",
    "executors",
    "gradients",
    "kronecker",
    "linnet",
    "norms",
    "orders",
    "plain",
    "problem",
    "purity",
    "rule_gradients",
    "rules",
    "sources",
    "step_losses",
    "surgery",
]
