"""Reptile and the implicit gradient: their laws, their closed forms, and what they refuse."""

import weakref

import pytest
import reptile_implicit_laws
import small_problems as problem
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, TaskError
from metablocks.estimators.conjugate_gradient import conjugate_gradient
from metablocks.estimators.neumann import neumann_series
from metablocks.laws import gradients
from metablocks.laws.compare import assert_close

EXECUTORS = [mb.Vmap(), mb.Vmap(chunk=2)]
executors = pytest.mark.parametrize("executor", [mb.Loop(), *EXECUTORS], ids=repr)
problems = pytest.mark.parametrize("make", [problem.regression, problem.classification])
REPTILES = {
    "all": lambda: mb.Reptile(),
    "support": lambda: mb.Reptile(examples="support"),
}
reptiles = pytest.mark.parametrize("reptile", REPTILES.values(), ids=REPTILES.keys())


# ---- Reptile


@executors
@problems
def test_reptile_in_one_step_is_joint_training(make, executor, place):
    reptile_implicit_laws.reptile_is_joint_training(mb.Reptile(), make(**place), executor=executor)


@executors
@problems
def test_reptile_under_plain_descent_is_interpolation(make, executor, place):
    reptile_implicit_laws.reptile_is_interpolation(mb.Reptile(), make(**place), executor=executor)


@reptiles
def test_reptile_is_the_same_on_every_executor(reptile, place):
    small = problem.classification(**place)

    def learner(executor):
        rule = mb.Chain(mb.Momentum(), mb.Adam(beta1=0.0, eps=1e-3), mb.LearningRate(0.01))
        return small.learner(rule, estimator=reptile(), executor=executor)

    gradients.one_gradient(small, EXECUTORS, learner)


@reptiles
def test_reptile_is_its_hand_written_loop(reptile, place):
    reptile_implicit_laws.reptile_is_its_loop(reptile(), problem.regression(tasks=2, **place))


@executors
def test_batches_are_shuffled_passes_through_the_examples(executor, placed):
    tasks, count = 4, 6
    x = (10.0 ** torch.arange(count)).expand(tasks, count)
    batch = mb.TaskBatch((x[:, :4], x[:, :4]), (x[:, 4:], x[:, 4:]))

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w * x

    def seen(steps, size):
        learner = mb.MetaLearner(
            Sum(),
            loss=lambda prediction, target: prediction.sum(),
            steps=steps,
            rule=mb.LearningRate(1.0),
            batches=mb.Minibatches(size),
            estimator=mb.Reptile(),
            executor=executor,
        )
        # Each digit says how often its example was seen.
        total = learner.meta_gradient([batch[0]]).grads["model.w"]
        return [int(digit) for digit in f"{int(total):0{count}d}"[::-1]]

    assert seen(steps=3, size=2) == [1] * count
    assert seen(steps=4, size=3) == [2] * count
    assert sorted(seen(steps=2, size=4)) == [1] * 4 + [2] * 2
    assert sorted(seen(steps=1, size=2)) == [0] * 4 + [1] * 2


def test_batches_differ_from_task_to_task_and_from_call_to_call(place):
    small = problem.regression(tasks=2, **place)
    twins = mb.TaskBatch.stack([small.tasks[0]] * 8)
    for executor in (mb.Loop(), mb.Vmap()):
        blocks = {"batches": mb.Minibatches(2), "estimator": mb.Reptile()}
        learner = small.learner(executor=executor, **blocks)
        losses = learner.meta_gradient(twins).query_losses[:, -1]
        assert len(losses.unique()) > 1
        assert torch.equal(learner.meta_gradient(twins).query_losses[:, -1], losses)
        learner.backward(twins)
        assert not torch.equal(learner.meta_gradient(twins).query_losses[:, -1], losses)


def test_all_examples_in_one_batch_are_the_examples_without(place, within):
    small = problem.regression(**place)
    whole = small.learner(estimator=mb.Reptile()).meta_gradient(small.tasks)
    blocks = {"batches": mb.Minibatches(9), "estimator": mb.Reptile()}
    batch = small.learner(**blocks).meta_gradient(small.tasks)
    assert_close("batch", batch.grads, whole.grads, within(0))


