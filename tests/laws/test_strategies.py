"""Cases and strategies: what is drawn is a problem, and its repr is the Python that makes it."""

import subprocess
import sys

import torch
from hypothesis import given, settings

import metablocks
from metablocks.laws import strategies
from metablocks.laws.cases import Case


@given(case=strategies.cases())
def test_a_case_is_its_repr_and_gives_the_same_numbers_again(case):
    assert eval(repr(case), {"Case": Case}) == case
    one, other = (case.problem().model().state_dict() for _ in range(2))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


@settings(max_examples=10)
@given(case=strategies.cases(kind=["dense", "conv", "quadratic"]))
def test_every_case_has_a_finite_meta_gradient(case):
    small = case.problem()
    adapt = "*" if case.kind == "quadratic" else case.adapt
    result = small.learner(adapt=adapt).meta_gradient(small.tasks)
    assert result.nonfinite is None
    assert len(result.query_losses) == case.tasks


@given(rule=strategies.rules(draws=True))
def test_a_rule_is_its_code(rule):
    made = eval(rule.code, vars(metablocks))
    assert repr(made) == repr(rule())


def test_the_library_and_its_laws_do_without_hypothesis():
    """And the strategies say what to install."""
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import metablocks.laws\n"
        "try:\n"
        "    import metablocks.laws.strategies\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'metablocks[laws]'" in done.stdout
