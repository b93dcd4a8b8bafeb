"""Where a shallow linear model cannot adapt fast, and a deep one can (Arnold, Iqbal, Sha 2021).

The recipes that show it are trained as they ship, and held to what they claim.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import metablocks as mb
from metablocks.meta_steps import accuracy
from metablocks.recipe import build, load
from metablocks.runs.train import meta_step
from metablocks.types import Progress


def trained(name, device):
    """The experiment of a shipped recipe, after its last meta-step."""
    experiment = build(load(name), device=device)
    for step in range(experiment.epochs * experiment.steps_per_epoch):
        meta_step(experiment, step, Progress(step / experiment.steps_per_epoch))
        if (step + 1) % experiment.steps_per_epoch == 0:
            experiment.scheduler.step()
    return experiment


def after_a_step(experiment, learner=None):
    """Mean of the loss over the recipe's test tasks, three standard errors of it, accuracy."""
    tasks = experiment.source.sample("test", range(experiment.evaluation.tasks))
    metric = accuracy if experiment.kind == "classification" else None
    result = (learner or experiment.learner).evaluate(tasks, metric=metric)
    losses = result.query_losses[:, -1]
    error = 3 * float(losses.std()) / math.sqrt(len(losses))
    return float(losses.mean()), error, metric and float(result.metrics[:, -1].mean())


def test_a_deep_linear_model_adapts_at_once_where_a_shallow_one_cannot(device):
    """y = θx, one step: shallow, ½(1 − α)²σ² is the best; deep, b → ±1/√α and the loss goes.

    The recipes' loss has no ½, so that it is twice the paper's, and α is twice their rate. The mean
    of x² over 1000 shots is 1 up to 4.5 %, so that deep keeps about 0.3 % of the loss. In one
    dimension either layer could become the step size of the other: the seed makes it the upper one.
    """
    shallow, deep = trained("shallow_linear", device), trained("deep_linear", device)
    rate = shallow.recipe.at("inner.rule[0].init")
    best = (1 - 2 * rate) ** 2 * shallow.source.sigma**2

    loss, error, _ = after_a_step(shallow)
    assert error < best / 6
    assert loss == pytest.approx(best, abs=error)
    for value in (-1.0, -0.3, 0.0, 0.3, 1.0):
        with torch.no_grad():
            shallow.learner.model.head.weight.fill_(value)
        loss, error, _ = after_a_step(shallow)
        assert loss > best - error

    assert after_a_step(deep)[0] < best / 100
    upper = deep.learner.model.head.appended[0].weight.detach()
    assert abs(float(upper)) == pytest.approx((2 * rate) ** -0.5, rel=0.02)
    collapsed = mb.MetaLearner(
        mb.collapse_linear(deep.learner.model),
        loss=F.mse_loss,
        steps=1,
        rule=mb.LearningRate(rate),
        executor=mb.Vmap(),
    )
    loss, error, _ = after_a_step(deep, collapsed)
    assert loss > best - error


def test_logistic_regression_adapts_fast_with_a_linear_layer_more(device):
    """One step goes α/2 of the way to θ at most: shallow stays near log 2, deep learns the step.

    c = 0 is the best start of the shallow model; its loss there, for endless support sets, is
    integrated over r = |θ| and n, with z = θ·x = r n. The 100 shots and the c that training leaves
    add less than 0.001 to it. Its accuracy is deep's, or nearly: only the step is too short.
    """
    shallow, deep = trained("shallow_logistic", device), trained("deep_logistic", device)
    rate, source = shallow.recipe.at("inner.rule[0].init"), shallow.source
    assert source.dim == 2
    r, n = source.sigma * torch.linspace(0, 8, 801)[:, None], torch.linspace(-8, 8, 801)
    z = r * n
    m = torch.softmax(-(n**2) / 2, 0) * torch.sigmoid(z) * torch.sigmoid(-z)
    logit = 2 * rate * m.sum(1, keepdim=True) * z
    each = F.binary_cross_entropy_with_logits(logit, torch.sigmoid(z), reduction="none")
    chance = torch.softmax(-(n**2) / 2, 0) * r * torch.exp(-((r / source.sigma) ** 2) / 2)
    best = float((chance * each).sum() / chance.sum())

    loss, error, right = after_a_step(shallow)
    assert error < (math.log(2) - best) / 10
    assert loss == pytest.approx(best, abs=error)
    deep_loss, _, deep_right = after_a_step(deep)
    assert deep_loss < 0.65 * loss
    assert abs(right - deep_right) < 0.02
