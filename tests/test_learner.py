"""The whole learner: its contract, its purity, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
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
from metablocks.laws import gradients, problem, purity

EXECUTORS = pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap(), mb.Vmap(chunk=2)], ids=repr)


def learner_of(model, *, tasks=3, loss=F.mse_loss, **blocks):
    blocks = {"steps": 2, "rule": mb.LearningRate(0.1), **blocks}
    return mb.MetaLearner(model, loss=loss, **blocks)


def tasks_of(*shape, tasks=3, outputs=2):
    def batch(examples):
        return torch.randn(tasks, examples, *shape), torch.randn(tasks, examples, outputs)

    return mb.TaskBatch(batch(5), batch(4))


def small(dropout=0.0):
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)
    )


# --- the contract -------------------------------------------------------------------------------


def test_the_result_has_the_names_and_shapes_of_the_contract():
    learner = learner_of(small(), rule=mb.lslr(0.1), step_loss=mb.UniformStepLoss())
    result = learner.meta_gradient(tasks_of(3))
    assert {n: g.shape for n, g in result.grads.items()} == {
        n: p.shape for n, p in learner.named_parameters()
    }
    assert all(name.startswith(("model.", "rule.")) for name in result.grads)
    assert result.loss.shape == ()
    assert result.query_losses.shape == (3, 3)
    assert result.query_losses[:, 0].isnan().all()  # before adaptation has no weight
    assert result.query_losses[:, 1:].isfinite().all()


@EXECUTORS
def test_backward_adds_the_meta_gradient_into_grad(executor):
    learner, tasks = learner_of(small(), executor=executor), tasks_of(3)
    grads = learner.meta_gradient(tasks).grads
    for times in (1, 2):
        learner.backward(tasks)
        for name, parameter in learner.named_parameters():
            torch.testing.assert_close(parameter.grad, times * grads[name])


def test_training_lowers_the_query_loss():
    learner, tasks = learner_of(small(), rule=mb.meta_sgd(0.1), executor=mb.Vmap()), tasks_of(3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses = []
    for epoch in range(30):
        losses.append(float(learner.backward(tasks, progress=mb.Progress(epoch)).loss))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@EXECUTORS
def test_evaluation_gives_every_step_and_the_final_predictions(executor):
    learner, tasks = learner_of(small(), executor=executor), tasks_of(3)

    def error(prediction, target):
        return (prediction - target).abs().mean()

    scores = learner.evaluate(tasks, steps=4, metric=error)
    assert scores.query_losses.shape == scores.metrics.shape == (3, 5)
    assert scores.predictions.shape == (3, 4, 2)
    torch.testing.assert_close(
        scores.query_losses[1, -1], F.mse_loss(scores.predictions[1], tasks.query[1][1])
    )
    final = learner.meta_gradient(tasks).query_losses[:, -1]
    torch.testing.assert_close(learner.evaluate(tasks).query_losses[:, -1], final)


def test_the_adapted_module_is_plain_and_predicts_what_evaluation_predicts():
    model = small()
    learner, tasks = learner_of(model), tasks_of(3)
    adapted = learner.adapt(tasks[1].support)
    assert type(adapted) is type(model)
    assert not adapted.training
    expected = learner.evaluate(tasks).predictions[1]
    torch.testing.assert_close(adapted.train()(tasks[1].query[0]), expected)
    assert all(p.grad is None and p.requires_grad for p in adapted.parameters())


def test_the_adapted_module_carries_the_support_statistics_of_the_last_step():
    torch.manual_seed(1)
    learner, tasks = learner_of(small()), tasks_of(3)
    adapted = learner.adapt(tasks[0].support)
    before_last = learner.adapt(tasks[0].support, steps=1)  # θ_1: where step 2 of 2 starts
    hidden = before_last[0](tasks[0].support[0])
    torch.testing.assert_close(adapted[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(adapted[1].running_var, hidden.var(0))
    assert adapted[1].momentum == learner.model[1].momentum
    x = tasks[0].query[0]
    torch.testing.assert_close(torch.cat([adapted(row[None]) for row in x]), adapted(x))


def test_tasks_of_unequal_size_run_under_loop():
    a, b = tasks_of(3, tasks=1)[0], tasks_of(3, tasks=1)[0]
    b = mb.Task((b.support[0][:4], b.support[1][:4]), (b.query[0][:2], b.query[1][:2]))
    learner = learner_of(small())
    whole = learner.meta_gradient([a, b])
    mean = [learner.meta_gradient([task]).grads for task in (a, b)]
    for name, grad in whole.grads.items():
        torch.testing.assert_close(grad, (mean[0][name] + mean[1][name]) / 2)
    assert [len(p) for p in learner.evaluate([a, b]).predictions] == [4, 2]
    vmapped = learner_of(small(), executor=mb.Vmap())
    with pytest.raises(TaskError, match=r"unequal size cannot be stacked.*use executor=Loop"):
        vmapped.meta_gradient([a, b])


# --- models of every kind -----------------------------------------------------------------------


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


def test_parameters_outside_the_pattern_stay_put_but_are_meta_learned():
    model = small()
    learner, tasks = learner_of(model, adapt="4.*"), tasks_of(3)
    adapted = learner.adapt(tasks[0].support)
    assert torch.equal(adapted[0].weight, model[0].weight)
    assert not torch.equal(adapted[4].weight, model[4].weight)
    assert learner.meta_gradient(tasks).grads["model.0.weight"].abs().sum() > 0


@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_a_first_order_step_detaches_gradients_and_nothing_else(order):
    """ANIL, one step: θ_head' = θ_head − α g(body, head); first order drops ∂g, keeps ∂α."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False)
    ).double()
    x, y, u, v = (torch.randn(4, k, dtype=torch.float64) for k in (2, 1, 2, 1))
    body, head = (p.detach().clone().requires_grad_() for p in net.parameters())
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def loss(body, head, inputs, target):
        return F.mse_loss((inputs @ body.T).tanh() @ head.T, target)

    (grad,) = torch.autograd.grad(loss(body, head, x, y), [head], create_graph=True)
    grad = grad if order == mb.SecondOrder() else grad.detach()
    expected = torch.autograd.grad(loss(body, head - rate * grad, u, v), [body, head, rate])

    learner = learner_of(
        net, steps=1, adapt="2.*", order=order, rule=mb.LearningRate(0.1, learn=True)
    )
    got = learner.meta_gradient([mb.Task((x, y), (u, v))]).grads
    names = ["model.0.weight", "model.2.weight", "rule.rate.*"]
    problem.hold("ANIL", got, dict(zip(names, expected, strict=True)), within=1e-12)


