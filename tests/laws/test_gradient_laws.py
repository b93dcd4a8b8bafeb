"""Meta-gradients: closed forms, finite differences, `higher`, and one gradient on every executor."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from metablocks import (
    KFO,
    Adam,
    Adjoint,
    AnnealedStepLoss,
    Chain,
    ClipNorm,
    FinalStepLoss,
    FirstOrder,
    LearningRate,
    Loop,
    MetaCurvature,
    MetaLearner,
    Momentum,
    MTMask,
    Progress,
    Proximal,
    SecondOrder,
    TaskBatch,
    TruncatedOrder,
    UniformStepLoss,
    Unrolled,
    Vmap,
    WeightDecay,
    lslr,
    meta_sgd,
)
from metablocks.laws import gradients, problem
from metablocks.models import Conv4

EXECUTORS = [Vmap(), Vmap(chunk=1), Vmap(chunk=2)]
RATES = [
    lambda: LearningRate(0.1),
    lambda: LearningRate(0.1, granularity="layer", learn=True),
    lambda: lslr(0.1),
    lambda: meta_sgd(0.1),
    lambda: Chain(meta_sgd(-1.0), lslr(0.1)),
]
RULES = {
    **{f"rate{number}": rate for number, rate in enumerate(RATES)},
    "kfo": lambda: Chain(KFO(), lslr(0.1)),
    "meta_curvature": lambda: Chain(MetaCurvature(), LearningRate(0.1, learn=True)),
    "mt_mask": lambda: Chain(MTMask(init=50.0), lslr(0.1)),  # all on, whatever is drawn
    "momentum": lambda: Chain(Momentum(), lslr(0.1)),
    "nesterov": lambda: Chain(Momentum(0.5, nesterov=True), lslr(0.1)),
    "adam": lambda: Chain(Adam(eps=0.1), lslr(0.1)),  # smooth on the scale of a finite difference
    "adam-beta1=0": lambda: Chain(Adam(beta1=0.0, beta2=0.5, eps=0.1), lslr(0.1)),
    "clip_norm": lambda: Chain(ClipNorm(0.3), lslr(0.1)),
    "weight_decay": lambda: Chain(WeightDecay(0.1), lslr(0.1)),
    "proximal": lambda: Chain(Proximal(2.0), lslr(0.1)),
    "all": lambda: Chain(ClipNorm(0.3), Momentum(0.5), Adam(eps=0.1), WeightDecay(0.1), lslr(0.1)),
}
STEP_LOSSES = [FinalStepLoss(), UniformStepLoss(), AnnealedStepLoss(epochs=5)]


@pytest.mark.parametrize("make", [problem.regression, problem.classification])
def test_without_steps_it_is_the_supervised_gradient(make, place):
    gradients.no_steps(make(**place))


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6), rate=st.floats(-0.3, 0.3))
@pytest.mark.parametrize("executor", [Loop(), Vmap()], ids=repr)
def test_quadratics_have_the_closed_form(executor, seed, steps, rate, place):
    small = problem.quadratic(seed=seed, steps=steps, **place)
    gradients.quadratic(small, rate=rate, executor=executor)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
def test_first_order_on_quadratics_has_its_closed_form(seed, steps, place):
    small = problem.quadratic(seed=seed, steps=steps, **place)
    gradients.quadratic(small, order_two=False, order=FirstOrder())


@pytest.mark.parametrize("make", [problem.regression, problem.classification])
@pytest.mark.parametrize("adapt", ["*", "head.*", "!head.*"])
@pytest.mark.parametrize("rule", RATES)
@pytest.mark.parametrize("step_loss", STEP_LOSSES, ids=repr)
def test_finite_differences_of_every_meta_parameter(make, adapt, rule, step_loss, device):
    small = make(tasks=2, steps=2, device=device)
    learner = small.learner(rule(), adapt=adapt, step_loss=step_loss, executor=Vmap())
    gradients.finite_differences(learner, small.tasks, progress=Progress(2))


@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize("make", [problem.regression, problem.classification])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_finite_differences_through_every_rule(make, rule, device):
    small = make(tasks=2, steps=3, device=device)
    learner = small.learner(rule(), step_loss=UniformStepLoss(), executor=Vmap())
    gradients.finite_differences(learner, small.tasks)


@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize("make", [problem.regression, problem.classification])
@pytest.mark.parametrize(
    ("rule", "order", "step_loss"),
    [
        pytest.param(rule, order, step_loss, id=f"{name}-{order}-{step_loss}")
        for (name, rule), (order, step_loss) in itertools.product(
            RULES.items(),
            zip([SecondOrder(), FirstOrder(), TruncatedOrder(last=1)], STEP_LOSSES, strict=True),
        )
    ],
)
def test_every_executor_gives_the_loops_gradient(make, rule, order, step_loss, place):
    small = make(steps=2, **place)

    def learner(executor):
        return small.learner(rule(), order=order, step_loss=step_loss, executor=executor)

    gradients.one_gradient(small, EXECUTORS, learner)


@pytest.mark.parametrize("executor", [Loop(), Vmap(chunk=2)], ids=repr)
def test_a_batch_is_the_mean_of_its_tasks_in_any_order(executor, place):
    gradients.mean_of_tasks(problem.classification(**place), [2, 0, 1], executor=executor)


@pytest.mark.parametrize(
    ("estimator", "executor"),
    [
        (Unrolled(), Loop()),
        (Unrolled(), Vmap()),
        (Unrolled(), Vmap(chunk=3)),
        (Adjoint(), Loop()),
        (Adjoint(), Vmap(chunk=2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("order", [SecondOrder(), FirstOrder()], ids=repr)
def test_conv_net_with_batch_norm_and_five_steps_agrees_with_higher(
    estimator, executor, order, place, device, within
):
    model = Conv4(input_shape=(1, 28, 28), outputs=5, filters=8).to(**place)
    target = torch.arange(5, device=device)
    images = torch.rand(4, 20, 1, 28, 28, **place)
    tasks = TaskBatch(
        support=(images[:, :5], target.expand(4, 5)),
        query=(images[:, 5:], target.repeat(3).expand(4, 15)),
    )
    learner = MetaLearner(
        model,
        loss=F.cross_entropy,
        steps=5,
        rule=LearningRate(0.1),
        order=order,
        estimator=estimator,
        executor=executor,
    )
    got = learner.meta_gradient(tasks).grads
    expected = _higher(model, tasks, steps=5, rate=0.1, second=order == SecondOrder())
    problem.hold("higher", got, expected, within=within(1e-10))


def _higher(model, tasks, *, steps, rate, second):
    """The same meta-gradient by an independent library, on a copy, since it writes to its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher

    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for task in (tasks[index] for index in range(len(tasks))):
        with higher.innerloop_ctx(
            model, optimizer, copy_initial_weights=False, track_higher_grads=second
        ) as (fast, inner):
            for _ in range(steps):
                inner.step(F.cross_entropy(fast(task.support[0]), task.support[1]))
            (F.cross_entropy(fast(task.query[0]), task.query[1]) / len(tasks)).backward()
            if not second:  # then `higher` leaves the gradient at the fast weights
                for p, q in zip(model.parameters(), fast.parameters(), strict=True):
                    if q.grad is None:
                        continue
                    p.grad = q.grad if p.grad is None else p.grad + q.grad
    return {f"model.{name}": p.grad for name, p in model.named_parameters()}