def test_support_and_query_that_cannot_be_joined_are_refused():
    x = torch.ones(2, 3, 1)
    tasks = mb.TaskBatch(((x, x), x), (x, x))

    class Two(nn.Linear):
        def forward(self, one, other=0):
            return super().forward(one) + other

    learner = mb.MetaLearner(
        Two(1, 1), loss=F.mse_loss, steps=1, rule=mb.LearningRate(0.1), estimator=mb.Reptile()
    )
    with pytest.raises(TaskError, match=r'differ in form.*use examples="support"'):
        learner.meta_gradient(tasks)


# ---- the implicit gradient


@pytest.mark.parametrize(("seed", "proximal"), [(0, 1.5), (1, 2.0), (2, 4.0)])
def test_on_quadratics_the_implicit_gradient_has_its_closed_form(seed, proximal, place):
    small, executor = problem.quadratic(seed=seed, steps=200, **place), mb.Vmap()
    reptile_implicit_laws.implicit_quadratic(
        mb.Implicit(proximal=proximal), small, executor=executor
    )


@executors
def test_both_solvers_give_the_closed_form(executor, place):
    """With λ above ‖A‖, by as many terms of the Neumann series as leave nothing in float64."""
    small = problem.quadratic(steps=100, **place)
    for solver, steps in (("cg", None), ("neumann", 80)):
        implicit = mb.Implicit(proximal=15.0, solver=solver)
        reptile_implicit_laws.implicit_quadratic(
            implicit, small, rate=0.05, solver_steps=steps, executor=executor
        )


@executors
@problems
def test_the_implicit_gradient_tends_to_the_plain_one(make, executor, place):
    small = make(**place)
    reptile_implicit_laws.implicit_tends_to_the_plain_gradient(
        mb.Implicit(), small, executor=executor
    )


@pytest.mark.parametrize(
    "implicit",
    [
        mb.Implicit(proximal=0.5, cg_steps=40),
        mb.Implicit(proximal=3.0, cg_steps=120, tolerance=1e-12, solver="neumann"),
    ],
    ids=repr,
)
def test_where_the_inner_loop_converges_it_is_the_slope_of_the_loss(implicit, device64):
    """Convex in the head; the body does not adapt, and its gradient is implicit too."""
    small = problem.regression(hidden=(3,), tasks=2, steps=60, device=device64)
    rate = mb.LearningRate(0.25 if implicit.solver == "neumann" else 0.5)
    learner = small.learner(rate, adapt="head.*", estimator=implicit, executor=mb.Vmap())
    gradients.finite_differences(learner, small.tasks)
    metrics = learner.meta_gradient(small.tasks).metrics
    assert float(metrics[f"{implicit.solver}_residual"]) < 1e-9
    assert float(metrics["inner_gradient"]) < 1e-8


@pytest.mark.parametrize("direction", [mb.Momentum(0.5), mb.Adam(eps=1e-2)], ids=repr)
def test_the_way_to_the_minimum_does_not_matter(direction, place, within):
    small = problem.quadratic(steps=400, **place)
    expected = small.learner(estimator=mb.Implicit()).meta_gradient(small.tasks).grads
    rule = mb.Chain(direction, mb.LearningRate(0.05))
    got = small.learner(rule, estimator=mb.Implicit()).meta_gradient(small.tasks)
    assert_close("another way", got.grads, expected, within(1e-8))


def test_training_and_evaluation_adapt_with_the_same_proximal_term(place):
    small = problem.regression(**place)
    implicit = small.learner(estimator=mb.Implicit(proximal=3.0))
    stated = small.learner(mb.Chain(mb.Proximal(3.0), mb.LearningRate(0.1)))
    named = small.learner(
        mb.Chain(mb.Proximal(3.0), mb.LearningRate(0.1)), estimator=mb.Implicit(proximal=3.0)
    )
    losses = stated.evaluate(small.tasks).query_losses
    for learner in (implicit, named):
        assert torch.equal(learner.evaluate(small.tasks).query_losses, losses)
        trained = learner.meta_gradient(small.tasks).query_losses
        torch.testing.assert_close(trained[:, -1], losses[:, -1])
    assert implicit.steps == named.steps
    assert [type(rule).__name__ for rule in implicit.rule.rules] == ["Proximal", "LearningRate"]


