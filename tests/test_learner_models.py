"""The learner on models of every kind: pytrees, frozen and tied parameters, buffers, steps."""

from dataclasses import replace

import pytest
import small_problems as problem
import torch
from small_learners import EXECUTORS, learner_of, small, tasks_of
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError
from metablocks.laws import gradients, purity
from metablocks.laws.compare import assert_close

pytestmark = pytest.mark.usefixtures("placed")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x, *, context):
        return self.left(x).tanh() + self.right(context["c"])


@EXECUTORS
def test_batches_may_be_any_pytree(executor):
    def batch(examples):
        inputs = {"x": torch.randn(3, examples, 3), "context": {"c": torch.randn(3, examples, 2)}}
        return inputs, torch.randn(3, examples, 2)

    learner = learner_of(TwoInputs(), executor=executor)
    assert learner.meta_gradient(mb.TaskBatch(batch(5), batch(4))).loss.isfinite()


@EXECUTORS
def test_frozen_parameters_neither_adapt_nor_get_a_gradient(executor):
    model = small()
    model[0].weight.requires_grad_(False)
    learner, tasks = learner_of(model, executor=executor, rule=mb.meta_sgd(0.1)), tasks_of(3)
    result = learner.backward(tasks)
    assert "model.0.weight" not in result.grads
    assert not any("0.weight" in name for name in result.grads)
    assert model[0].weight.grad is None
    assert torch.equal(learner.adapt(tasks[0].support)[0].weight, model[0].weight)


@EXECUTORS
def test_a_parameter_frozen_later_adapts_still_and_loses_its_gradient_alone(executor, within):
    learner, tasks = learner_of(small(), executor=executor), tasks_of(3)
    due = learner.meta_gradient(tasks).grads
    learner.model[0].bias.requires_grad_(False)
    got = learner.meta_gradient(tasks).grads
    assert due.pop("model.0.bias") is not None
    assert_close("frozen later", got, due, within(1e-12))


def test_parameters_outside_the_pattern_stay_put_but_are_meta_learned():
    model = small()
    learner, tasks = learner_of(model, adapt="4.*"), tasks_of(3)
    adapted = learner.adapt(tasks[0].support)
    assert torch.equal(adapted[0].weight, model[0].weight)
    assert not torch.equal(adapted[4].weight, model[4].weight)
    assert learner.meta_gradient(tasks).grads["model.0.weight"].abs().sum() > 0


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
@pytest.mark.parametrize("adapt", ["head.*", "!head.*"])
def test_a_first_order_step_detaches_gradients_and_nothing_else(order, adapt, place):
    """ANIL: θ_head' = θ_head − α g(body, head); first order drops ∂g, keeps ∂α."""
    anil = replace(problem.regression(**place), adapt=adapt)
    learner = anil.learner(mb.LearningRate(0.1, learn=True), order=order)
    gradients.plain_autograd(learner, anil.tasks)


@EXECUTORS
def test_tied_parameters_move_together(executor, device64, float64):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model, tasks = Tied(), problem.quadratic(size=2, device=device64).tasks
    tasks = mb.TaskBatch((tasks.support[0], tasks.support[0]), (tasks.query[0], tasks.query[0]))
    learner = learner_of(model, executor=executor, rule=mb.LearningRate(0.1, learn=True))
    assert set(learner.meta_gradient(tasks).grads) == {"model.a.weight", "rule.rate.*"}
    gradients.finite_differences(learner, tasks)
    adapted = learner.adapt(tasks[0].support)
    assert adapted.a.weight is adapted.b.weight


class Tally(nn.Module):
    """Counts its passes in a buffer, in place, and scales by a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("peak", torch.zeros(2))

    def forward(self, x):
        self.passes += 1
        output = self.linear(x)
        self.peak = torch.maximum(self.peak, output.detach().amax(0))
        return output * (1 + 0.1 * self.passes)


def test_buffers_pass_from_step_to_step_inside_a_task_and_never_reach_the_model():
    tasks = tasks_of(3)
    results = []
    for executor in (mb.Loop(), mb.Vmap(), mb.Vmap(chunk=2)):
        torch.manual_seed(0)
        learner = learner_of(Tally(), executor=executor)
        purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))
        results.append(learner.meta_gradient(tasks).grads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    adapted = learner.adapt(tasks[0].support)
    assert float(adapted.passes) == 2  # the two support passes
    assert not torch.equal(adapted.peak, torch.zeros(2))


class StepBias(mb.StepAware):
    """Step-aware: a bias for each inner step, as per-step batch norm will have."""

    max_steps = 3

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.steps = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return (self.linear(x) + self.steps[self.inner_step]).tanh()


@EXECUTORS
def test_step_aware_modules_get_each_step_its_row(executor):
    tasks = mb.TaskBatch(*[(a.double(), b.double()) for a, b in _sides(tasks_of(3))])
    learner = learner_of(
        StepBias().double(),
        steps=3,
        adapt="linear.*",
        executor=executor,
        step_loss=mb.UniformStepLoss(),
    )
    gradients.finite_differences(learner, tasks)
    assert (learner.meta_gradient(tasks).grads["model.steps"].abs().sum(1) > 0).all()
    assert learner.max_steps == 3
    with pytest.raises(BlockError, match="set up for 3; take at most 3"):
        learner.evaluate(tasks, steps=4)


def test_attributes_of_a_module_that_is_not_step_aware_are_its_own():
    class Halting(nn.Linear):
        max_steps, inner_step, collects_buffers = 1, "mine", True

        def forward(self, x):
            assert self.inner_step == "mine"
            return super().forward(x)

    learner = learner_of(Halting(3, 2), steps=3)
    assert learner.max_steps is None
    learner.backward(tasks_of(3))


def _sides(tasks):
    return tasks.support, tasks.query
