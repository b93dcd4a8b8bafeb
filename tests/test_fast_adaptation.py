"""Where a shallow linear model cannot adapt fast, and a deep one can (Arnold, Iqbal, Sha 2021)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.tasks import Linear

pytestmark = pytest.mark.usefixtures("float64")

RATE, SIGMA = 0.2, 1.5


def half_square(prediction, target):
    return F.mse_loss(prediction, target) / 2


def one_dimensional(model):
    return mb.MetaLearner(
        model, loss=half_square, steps=1, rule=mb.LearningRate(RATE), executor=mb.Vmap()
    )


def train(learner, tasks, steps):
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.03)
    for _ in range(steps):
        learner.backward(tasks)
        optimizer.step()
        optimizer.zero_grad()


def test_a_deep_linear_model_adapts_at_once_where_a_shallow_one_cannot():
    """y = θx, one step: shallow, ½(1 − α)²σ² is the best; deep, b → ±1/√α and the loss goes.

    Arnold, Iqbal, Sha 2021. The mean of x² over 2000 shots is 1 up to 3 %. The meta-loss over 1000
    tasks has a standard error of 4.8 %, from θ² and from x² over 20 queries: three are allowed. In
    one dimension either layer could become the step size of the other: the identity, b = 1 > |a| at
    the start, makes it the upper one.
    """
    source = Linear(shots=2000, queries=20, sigma=SIGMA)
    tasks = source.sample("train", range(32)).to(torch.float64)
    others = source.sample("test", range(1000)).to(torch.float64)
    best = (1 - RATE) ** 2 * SIGMA**2 / 2

    def meta_loss(learner):
        return float(learner.evaluate(others).query_losses[:, -1].mean())

    shallow = one_dimensional(nn.Linear(1, 1, bias=False))
    train(shallow, tasks, steps=80)
    assert meta_loss(shallow) == pytest.approx(best, rel=0.15)
    for value in (-1.0, -0.3, 0.0, 0.3, 1.0):
        with torch.no_grad():
            shallow.model.weight.fill_(value)
        assert meta_loss(shallow) > 0.85 * best

    model = mb.append_linear(nn.Linear(1, 1, bias=False), depth=1)
    deep = one_dimensional(model)
    train(deep, tasks, steps=250)
    assert meta_loss(deep) < best / 100
    upper = deep.model.appended[0].weight.detach()
    assert abs(float(upper)) == pytest.approx(RATE**-0.5, rel=0.02)
    flat = one_dimensional(mb.collapse_linear(deep.model))
    assert meta_loss(flat) > 0.8 * best
