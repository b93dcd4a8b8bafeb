"""The laws of each protocol: the function, what it is run on, and the reasons to skip it.

A law is called as `check(block, problem, **drawn)`, without the problem if no case is drawn; of a
rule `block` is the function that makes it, since a learner sets up its own. Laws of learners are run
on the learner that a protocol makes of a block, `learner_of(block, problem, **blocks)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from metablocks.batches import Stream
from metablocks.laws import (
    estimators,
    executors,
    gradients,
    norms,
    orders,
    purity,
    rules,
    sources,
    step_losses,
    strategies,
)
from metablocks.laws.cases import Case, Problem
from metablocks.learner import MetaLearner
from metablocks.per_step import step_aware_modules
from metablocks.rules import LearningRate
from metablocks.step_loss import UniformStepLoss
from metablocks.types import TaskBatch, map_tensors

LearnerOf: TypeAlias = Callable[..., MetaLearner]


@dataclass(frozen=True)
class Law:
    """One law of a protocol."""

    name: str
    check: Callable[..., None]
    drawn: dict[str, SearchStrategy[Any]]
    """The arguments it is run on; `case` becomes the problem."""
    skip: Callable[[Any], str | None] | None = None
    """The reason why it does not apply to a block; None if it does."""

    @property
    def statement(self) -> str:
        """The law in a sentence: the first paragraph of its docstring."""
        return " ".join((self.check.__doc__ or "").split("\n\n")[0].split())


# ---- laws of learners, as laws of the blocks in them


def in_learner(law: Callable[..., None], learner_of: LearnerOf) -> Callable[..., None]:
    """A law of a learner and tasks as a law of a block and a problem."""

    @wraps(law)
    def check(block: Any, problem: Problem, *, progress: Any = None, **blocks: Any) -> None:
        law(learner_of(block, problem, **blocks), problem.tasks, progress=progress)

    return check


def in_learners(
    law: Callable[..., None], learner_of: LearnerOf, **stated: Any
) -> Callable[..., None]:
    """A law of a problem and whatever makes learners of it as a law of a block and a problem."""

    @wraps(law)
    def check(block: Any, problem: Problem, **drawn: Any) -> None:
        law(problem, partial(learner_of, block), **stated, **drawn)

    return check


def _learner_with(axis: str, **defaults: Any) -> LearnerOf:
    """Learners of a problem that have the block on this axis."""

    def learner_of(block: Any, problem: Problem, **blocks: Any) -> MetaLearner:
        return problem.learner(**{**defaults, axis: block, **blocks})

    return learner_of


_with_order = _learner_with("order", rule=lambda: LearningRate(0.1, learn=True))
_with_step_loss, _with_estimator = _learner_with("step_loss"), _learner_with("estimator")
_with_executor = _learner_with("executor")
_with_start, _with_batches = _learner_with("start"), _learner_with("batches")


def _on_rows(law: Callable[..., None]) -> Callable[..., None]:
    """The law on tasks that a `Stream` takes: row k of a task is the batch of the k-th task after it."""

    @wraps(law)
    def check(block: Any, problem: Problem, **blocks: Any) -> None:
        if isinstance(block, Stream):
            tasks, count = problem.tasks, problem.steps + 1

            def rows(leaf: Tensor) -> Tensor:
                return torch.stack([leaf.roll(-k, 0) for k in range(count)], 1)

            support, query = map_tensors(rows, (tasks.support, tasks.query))
            problem = replace(problem, tasks=TaskBatch(support, query))
        law(block, problem, **blocks)

    return check


_with_learned_rate = _learner_with("estimator", rule=lambda: LearningRate(0.1, learn=True))


def _with_norm(norm: Any, problem: Problem, **blocks: Any) -> MetaLearner:
    return norms.learner_of(norm, problem, **{"step_loss": UniformStepLoss(), **blocks})


# ---- reasons to skip a law


def _draws(make: Any) -> str | None:
    return "it draws random numbers" if any(rules.draws(make, Case().problem())) else None


def _draws_nothing_or_says_so(make: Any) -> str | None:
    if make().draws_each_step:
        return "it declares draws_each_step"
    return None if _draws(make) else "it draws no random numbers"


def _any_number_of_steps(make: Any) -> str | None:
    rule = make().setup(Case().problem().adapted_parameters(), 2)
    return None if rule.max_steps else "it is made for any number of steps (max_steps is None)"


def _no_identity(make: Any) -> str | None:
    identity = rules.is_the_identity(make, Case().problem())
    return None if identity else "it does not start as the identity"


def _not_exact(estimator: Any) -> str | None:
    return None if getattr(estimator, "exact", True) else "it declares exact = False"


def _draws_states(batches: Any) -> str | None:
    return "it draws a state for each task, by its number" if batches.draws else None


def _other_at_evaluation(batches: Any) -> str | None:
    return "it may take other batches at evaluation" if batches.draws else None


def _no_conversion(norm: Any) -> str | None:
    return "it is a module, and not a conversion" if hasattr(norm, "module") else None


def _no_rows(norm: Any) -> str | None:
    new = norm(Case(norm="batch", width=3).problem().model(), 5)
    if not step_aware_modules(new):
        return "no module of it asks for the inner step (inner_step)"
    rows = [p for p in new.parameters() if p.ndim == 2 and len(p) == 5]
    return None if rows else "its parameters have no row for each step"


def _evaluates_by_statistics(norm: Any) -> str | None:
    modules = step_aware_modules(norm(Case(norm="batch").problem().model(), 1)).values()
    if any(module.keeps_statistics for module in modules):
        return "it evaluates by other statistics than it trains by (keeps_statistics)"
    return None


# ---- the table

_ANY = {"case": strategies.cases()}
# Deep convolutions give tiny images nearly the same features, and the loss of prototypes no slope.
_FLAT = {"case": strategies.cases(depth=1, tied=False)}
_ONE_TASK = {"case": strategies.cases(tasks=1)}
_SEVERAL = {"case": strategies.cases(tasks=[2, 3])}
_ALL_ADAPT = {"case": strategies.cases(adapt="*")}
_ALL_ADAPT_SEVERAL = {"case": strategies.cases(adapt="*", tasks=[2, 3])}
_BATCH_NORM_SEVERAL = {"case": strategies.cases(norm="batch", adapt="*", tasks=[2, 3])}
_BATCH_NORM = {"case": strategies.cases(norm="batch", frozen=False)}
_QUADRATIC = {
    "case": strategies.cases(
        kind="quadratic",
        depth=1,
        activation="tanh",
        norm="none",
        tied=False,
        frozen=False,
        adapt="*",
    )
}
_RULE = {"rule": strategies.rules()}
_ORDER = {"order": strategies.orders()}
_STEP_LOSS = {"step_loss": strategies.step_losses()}
_PROGRESS = {"progress": strategies.progress()}
_STEPS = {"steps": st.integers(0, 8)}
_RATES = {"rate": st.sampled_from([0.1, 0.2, 0.3])}
_TASKS = {"tasks": st.integers(1, 8)}
_INDICES = {"indices": st.lists(st.integers(0, 999), min_size=2, max_size=4)}
_SEED = {"seed": st.integers(0, 99)}
_POLICIES = _RULE | _ORDER | _STEP_LOSS | _PROGRESS
_DRAWS = _POLICIES | {"rule": strategies.rules(draws=True)}

_pure = partial(in_learners, purity.calls_leave_no_trace)
_zero_hessian = partial(in_learners, gradients.zero_hessian)
_alike = partial(in_learners, gradients.alike)
_slope = partial(in_learner, gradients.finite_differences)
_plain = partial(in_learner, gradients.plain_autograd)
_mean = partial(in_learner, gradients.mean_of_tasks)

LAWS: dict[str, list[Law]] = {
    "start": [
        Law("plain autograd", _plain(_with_start), _FLAT | _POLICIES),
        Law("finite differences", _slope(_with_start), _FLAT | _RULE | _STEP_LOSS),
        Law("one gradient", _alike(_with_start), _FLAT | _POLICIES),
        Law("mean of tasks", _mean(_with_start), _SEVERAL),
        Law("purity", _pure(_with_start), _ANY),
    ],
    "batches": [
        Law("plain autograd", _on_rows(_plain(_with_batches)), _ANY | _POLICIES),
        Law(
            "finite differences",
            _on_rows(_slope(_with_batches)),
            _ANY | _RULE | _STEP_LOSS,
            _other_at_evaluation,
        ),
        Law("one gradient", _on_rows(_alike(_with_batches)), _ANY | _POLICIES),
        Law("mean of tasks", _on_rows(_mean(_with_batches)), _SEVERAL, _draws_states),
    ],
    "rule": [
        Law("fits the gradients", rules.fits_the_gradients, _ONE_TASK),
        Law("remembers nothing", rules.remembers_nothing, _ONE_TASK),
        Law("draws once a task", rules.draws_once_a_task, _ONE_TASK, _draws_nothing_or_says_so),
        Law("reads the step", rules.reads_the_step, _ONE_TASK, _any_number_of_steps),
        Law("goes down", rules.goes_down, _ONE_TASK),
        Law("zero Hessian", _zero_hessian(rules.learner_of), _ONE_TASK),
        Law("finite differences", _slope(rules.learner_of), _ANY | _STEP_LOSS),
        Law("plain autograd", _plain(rules.learner_of), _ANY | _ORDER | _STEP_LOSS),
        Law("one gradient", rules.one_gradient, _ANY | _ORDER | _STEP_LOSS),
        Law("mean of tasks", _mean(rules.learner_of), _SEVERAL, _draws),
        Law("identity at first", rules.same_as_without, _ANY, _no_identity),
        Law("purity", _pure(rules.learner_of), _ANY),
    ],
    "order": [
        Law("decides every step", orders.decides, _STEPS | _PROGRESS),
        Law("plain autograd", _plain(_with_order), _ANY | _PROGRESS),
        Law("one gradient", _alike(_with_order), _ANY | _RULE | _PROGRESS),
    ],
    "step_loss": [
        Law("a weighting", step_losses.is_a_weighting, _STEPS | _PROGRESS),
        Law("weighted sum", step_losses.is_the_weighted_sum, _ANY | _PROGRESS),
        Law("one gradient", _alike(_with_step_loss), _ANY | _RULE | _PROGRESS),
    ],
    "estimator": [
        Law("equals Unrolled", estimators.equals_unrolled, _ANY | _DRAWS, _not_exact),
        Law("zero Hessian", _zero_hessian(_with_learned_rate), _ALL_ADAPT, _not_exact),
        Law("closed form", estimators.closed_form, _QUADRATIC | _RATES, _not_exact),
        Law("finite differences", _slope(_with_estimator), _ANY | _RULE | _STEP_LOSS, _not_exact),
        Law("one gradient", _alike(_with_estimator, estimators=()), _ALL_ADAPT_SEVERAL),
        Law("mean of tasks", _mean(_with_estimator), _ALL_ADAPT_SEVERAL),
        Law("names what is idle", estimators.names_what_is_idle, _ALL_ADAPT),
        Law("purity", _pure(_with_estimator), _ALL_ADAPT),
    ],
    "executor": [
        Law("adds up", executors.adds_up, _TASKS),
        Law("equals Loop", executors.equals_the_loop, _ANY | _POLICIES),
        Law("equals Loop, batch norm", executors.equals_the_loop, _BATCH_NORM_SEVERAL),
        Law("mean of tasks", _mean(_with_executor), _SEVERAL),
        Law(
            "draws are independent",
            executors.draws_are_independent,
            {"case": strategies.cases(adapt="*", tasks=1)} | _SEED,
        ),
        Law("purity", _pure(_with_executor), _ANY),
        Law("tasks of unequal size", executors.unequal_tasks, _ONE_TASK),
    ],
    "norm": [
        Law("keeps the function", norms.keeps_the_function, _BATCH_NORM, _no_conversion),
        Law("is not aliased", norms.is_not_aliased, _BATCH_NORM),
        Law("a row for each step", norms.has_a_row_for_each_step, _BATCH_NORM, _no_rows),
        Law("ignores what is stored", norms.training_ignores_what_is_stored, _BATCH_NORM),
        Law("plain autograd", _plain(_with_norm), _BATCH_NORM),
        Law("one gradient", _alike(_with_norm), _BATCH_NORM),
        Law("mean of tasks", _mean(_with_norm), _BATCH_NORM),
        Law("finite differences", _slope(_with_norm), _BATCH_NORM, _evaluates_by_statistics),
        Law("purity", _pure(_with_norm), _BATCH_NORM),
    ],
    "tasks": [
        Law("fits its description", sources.fits_its_description, _TASKS),
        Law("chunking", sources.is_a_function_of_the_index, _INDICES),
        Law("purity", sources.samples_purely, _TASKS | _SEED),
        Law("splits apart", sources.splits_are_apart, _TASKS),
    ],
}