@EXECUTORS
def test_tied_parameters_move_together(executor):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model, tasks = Tied().double(), problem.quadratic(size=2).tasks
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


class StepBias(nn.Module):
    """Step-aware: a bias for each inner step, as per-step batch norm will have."""

    max_steps = 3

    def __init__(self):
        super().__init__()
        self.inner_step = 0
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


def _sides(tasks):
    return tasks.support, tasks.query


# --- randomness ---------------------------------------------------------------------------------


def test_dropout_is_drawn_anew_by_backward_and_follows_from_the_seed():
    learner, tasks = learner_of(small(dropout=0.5)), tasks_of(3)

    def losses():
        torch.manual_seed(7)
        return [float(learner.backward(tasks).loss) for _ in range(3)]

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first


def test_dropout_differs_between_equal_tasks():
    one = tasks_of(3, tasks=1)[0]
    with pytest.warns(mb.RandomDrawsWarning, match="not the draws of Loop"):
        vmapped = learner_of(small(0.5), executor=mb.Vmap()).meta_gradient([one, one])
    looped = learner_of(small(0.5)).meta_gradient([one, one])
    for result in (vmapped, looped):
        assert result.query_losses[0, -1] != result.query_losses[1, -1]


def test_evaluation_has_no_dropout():
    learner, tasks = learner_of(small(dropout=0.5)), tasks_of(3)
    first, second = learner.evaluate(tasks), learner.evaluate(tasks)
    assert torch.equal(first.query_losses, second.query_losses)


# --- purity -------------------------------------------------------------------------------------


@EXECUTORS
@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
@pytest.mark.parametrize(
    "act",
    [
        lambda learner, tasks: learner.meta_gradient(tasks),
        lambda learner, tasks: learner.evaluate(tasks, steps=3),
        lambda learner, tasks: learner.adapt(tasks[0].support),
    ],
    ids=["meta_gradient", "evaluate", "adapt"],
)
@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_no_trace(executor, act, training):
    learner, tasks = learner_of(small(dropout=0.3), executor=executor), tasks_of(3)
    learner.backward(tasks)
    learner.train(training)
    purity.leaves_no_trace(learner, lambda learner: act(learner, tasks))


@EXECUTORS
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
def test_an_exception_in_the_loss_leaves_no_trace(executor, calls):
    left = [calls]

    def loss(prediction, target):
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError("the loss gave up")
        return F.mse_loss(prediction, target)

    learner, tasks = learner_of(small(dropout=0.3), loss=loss, executor=executor), tasks_of(3)
    with pytest.raises(ZeroDivisionError, match="gave up"):
        purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))


def test_a_learner_survives_copying_and_its_state_dict_round_trips():
    learner, tasks = learner_of(small(), rule=mb.lslr(0.1)), tasks_of(3)
    twin = copy.deepcopy(learner)
    torch.testing.assert_close(twin.meta_gradient(tasks).grads, learner.meta_gradient(tasks).grads)
    torch.manual_seed(99)
    fresh = learner_of(small(), rule=mb.lslr(0.7))
    fresh.load_state_dict(learner.state_dict())
    torch.testing.assert_close(fresh.meta_gradient(tasks).grads, learner.meta_gradient(tasks).grads)


# --- what is refused ----------------------------------------------------------------------------


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
