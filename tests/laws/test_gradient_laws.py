"""Meta-gradients: closed forms, means of tasks, and an independent library."""

import copy
import warnings

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from metablocks import (
    Adjoint,
    FirstOrder,
    LearningRate,
    Loop,
    MetaLearner,
    SecondOrder,
    TaskBatch,
    Unrolled,
    Vmap,
)
from metablocks.laws import gradients
from metablocks.laws.cases import Case
from metablocks.laws.compare import assert_close
from metablocks.models import Conv4


@pytest.mark.parametrize("make", [problem.regression, problem.classification])
def test_without_steps_it_is_the_supervised_gradient(make, place):
    """Law 2: without inner steps the meta-gradient is the supervised gradient on the query set."""
    small = make(**place)
    expected = {}
    for index in range(len(small.tasks)):
        inputs, target = small.tasks[index].query
        params = dict((model := small.model().train()).named_parameters())
        grads = torch.autograd.grad(small.loss(model(inputs), target), list(params.values()))
        for name, grad in zip(params, grads, strict=True):
            key = f"model.{name}"
            expected[key] = expected.get(key, 0) + grad / len(small.tasks)
    got = small.with_steps(0).learner().meta_gradient(small.tasks).grads
    assert_close("steps = 0", got, expected, 1e-12)


@pytest.mark.parametrize(
    "case",
    [
        Case(tied=True, norm="batch", steps=2, tasks=2),
        Case(frozen=True, steps=2),
        Case(kind="conv", norm="batch", adapt="head.*", steps=2),
    ],
    ids=repr,
)
def test_it_is_that_of_plain_autograd_on_tied_frozen_and_partly_adapted_nets(case, place):
    small = case.problem(**place)
    gradients.plain_autograd(small.learner(), small.tasks)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6), rate=st.floats(0, 0.3))
@pytest.mark.parametrize("executor", [Loop(), Vmap()], ids=repr)
def test_quadratics_have_the_closed_form(executor, seed, steps, rate, place):
    small = problem.quadratic(seed=seed, steps=steps, **place)
    gradients.quadratic(small, rate=rate, executor=executor)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
def test_first_order_on_quadratics_has_its_closed_form(seed, steps, place):
    small = problem.quadratic(seed=seed, steps=steps, **place)
    gradients.quadratic(small, order_two=False, order=FirstOrder())


@pytest.mark.parametrize(
    ("estimator", "executor"),
    [
        (Unrolled(), Loop()),
        (Unrolled(), Vmap(chunk=3)),
        (Adjoint(), Vmap()),
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
    assert_close("higher", got, expected, within=within(1e-10))


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
