"""The laws of `own_rule.SignedRoot`, in pytest: `pytest recipes/python`."""

import pytest
from own_rule import SignedRoot

from metablocks.laws import rules
from metablocks.laws.cases import Case

CASES = [Case(norm="batch", tasks=2), Case(steps=2)]


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(
    "law",
    [rules.fits_the_gradients, rules.zero_hessian, rules.adapt_is_its_loop],
    ids=lambda law: law.__name__,
)
def test_the_rule_obeys_its_laws(law, case):
    law(SignedRoot, case.problem())
