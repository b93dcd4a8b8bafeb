"""What a learner refuses, and how it says so."""

import pytest
import torch
from small_learners import learner_of, small, tasks_of
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


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def _negative(steps, progress):
    return torch.tensor([0.0, 2.0, -1.0])


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: learner_of(small(), steps=-1), BlockError, "steps is -1"),
        (lambda: learner_of(small(), steps=2.0), BlockError, "steps is 2.0"),
        (lambda: learner_of(small(), adapt="haed"), SelectionError, '"haed" matches no'),
        (lambda: learner_of(small(), rule=0.1), BlockError, "rule is 0.1; it takes a UpdateRule"),
        (
            lambda: learner_of(small(), order=mb.FirstOrder),
            BlockError,
            "order is the class FirstOrder; it takes a Order; did you mean FirstOrder(…)?",
        ),
        (
            lambda: learner_of(small(), order=mb.TruncatedOrder(last=3)),
            BlockError,
            "TruncatedOrder last is 3, but the learner takes 2 inner steps",
        ),
        (
            lambda: learner_of(small(), loss=nn.PReLU()),
            BlockError,
            "the loss PReLU has trainable parameters",
        ),
        (
            lambda: learner_of(Unused()).meta_gradient(tasks_of(3)),
            GradientError,
            "does not depend on model.spare.weight, model.spare.bias",
        ),
        (
            lambda: learner_of(small(), steps=0, rule=mb.lslr(0.1)).meta_gradient(tasks_of(3)),
            GradientError,
            "does not depend on rule.rate.0.weight",
        ),
        (
            lambda: learner_of(small(), step_loss=_negative).meta_gradient(tasks_of(3)),
            BlockError,
            "they must be ≥ 0 and sum to 1",
        ),
        (
            lambda: learner_of(small(), loss=lambda p, t: (p - t) ** 2).meta_gradient(tasks_of(3)),
            GradientError,
            "shape [5, 2]; it must return a scalar",
        ),
        (lambda: learner_of(small()).meta_gradient([]), TaskError, "an empty list of tasks"),
        (lambda: learner_of(small()).evaluate(torch.ones(3)), TaskError, "tasks is a Tensor"),
        (lambda: learner_of(small()).evaluate([1]), TaskError, "tasks[0] is a int"),
        (
            lambda: learner_of(Branching(3, 2), executor=mb.Vmap()).meta_gradient(tasks_of(3)),
            ExecutorError,
            "Vmap cannot run this model or loss",
        ),
        (lambda: mb.Vmap(chunk=0), BlockError, "Vmap chunk is 0"),
        (
            lambda: mb.TaskBatch((torch.ones(2, 3), torch.ones(2)), (torch.ones(3), torch.ones(2))),
            TaskError,
            "one number of tasks",
        ),
        (lambda: mb.TaskBatch(torch.ones(2, 3), None), TaskError, "support is a Tensor"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(build, kind, message):
    with pytest.raises(kind) as caught:
        build()
    assert isinstance(caught.value, MetablocksError)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "field", "message"),
    [
        (mb.Adam(), "rule", "Adam does not negate it, and updates are added"),
        (mb.Momentum(), "rule", "put a learning rate behind it, Chain(Momentum(…), LearningRate(0"),
        (mb.Chain(mb.KFO(), mb.ClipNorm(1.0)), "rule", "KFO, ClipNorm does not negate it"),
        (mb.Chain(mb.lslr(0.1), mb.meta_sgd(1.0)), "rule", "LearningRate and LearningRate each"),
        (mb.LearningRate(-0.1), "rule.init", "LearningRate init is -0.1: a negative rate goes up"),
        (mb.Chain(mb.KFO(), mb.Chain(mb.lslr(-1.0))), "rule.rules.1.rules.0.init", "init is -1:"),
    ],
)
def test_a_rule_that_is_known_to_go_up_is_refused(rule, field, message):
    with pytest.raises(BlockError) as caught:
        learner_of(small(), rule=rule)
    assert (caught.value.block, caught.value.field) == ("MetaLearner", field)
    assert message in str(caught.value)


class Halves(mb.UpdateRule):
    def forward(self, updates, state, step):
        return {name: u / 2 for name, u in updates.items()}, state


def test_a_rule_of_ones_own_that_says_nothing_is_let_through():
    for rule in (Halves(), mb.Chain(mb.ClipNorm(1.0), Halves())):
        assert rule.negates is None
        learner_of(small(), rule=rule).meta_gradient(tasks_of(3))


def test_batch_norm_in_mixed_precision_under_vmap_names_the_loop():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))
    tasks = tasks_of(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ExecutorError, match=r"expected scalar type .*Use executor=Loop"):
            learner_of(model, executor=mb.Vmap()).meta_gradient(tasks)
        assert learner_of(model, executor=mb.Loop()).meta_gradient(tasks).loss.isfinite()
