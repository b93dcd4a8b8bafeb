"""Blocks that do not go together, and names that lead nowhere, are refused by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import check_refusal, each_of, half, learner_of, meta, tasks
from torch import nn

import metablocks as mb
from metablocks.errors import (
    BlockError,
    ExecutorError,
    GradientError,
    MetablocksError,
    SelectionError,
    TaskError,
)


class Bias(nn.Module):
    """A loss with a parameter, which it may leave unused."""

    def __init__(self, by=1):
        super().__init__()
        self.by = by
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, prediction, target):
        bias = self.bias if self.by else 0.0
        return F.mse_loss(prediction + bias, target)


class Frame(nn.Module):
    """A loss that holds a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prediction, target):
        return F.mse_loss(prediction, target) + self.model.weight.square().sum()


def _loss_that_holds_its_model():
    model = nn.Linear(2, 1)
    return learner_of(model, loss=Frame(model))


def _writing(prediction, target, *, params):
    params["weight"].clamp_(max=0.0)
    return F.mse_loss(prediction, target)


class Unused(nn.Linear):
    """A model with a part that its forward pass leaves out."""

    def __init__(self):
        super().__init__(2, 1)
        self.spare = nn.Linear(3, 2)


class Branching(nn.Linear):
    """A model that looks at its data, which vmap refuses."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


COMBINATIONS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    "a rule that does not negate": (
        lambda: learner_of(rule=mb.Adam()),
        BlockError,
        "rule",
        "Adam does not negate it, and updates are added",
    ),
    "another": (
        lambda: learner_of(rule=mb.Momentum()),
        BlockError,
        "rule",
        "put a learning rate behind it, Chain(Momentum(…), LearningRate(0",
    ),
    "a chain that does not": (
        lambda: learner_of(rule=mb.Chain(mb.KFO(), mb.ClipNorm(1.0))),
        BlockError,
        "rule",
        "KFO, ClipNorm does not negate it",
    ),
    "a chain that negates twice": (
        lambda: learner_of(rule=mb.Chain(mb.lslr(0.1), mb.meta_sgd(1.0))),
        BlockError,
        "rule",
        "LearningRate and LearningRate each",
    ),
    "a negative rate": (
        lambda: learner_of(rule=mb.LearningRate(-0.1)),
        BlockError,
        "rule.init",
        "LearningRate init is -0.1: a negative rate goes up",
    ),
    "a negative rate inside": (
        lambda: learner_of(rule=mb.Chain(mb.KFO(), mb.Chain(mb.lslr(-1.0)))),
        BlockError,
        "rule.rules.1.rules.0.init",
        "init is -1:",
    ),
    "pattern": (lambda: learner_of(adapt="haed"), SelectionError, "adapt", '"haed" matches no'),
    "no pattern": (lambda: learner_of(adapt=[]), SelectionError, "adapt", "no pattern given"),
    "class for a rule": (
        lambda: learner_of(rule=mb.LearningRate),
        BlockError,
        "rule",
        "it takes a UpdateRule; did you mean LearningRate(…)?",
    ),
    "class for a loss": (
        lambda: learner_of(loss=nn.MSELoss),
        BlockError,
        "loss",
        "did you mean MSELoss(…)?",
    ),
    "a loss of one argument": (
        lambda: learner_of(loss=nn.PReLU()),
        BlockError,
        "loss",
        "loss PReLU takes input alone in the first places; a loss takes two, (prediction, target)",
    ),
    "a loss that needs more": (
        lambda: learner_of(support_loss=lambda p, y, *, parms: p.mean()),
        BlockError,
        "support_loss",
        "support_loss <lambda> requires parms, for which a learner has no value in that place; did you "
        'mean "params"?',
    ),
    "a name in the third place": (
        lambda: learner_of(loss=lambda p, y, params: p.mean()),
        BlockError,
        "loss",
        "loss <lambda> requires params, for which a learner has no value in that place; make it "
        "keyword-only, (prediction, target, *, params)",
    ),
    "a loss that holds the model": (
        lambda: _loss_that_holds_its_model(),
        BlockError,
        "loss",
        "loss Frame holds model.weight as its model.weight",
    ),
    "a support loss learned in first order": (
        lambda: learner_of(support_loss=Bias(), order=mb.FirstOrder()),
        BlockError,
        "order",
        "support_loss.bias is learned through the inner steps, and FirstOrder() takes the gradient",
    ),
    "a support loss learned in no step": (
        lambda: learner_of(support_loss=Bias(), steps=0),
        BlockError,
        "steps",
        "support_loss.bias is learned through the inner steps; give it steps: 1 or more, not 0",
    ),
    "in first order at first": (
        lambda: learner_of(support_loss=Bias(), order=mb.AnnealedOrder(first_order_epochs=2)),
        BlockError,
        "order",
        "for a constant in epoch 0",
    ),
    "through no last step": (
        lambda: learner_of(support_loss=Bias(), order=mb.TruncatedOrder(last=0)),
        BlockError,
        "order",
        "TruncatedOrder(last=0) takes the gradient",
    ),
    "a loss learned by Reptile": (
        lambda: learner_of(support_loss=Bias(), estimator=mb.Reptile()),
        BlockError,
        "support_loss.bias",
        "Reptile has a gradient for what adapts inside a task alone, and support_loss.bias does not",
    ),
    "a stepwise loss with Implicit": (
        lambda: learner_of(loss=lambda p, y, *, step: p.mean(), estimator=mb.Implicit()),
        BlockError,
        "loss",
        "Implicit needs one inner loss for all steps, and loss <lambda> asks for the step",
    ),
    "statistics of no pass": (
        lambda: learner_of(support_loss=lambda *, params: 0, norm_statistics="support"),
        BlockError,
        "norm_statistics",
        "support_loss <lambda> takes none",
    ),
    "a metric of no prediction": (
        lambda: learner_of(loss=lambda *, params: 0).evaluate(tasks(), metric=F.mse_loss),
        BlockError,
        "metric",
        "metric is mse_loss, but the loss <lambda> takes no prediction",
    ),
    "a loss that no task reaches": (
        lambda: learner_of(loss=Bias(by=0)).meta_gradient(tasks()),
        GradientError,
        "loss.bias",
        "does not depend on loss.bias in any task",
    ),
    "a weight below 0": (
        lambda: learner_of().meta_gradient(mb.TaskBatch(half(3), half(3), [1, -2.5, 1])),
        TaskError,
        "weight",
        "a weight of tasks is -2.5; weights are 0 or more and finite",
    ),
    "no weight above 0": (
        lambda: learner_of().meta_gradient([mb.Task(half(), half(), weight=0)]),
        TaskError,
        "weight",
        "all weights of tasks are 0; ",
    ),
    "a weight that is learned": (
        lambda: learner_of().meta_gradient(
            mb.TaskBatch(half(3), half(3), torch.ones(3, requires_grad=True))
        ),
        TaskError,
        "tasks",
        "the weight of a task requires a gradient",
    ),
    "weights of other tasks": (
        lambda: mb.TaskBatch(half(3), half(3), weight=[1, 2]),
        TaskError,
        "weight",
        "TaskBatch weight is a Tensor [2] of torch.float32; it takes one number for each of 3 tasks",
    ),
    "a weight that is no number": (
        lambda: mb.Task(half(), half(), weight="much"),
        TaskError,
        "weight",
        "Task weight is 'much'; it takes a Tensor or a finite number",
    ),
    "a loss that writes parameters": (
        lambda: learner_of(loss=_writing).evaluate(tasks()),
        BlockError,
        "loss",
        "loss _writing writes in place into weight, which is the model's own",
    ),
    "a part that is not used": (
        lambda: meta(model=Unused()),
        GradientError,
        "model.spare.weight",
        "does not depend on model.spare.weight, model.spare.bias",
    ),
    "rates of no step": (
        lambda: meta(steps=0, rule=mb.lslr(0.1)),
        GradientError,
        "rule.rate.weight",
        "does not depend on rule.rate.weight",
    ),
    "a model that branches": (
        lambda: meta(model=Branching(2, 1), executor=mb.Vmap()),
        ExecutorError,
        "executor",
        "Vmap cannot run this model or loss",
    ),
    "more last steps than steps": (
        lambda: learner_of(order=mb.TruncatedOrder(last=3)),
        BlockError,
        "order.last",
        "TruncatedOrder last is 3, but the learner takes 1 inner steps",
    ),
}


@each_of(COMBINATIONS)
def test_a_bad_combination_is_refused_by_name(call, kind, field, message):
    check_refusal(call, kind, field, message)


def test_batch_norm_in_mixed_precision_under_vmap_names_the_loop():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))
    batch = torch.randn(3, 5, 3, 2), torch.randn(3, 5, 2)
    tasks = mb.TaskBatch(batch, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ExecutorError, match=r"expected scalar type .*Use executor=Loop"):
            learner_of(model, executor=mb.Vmap()).meta_gradient(tasks)
        assert learner_of(model, executor=mb.Loop()).meta_gradient(tasks).loss.isfinite()


class Halves(mb.UpdateRule):
    def forward(self, updates, state, step):
        return {name: u / 2 for name, u in updates.items()}, state


@pytest.mark.parametrize("rule", [Halves(), mb.Chain(mb.ClipNorm(1.0), Halves())])
def test_a_rule_of_ones_own_that_does_not_say_whether_it_negates_is_let_through(rule):
    assert rule.negates is None
    learner_of(rule=rule).meta_gradient(tasks())