@pytest.mark.parametrize("estimator", [mb.Reptile(), mb.Implicit()], ids=repr)
def test_the_fast_weights_of_earlier_steps_are_not_kept(estimator, place):
    class Watch(mb.UpdateRule):
        def forward(self, updates, state, step):
            watched.append(weakref.ref(step.params["head.weight"]))
            return updates, state

    def loss(prediction, target):
        alive.append(sum(reference() is not None for reference in watched))
        return F.mse_loss(prediction, target)

    small = problem.regression(tasks=1, steps=6, **place)
    learner = small.learner(mb.Chain(Watch(), mb.LearningRate(0.1)), estimator=estimator, loss=loss)
    watched, alive = [], []
    learner.meta_gradient(small.tasks)  # which is checked by a run of its own
    watched.clear()
    alive.clear()
    learner.meta_gradient(small.tasks)
    assert len(watched) == small.steps
    assert max(alive) <= 3


# ---- conjugate gradients


@given(seed=st.integers(0, 10_000), size=st.integers(1, 6))
def test_conjugate_gradients_solve_within_their_dimension(seed, size):
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=draw, dtype=torch.float64)
    matrix = factor @ factor.T + torch.eye(size, dtype=torch.float64)
    target = torch.randn(size, generator=draw, dtype=torch.float64)
    got = conjugate_gradient(
        lambda x: {"x": matrix @ x["x"]}, {"x": target}, steps=size + 2, tolerance=0.0
    )
    torch.testing.assert_close(
        got.vector["x"], torch.linalg.solve(matrix, target), rtol=1e-8, atol=1e-8
    )
    assert float(got.residual) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6, 1e8])
def test_the_residual_is_that_of_the_solution_however_far_the_recursion_went_on(spread, dtype):
    """Against b − A x in float64, for 40 eigenvalues between 1 and `spread`, solved side by side.

    In float32 the recursion's own residual ends 1e5 times below. Where x comes no closer, what is left
    is as large as the rounding of A x itself, so that the two agree to a factor; elsewhere, to digits.
    """
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=draw, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, 40, dtype=torch.float64)
    matrix = ((basis * spread**exponents) @ basis.T).to(dtype)
    targets = torch.randn(2, 40, generator=draw, dtype=torch.float64).to(dtype)
    for steps in (5, 50, 150):

        def solve(target, steps=steps):
            return conjugate_gradient(
                lambda v: {"x": matrix @ v["x"]}, {"x": target}, steps=steps, tolerance=1e-10
            )

        got = torch.func.vmap(solve)(targets)
        b, x = targets.double(), got.vector["x"].double()
        due = (b - x @ matrix.double()).norm(dim=1) / b.norm(dim=1)
        rounding = torch.finfo(dtype).eps * spread * x.norm(dim=1) / b.norm(dim=1)
        stalled = due < 100 * rounding
        share = (got.residual.double() / due).log().abs()
        assert (share <= torch.where(stalled, 1.1, 0.1)).all()


def test_conjugate_gradients_stay_where_the_tolerance_is_reached():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 50.0], dtype=torch.float64))
    target = {"x": torch.ones(3, dtype=torch.float64)}
    calls = []

    def product(x):
        calls.append(x["x"])
        return {"x": matrix @ x["x"]}

    exact, loose, steps = (
        conjugate_gradient(product, target, steps=steps, tolerance=tolerance)
        for steps, tolerance in ((9, 0.0), (9, 0.5), (1, 0.0))
    )
    assert float(exact.residual) < 1e-12 < float(loose.residual) <= 0.5
    assert not torch.equal(loose.vector["x"], exact.vector["x"])
    assert len(calls) == 22  # one for each step, and one for each residual
    assert float(steps.residual) > 0


