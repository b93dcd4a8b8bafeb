"""The laws of each protocol: which function says it, what it is run on, and what excuses a block.

One literal table a protocol. A law is called with the block (of a rule with what makes it, since a
learner sets up its own), with a problem where it needs one, and with what else is drawn.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from metablocks.estimators import Implicit, Reptile
from metablocks.laws import (
    end_points,
    estimators,
    executors,
    kronecker,
    norms,
    orders,
    rule_gradients,
    rules,
    step_losses,
    strategies,
)
from metablocks.prove import excuses
from metablocks.rules import KFO, MetaCurvature


def _always(block: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Law:
    """One law of a protocol."""

    name: str
    check: Callable[..., None]
    """`check(block, problem, **drawn)`, without the problem where no case is drawn."""
    drawn: dict[str, SearchStrategy[Any]]
    """What it is run on; `case` becomes the problem."""
    excuse: Callable[[Any], str | None] = _always
    """Why it does not apply to a block; None where it does."""
    kind: type | None = None
    """The block whose own law it is; None where it is the protocol's."""

    @property
    def says(self) -> str:
        """The law in a sentence, from its docstring."""
        return (self.check.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")


_SMALL = strategies.cases(tasks=1)
_ANY = strategies.cases()
_SEVERAL = strategies.cases(tasks=[2, 3])
_PLAIN = strategies.cases(adapt="*")
_ALL_ADAPT = strategies.cases(adapt="*", tasks=[2, 3])
_BATCH_NORM = strategies.cases(norm="batch", frozen=False)
_QUADRATIC = strategies.cases(
    kind="quadratic", depth=1, activation="tanh", norm="none", tied=False, frozen=False, adapt="*"
)
_RATES = st.sampled_from([0.1, 0.3, -0.2])
_POLICIES: dict[str, SearchStrategy[Any]] = {
    "rule": strategies.rules(),
    "order": strategies.orders(),
    "step_loss": strategies.step_losses(),
    "progress": strategies.progress(),
}
_LATER = st.sampled_from([0, 1, 2.5])
_EPOCHS = st.sampled_from([[0, 1.99, 2, 2.01, 9]])

LAWS: dict[str, list[Law]] = {
    "rule": [
        Law("fits the gradients", rules.fits_the_gradients, {"case": _SMALL}),
        Law("remembers nothing", rules.remembers_nothing, {"case": _SMALL}),
        Law(
            "draws once a task",
            rules.draws_once_a_task,
            {"case": _SMALL},
            excuses.draws_nothing_or_says_so,
        ),
        Law("reads the step", rules.reads_the_step, {"case": _SMALL}, excuses.any_number_of_steps),
        Law("adapt is its loop", rules.adapt_is_its_loop, {"case": _SMALL}),
        Law("zero Hessian", rules.zero_hessian, {"case": _SMALL}),
        Law(
            "finite differences",
            rule_gradients.finite_differences,
            {"case": _ANY, "step_loss": strategies.step_losses()},
        ),
        Law(
            "plain autograd",
            rule_gradients.plain_autograd,
            {"case": _ANY, "order": strategies.orders(), "step_loss": strategies.step_losses()},
        ),
        Law(
            "one gradient",
            rule_gradients.one_gradient,
            {"case": _ANY, "order": strategies.orders(), "step_loss": strategies.step_losses()},
        ),
        Law("mean of tasks", rule_gradients.mean_of_tasks, {"case": _SEVERAL}, excuses.draws),
        Law(
            "identity at first", rule_gradients.same_as_without, {"case": _ANY}, excuses.no_identity
        ),
        Law("purity", rule_gradients.leaves_no_trace, {"case": _ANY}),
        Law(
            "Kronecker product",
            kronecker.kfo_is_a_kronecker_product,
            {"case": _SMALL},
            kind=KFO,
        ),
        Law(
            "adapts down the slope",
            kronecker.kfo_adapts_down_the_slope,
            {"case": _SMALL},
            excuses.keeps_its_transform,
            KFO,
        ),
        Law(
            "Kronecker product",
            kronecker.curvature_is_a_kronecker_product,
            {"case": _SMALL},
            kind=MetaCurvature,
        ),
    ],
    "order": [
        Law(
            "decides every step",
            orders.decides,
            {"steps": st.integers(0, 8), "progress": strategies.progress()},
        ),
        Law(
            "detaches gradients alone",
            orders.detaches_gradients,
            {"case": _ANY, "progress": strategies.progress()},
        ),
        Law(
            "one gradient",
            orders.one_gradient,
            {"case": _ANY, "rule": strategies.rules(), "progress": strategies.progress()},
        ),
        Law("truncation ends", orders.truncation_ends, {"case": _SMALL}, excuses.without("last")),
        Law(
            "annealing switches",
            orders.annealing_switches,
            {"case": _SMALL, "epoch": st.just(2), "others": _EPOCHS},
            excuses.without("first_order_epochs"),
        ),
    ],
    "step_loss": [
        Law(
            "a weighting",
            step_losses.is_a_weighting,
            {"steps": st.integers(0, 8), "progress": strategies.progress()},
        ),
        Law(
            "weighted sum",
            step_losses.is_the_weighted_sum,
            {"case": _ANY, "progress": strategies.progress()},
        ),
        Law(
            "one gradient",
            step_losses.one_gradient,
            {"case": _ANY, "rule": strategies.rules(), "progress": strategies.progress()},
        ),
        Law(
            "ends at final",
            step_losses.ends_at_final,
            {"steps": st.integers(0, 8), "later": _LATER},
            excuses.without("epochs"),
        ),
    ],
    "estimator": [
        Law(
            "equals Unrolled",
            estimators.equals_unrolled,
            {"case": _ANY, **_POLICIES, "rule": strategies.rules(draws=True)},
            excuses.not_exact,
        ),
        Law("zero Hessian", estimators.zero_hessian, {"case": _PLAIN}, excuses.not_exact),
        Law(
            "closed form",
            estimators.closed_form,
            {"case": _QUADRATIC, "rate": _RATES},
            excuses.not_exact,
        ),
        Law(
            "finite differences",
            estimators.finite_differences,
            {"case": _ANY, "step_loss": strategies.step_losses()},
            excuses.not_exact,
        ),
        Law("one executor", estimators.one_executor, {"case": _ALL_ADAPT}, excuses.draws_batches),
        Law("mean of tasks", estimators.mean_of_tasks, {"case": _ALL_ADAPT}, excuses.draws_batches),
        Law("names what is idle", estimators.names_what_is_idle, {"case": _PLAIN}),
        Law("purity", estimators.leaves_no_trace, {"case": _PLAIN}),
        Law(
            "Reptile is joint training",
            end_points.reptile_is_joint_training,
            {"case": _PLAIN},
            excuses.draws_batches,
            Reptile,
        ),
        Law(
            "Reptile is its loop",
            end_points.reptile_is_its_loop,
            {"case": _PLAIN},
            excuses.draws_batches,
            Reptile,
        ),
        Law(
            "Reptile is interpolation",
            end_points.reptile_is_interpolation,
            {"case": _PLAIN},
            excuses.draws_batches,
            Reptile,
        ),
        Law(
            "implicit quadratic",
            end_points.implicit_quadratic,
            {"case": _QUADRATIC.map(lambda case: dataclasses.replace(case, steps=400))},
            kind=Implicit,
        ),
        Law(
            "implicit → plain gradient",
            end_points.implicit_tends_to_the_plain_gradient,
            {"case": _PLAIN},
            kind=Implicit,
        ),
    ],
    "executor": [
        Law("adds up", executors.adds_up, {"tasks": st.integers(1, 5)}),
        Law("equals Loop", executors.equals_the_loop, {"case": _ANY, **_POLICIES}),
        Law("mean of tasks", executors.mean_of_tasks, {"case": _SEVERAL}),
        Law(
            "draws are independent",
            executors.draws_are_independent,
            {"case": strategies.cases(adapt="*", tasks=1), "seed": st.integers(0, 99)},
        ),
        Law("purity", executors.leaves_no_trace, {"case": _ANY}),
        Law("tasks of unequal size", executors.unequal_tasks, {"case": _SMALL}),
    ],
    "norm": [
        Law(
            "keeps the function",
            norms.keeps_the_function,
            {"case": _BATCH_NORM},
            excuses.no_conversion,
        ),
        Law("is not aliased", norms.is_not_aliased, {"case": _BATCH_NORM}),
        Law(
            "a row for each step",
            norms.has_a_row_for_each_step,
            {"case": _BATCH_NORM},
            excuses.no_rows,
        ),
        Law(
            "training ignores what is stored",
            norms.training_ignores_what_is_stored,
            {"case": _BATCH_NORM},
        ),
        Law("plain autograd", norms.plain_autograd, {"case": _BATCH_NORM}),
        Law("one gradient", norms.one_gradient, {"case": _BATCH_NORM}),
        Law("mean of tasks", norms.mean_of_tasks, {"case": _BATCH_NORM}),
        Law(
            "finite differences",
            norms.finite_differences,
            {"case": _BATCH_NORM},
            excuses.evaluates_by_statistics,
        ),
        Law("purity", norms.leaves_no_trace, {"case": _BATCH_NORM}),
    ],
}
