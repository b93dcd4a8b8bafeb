"""Meta-gradients through KFO and Meta-Curvature: plain autograd, and transforms that adapt."""

import pytest
import small_problems as problem
from small_transforms import ADAPTING, RATE, TRANSFORMS

import metablocks as mb
from metablocks import KFO, Chain, LearningRate, MetaCurvature, Vmap
from metablocks.laws import gradients, rules
from metablocks.laws.compare import perturb


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
def test_finite_differences_of_every_factor_that_adapts(make, device):
    small = problem.regression(hidden=(3,), tasks=1, steps=2, device=device)
    learner = perturb(small.learner(Chain(make(), LearningRate(RATE))), "factors.")
    gradients.finite_differences(learner, small.tasks)


@pytest.mark.parametrize("make", ADAPTING.values(), ids=ADAPTING.keys())
def test_a_transform_that_adapts_is_the_same_on_every_executor(make, place):
    small = problem.classification(tasks=2, **place)

    def learner(executor):
        rule = Chain(make(), LearningRate(RATE))
        return perturb(small.learner(rule, executor=executor), "factors.")

    gradients.one_gradient(small, [Vmap(chunk=1)], learner)


# ---- the whole meta-gradient, in plain autograd


@pytest.mark.parametrize(
    "make", (TRANSFORMS | ADAPTING).values(), ids=(TRANSFORMS | ADAPTING).keys()
)
def test_meta_gradients_are_those_of_plain_autograd(make, place):
    small = problem.classification(**place)
    learner = small.learner(Chain(make(), LearningRate(RATE)), executor=Vmap())
    gradients.plain_autograd(perturb(learner, "factors."), small.tasks)


@pytest.mark.parametrize("order", [mb.FirstOrder(), mb.TruncatedOrder(last=1)], ids=repr)
@pytest.mark.parametrize("make", [lambda: KFO(hidden=1), MetaCurvature], ids=["kfo", "curvature"])
def test_so_they_are_for_every_order(make, order, place):
    small = problem.regression(**place)
    learner = rules.learner_of(make, small, order=order)
    gradients.plain_autograd(learner, small.tasks)