def test_conjugate_gradients_stop_at_negative_curvature_and_at_nothing():
    target = {"x": torch.tensor([1.0, 2.0])}
    got = conjugate_gradient(lambda x: {"x": -x["x"]}, target, steps=3, tolerance=0.0)
    assert torch.equal(got.vector["x"], target["x"])
    assert float(got.residual) == 2.0
    nothing = conjugate_gradient(lambda x: x, {"x": torch.zeros(2)}, steps=3, tolerance=0.0)
    assert not nothing.vector["x"].any()
    assert float(nothing.residual) == 0.0


def test_conjugate_gradients_stop_where_the_curvature_is_less_than_asked_for():
    """diag(1, 0.05): the first direction, (1, 2), has a curvature of 0.24, the second one less."""
    matrix, target = torch.diag(torch.tensor([1.0, 0.05])), {"x": torch.tensor([1.0, 2.0])}

    def solve(steps, least):
        return conjugate_gradient(
            lambda x: {"x": matrix @ x["x"]}, target, steps=steps, tolerance=0.0, least=least
        ).vector["x"]

    torch.testing.assert_close(solve(2, 0.0), torch.tensor([1.0, 40.0]))
    assert torch.equal(solve(2, 0.1), solve(1, 0.0))
    assert torch.equal(solve(2, 0.3), target["x"])


def test_tasks_under_vmap_stop_each_for_itself():
    matrices = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))])
    targets = torch.ones(2, 3)

    def solve(matrix, target):
        return conjugate_gradient(
            lambda x: {"x": matrix @ x["x"]}, {"x": target}, steps=3, tolerance=1e-6
        )

    together = torch.func.vmap(solve)(matrices, targets)
    for row in range(2):
        alone = solve(matrices[row], targets[row])
        torch.testing.assert_close(together.vector["x"][row], alone.vector["x"])


# ---- the Neumann series


@given(seed=st.integers(0, 10_000), size=st.integers(1, 6), norm=st.floats(0.05, 0.7))
def test_the_neumann_series_is_the_dense_solution_where_it_converges(seed, size, norm):
    """Of I + M, M symmetric, indefinite, of a norm below 1."""
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=draw, dtype=torch.float64)
    matrix = (factor + factor.T) * (norm / torch.linalg.matrix_norm(factor + factor.T, 2))
    system = torch.eye(size, dtype=torch.float64) + matrix
    target = torch.randn(size, generator=draw, dtype=torch.float64)

    def solve(steps):
        product = lambda x: {"x": system @ x["x"]}  # noqa: E731
        return neumann_series(product, {"x": target}, steps=steps, tolerance=0.0)

    got, due = solve(100), torch.linalg.solve(system, target)
    torch.testing.assert_close(got.vector["x"], due, rtol=1e-12, atol=1e-12)
    assert float(got.growth) <= norm * (1 + 1e-9)
    assert float(solve(3).residual) <= norm**4 * (1 + 1e-9)


def test_a_neumann_series_that_diverges_stops_and_says_so_each_task_for_itself():
    """M = diag(m, 0.1) from b = (1, 100): the terms grow from the fourth one on where m = 3."""
    matrices = torch.stack([torch.diag(torch.tensor([m, 0.1])) for m in (3.0, 0.5)]).double()
    target = torch.tensor([1.0, 100.0], dtype=torch.float64)

    def solve(matrix, steps=40):
        product = lambda x: {"x": x["x"] + matrix @ x["x"]}  # noqa: E731
        return neumann_series(product, {"x": target}, steps=steps, tolerance=1e-14)

    got = torch.func.vmap(solve)(matrices)
    assert got.growth[0] > 1 > got.growth[1]
    assert got.residual[0] > 1e-2 > 1e-12 > got.residual[1]
    kept = torch.tensor([1 - 3 + 9.0, 100 - 10 + 1.0], dtype=torch.float64)
    torch.testing.assert_close(got.vector["x"][0], kept)
    due = torch.linalg.solve(torch.eye(2).double() + matrices[1], target)
    torch.testing.assert_close(got.vector["x"][1], due)
    nothing = neumann_series(lambda x: x, {"x": torch.zeros(2)}, steps=3, tolerance=0.0)
    assert not nothing.vector["x"].any()
    assert float(nothing.residual) == 0.0


