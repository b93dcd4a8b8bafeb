"""Meta-gradients through KFO and Meta-Curvature: plain autograd, and transforms that adapt."""

import pytest
from small_transforms import ADAPTING, RATE, TRANSFORMS, perturb, problems

import metablocks as mb
from metablocks import KFO, Chain, LearningRate, Loop, MetaCurvature, Vmap
from metablocks.laws import gradients, problem, rule_gradients


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
@pytest.mark.parametrize(
    "small",
    [
        lambda **size: problem.regression(hidden=(3,), **size),
        lambda **size: problem.classification(layers=1, filters=2, **size),
    ],
    ids=["regression", "classification"],
)
def test_finite_differences_of_every_factor_that_adapts(make, small, device):
    small = small(tasks=1, steps=2, device=device)
    learner = perturb(small.learner(Chain(make(), LearningRate(RATE))))
    gradients.finite_differences(learner, small.tasks)


ORDERS = [mb.SecondOrder(), mb.FirstOrder(), mb.TruncatedOrder(last=1)]


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
@problems
def test_a_transform_that_adapts_is_the_same_on_every_executor(make, small, place):
    small = small(**place)

    def learner(executor):
        return perturb(small.learner(Chain(make(), LearningRate(RATE)), executor=executor))

    gradients.one_gradient(small, [Vmap(), Vmap(chunk=2)], learner)


# ---- the whole meta-gradient, in plain autograd


@pytest.mark.parametrize("executor", [Loop(), Vmap()], ids=repr)
@problems
@pytest.mark.parametrize(
    "make", (TRANSFORMS | ADAPTING).values(), ids=(TRANSFORMS | ADAPTING).keys()
)
def test_meta_gradients_are_those_of_plain_autograd(make, small, executor, place):
    small = small(**place)
    rule = Chain(make(), LearningRate(RATE))
    gradients.plain_autograd(perturb(small.learner(rule, executor=executor)), small)


@pytest.mark.parametrize("order", ORDERS, ids=repr)
@problems
@pytest.mark.parametrize("make", [lambda: KFO(hidden=1), MetaCurvature], ids=["kfo", "curvature"])
def test_so_they_are_for_every_order(make, small, order, place):
    rule_gradients.plain_autograd(make, small(**place), order=order)
