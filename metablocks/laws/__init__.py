"""The laws that blocks obey, as plain functions: one file a protocol.

Each takes a block and a small problem (`laws.cases`), and raises `LawError` if the law breaks. Those
of learners (`gradients`, `purity`) hold for whatever block a learner has. `laws.numbered` lists the
laws that have a number. Run them on a block of your own one by one,

>>> from metablocks import Chain, LearningRate, UpdateRule
>>> from metablocks.laws import gradients, rules
>>> from metablocks.laws.cases import Case
>>> class Halve(UpdateRule):
...     negates = False  # a learning rate goes behind it
...
...     def forward(self, updates, state, step):
...         return {name: u / 2 for name, u in updates.items()}, state
>>> small = Case(norm="batch", tasks=2).problem()
>>> rules.fits_the_gradients(Halve, small)
>>> gradients.finite_differences(rules.learner_of(Halve, small), small.tasks)
>>> rules.same_as_without(Halve, small)
Traceback (most recent call last):
metablocks.errors.LawError: identity, loss: relative error ...

or all of its protocol in your own pytest: `parametrize_with_laws`.
"""

from metablocks.laws import (
    cases,
    compare,
    estimators,
    executors,
    gradients,
    norms,
    numbered,
    orders,
    plain_loop,
    purity,
    rules,
    sources,
    step_losses,
)
from metablocks.laws.check import checks, parametrize_with_laws, run_law

__all__ = [
    "cases",
    "checks",
    "compare",
    "estimators",
    "executors",
    "gradients",
    "norms",
    "numbered",
    "orders",
    "parametrize_with_laws",
    "plain_loop",
    "purity",
    "rules",
    "run_law",
    "sources",
    "step_losses",
]