def test_a_learner_reports_that_the_series_diverges(place):
    small = problem.quadratic(steps=5, **place)
    metrics = [
        small.learner(
            mb.LearningRate(0.02),
            estimator=mb.Implicit(proximal=proximal, solver="neumann"),
            executor=mb.Vmap(),
        )
        .meta_gradient(small.tasks)
        .metrics["neumann_growth"]
        for proximal in (0.1, 30.0)
    ]
    assert metrics[0] > 1 > metrics[1]


# ---- both


def test_what_is_frozen_needs_no_gradient(place):
    small = problem.regression(**place)
    for estimator in (mb.Reptile(), mb.Implicit()):
        model = small.model()
        model.head.requires_grad_(False)
        learner = mb.MetaLearner(
            model, loss=small.loss, steps=2, rule=mb.LearningRate(0.1), estimator=estimator
        )
        grads = learner.meta_gradient(small.tasks).grads
        assert not any(name.startswith("model.head") for name in grads)


def make(estimator, rule=None, *, model=None, **blocks):
    small = problem.regression()
    blocks = {"steps": 2, "loss": small.loss, **blocks}
    rule = rule or mb.LearningRate(0.1)
    return mb.MetaLearner(model or small.model(), rule=rule, estimator=estimator, **blocks)


def per_step_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return mb.per_step_batch_norm(model, steps=2)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: mb.Minibatches(0), "Minibatches size is 0; it takes a whole number, 1 or more"),
        (
            lambda: mb.Implicit(proximal=0.0),
            "Implicit proximal is 0.0; it takes a finite number above 0",
        ),
        (lambda: mb.Implicit(cg_steps=0), "Implicit cg_steps is 0; it takes a whole number"),
        (lambda: mb.Implicit(tolerance=-1.0), "Implicit tolerance is -1.0"),
        (lambda: mb.Implicit(solver="neuman"), "solver is 'neuman'; did you mean \"neumann\"?"),
        (lambda: make(mb.Reptile(), steps=0), "Reptile goes by where the inner loop ends"),
        (lambda: make(mb.Implicit(), steps=0), "Implicit goes by where the inner loop ends"),
        (
            lambda: make(mb.Reptile(), step_loss=mb.UniformStepLoss()),
            "UniformStepLoss(initial=False) has no effect with",
        ),
        (
            lambda: make(mb.Implicit(), order=mb.TruncatedOrder(last=1)),
            "TruncatedOrder(last=1) has no effect with",
        ),
        (
            lambda: make(mb.Reptile(), adapt="head.*"),
            "model.body.linear0.weight does not; let it adapt",
        ),
        (
            lambda: make(mb.Reptile(), mb.lslr(0.1)),
            "rule.rate.body.linear0.weight does not; use a rule that learns nothing",
        ),
        (
            lambda: make(mb.Implicit(), mb.meta_sgd(0.1)),
            "Implicit has no gradient for rule.rules.1.rate.body.linear0.weight, since where",
        ),
        (
            lambda: make(
                mb.Implicit(proximal=2.0), mb.Chain(mb.Proximal(1.0), mb.LearningRate(0.1))
            ),
            "Implicit proximal is 2.0, but the rule starts with Proximal(1.0)",
        ),
        (
            lambda: make(mb.Implicit(), mb.Chain(mb.WeightDecay(0.1), mb.LearningRate(0.1))),
            "WeightDecay(0.1) adds to the inner loss",
        ),
        (
            lambda: make(mb.Implicit(), mb.Chain(mb.LearningRate(-1.0), mb.Proximal(2.0))),
            "Proximal(2.0) adds to the inner loss",
        ),
        (
            lambda: make(mb.Implicit(), model=per_step_norms(), adapt=["*", "!1.*"]),
            "a PerStepBatchNorm of the model differs from step to step; use Unrolled()",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(act, message):
    with pytest.raises(BlockError) as caught:
        act()
    assert message in str(caught.value)
