"""Hypothesis strategies for what laws are run on: nets, tasks, rules, orders, step losses, progress.

    @given(case=strategies.cases(), rule=strategies.rules())
    def test_my_executor(case, rule):
        executors.equals_the_loop(MyExecutor(), case.problem(), rule=rule)

Whatever is drawn shrinks towards the smallest of its kind, and its `repr` is the Python that makes it
again. Needs hypothesis, which `pip install "metablocks[laws]"` installs; nothing else in metablocks
imports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:  # pragma: no cover
    from metablocks.errors import MissingError

    raise MissingError(
        "the strategies of the laws draw with hypothesis, which is not installed; "
        "pip install 'metablocks[laws]'"
    ) from error

from metablocks import rules as rules_module
from metablocks.laws.cases import Case
from metablocks.order import AnnealedOrder, FirstOrder, Order, SecondOrder, TruncatedOrder
from metablocks.rules import UpdateRule
from metablocks.step_loss import AnnealedStepLoss, FinalStepLoss, StepLoss, UniformStepLoss
from metablocks.types import Progress


@dataclass(frozen=True, repr=False)
class Make:
    """A factory of rules, written as the code of one; its `repr` is Python that makes it again.

    >>> Make("lslr(0.1)"), Make("KFO()")().hidden
    (lambda: lslr(0.1), 0)
    """

    code: str

    def __call__(self) -> UpdateRule:
        rule: UpdateRule = eval(self.code, vars(rules_module))
        return rule

    def __repr__(self) -> str:
        return f"lambda: {self.code}"


RULES = [
    Make("LearningRate(0.1)"),
    Make("LearningRate(0.1, learn=True)"),
    Make("lslr(0.1)"),
    Make("meta_sgd(0.1)"),
    Make("Chain(Momentum(learn=True), lslr(0.1))"),
    Make("Chain(Adam(eps=0.1, learn=True), lslr(0.1))"),
    Make("Chain(ClipNorm(0.3), lslr(0.1))"),
    Make("Chain(WeightDecay(0.1, learn=True), lslr(0.1))"),
    Make("Chain(Proximal(0.5), lslr(0.1))"),
    Make("Chain(KFO(), lslr(0.1))"),
    Make("Chain(MetaCurvature(), meta_sgd(0.1))"),
]
"""Rules that draw nothing and are smooth on the scale of a finite difference."""

MASKS = [Make("Chain(MTMask(), lslr(0.1))")]
"""Rules that draw."""


def cases(**fixed: object) -> SearchStrategy[Case]:
    """Nets and tasks: dense and convolutional, deep and flat, normed, tied, frozen, partly adapted.

    A field that is given is fixed to that value, or to one of a list of values.

    >>> cases(kind="conv", norm=["batch"]).validate()
    """
    drawn: dict[str, Sequence[object]] = {
        "kind": ["dense", "conv"],
        "depth": [1, 2],
        "width": [2, 3],
        "activation": ["tanh", "softplus", "gelu"],
        "norm": ["none", "batch", "layer"],
        "tied": [False, True],
        "frozen": [False, True],
        "adapt": ["*", "head.*", "!head.*"],
        "tasks": [1, 2, 3],
        "steps": [1, 2, 3],
        "seed": range(100),
    }
    assert set(drawn) == {field.name for field in fields(Case)}
    for name, value in fixed.items():
        drawn[name] = value if isinstance(value, list) else [value]
    return st.builds(Case, **{name: st.sampled_from(v) for name, v in drawn.items()})


def rules(*, draws: bool = False) -> SearchStrategy[Make]:
    """Factories of update rules; with `draws` also of rules that draw random numbers."""
    return st.sampled_from(RULES + MASKS if draws else RULES)


def orders(*, steps: int = 1) -> SearchStrategy[Order]:
    """Orders that a learner of so many steps takes."""
    return st.one_of(
        st.just(SecondOrder()),
        st.just(FirstOrder()),
        st.builds(TruncatedOrder, last=st.integers(0, steps)),
        st.builds(AnnealedOrder, first_order_epochs=st.integers(0, 9)),
    )


def step_losses() -> SearchStrategy[StepLoss]:
    """Step losses."""
    return st.one_of(
        st.just(FinalStepLoss()),
        st.just(UniformStepLoss()),
        st.builds(AnnealedStepLoss, epochs=st.integers(1, 9)),
    )


def progress() -> SearchStrategy[Progress]:
    """Epochs from 0 to 12, whole ones and fractions."""
    return st.builds(Progress, epoch=st.integers(0, 12) | st.floats(0, 12))
