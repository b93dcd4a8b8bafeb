"""The whole learner: its contract, its randomness and its purity."""

import copy

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import EXECUTORS, learner_of, small, tasks_of

import metablocks as mb
from metablocks.errors import (
    TaskError,
)
from metablocks.laws import executors, purity

pytestmark = pytest.mark.usefixtures("placed")

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


# --- randomness ---------------------------------------------------------------------------------


def test_dropout_is_drawn_anew_by_backward_and_follows_from_the_seed():
    learner, tasks = learner_of(small(dropout=0.5)), tasks_of(3)

    def losses():
        torch.manual_seed(7)
        return [float(learner.backward(tasks).loss) for _ in range(3)]

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first


@EXECUTORS
@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
def test_dropout_differs_between_equal_tasks(executor, place):
    executors.draws_are_independent(executor, problem.regression(**place))


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
@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Adjoint()], ids=repr)
@pytest.mark.filterwarnings("ignore::metablocks.RandomDrawsWarning")
def test_an_exception_in_the_loss_leaves_no_trace(executor, estimator):
    own = problem.Problem(lambda: small(dropout=0.3), F.mse_loss, tasks_of(3), 2)
    blocks = {"executor": executor, "estimator": estimator}
    purity.leaves_no_trace_of_an_error(own, lambda loss: own.learner(loss=loss, **blocks))


def test_a_learner_survives_copying_and_its_state_dict_round_trips():
    learner, tasks = learner_of(small(), rule=mb.lslr(0.1)), tasks_of(3)
    twin = copy.deepcopy(learner)
    torch.testing.assert_close(twin.meta_gradient(tasks).grads, learner.meta_gradient(tasks).grads)
    torch.manual_seed(99)
    fresh = learner_of(small(), rule=mb.lslr(0.7))
    fresh.load_state_dict(learner.state_dict())
    torch.testing.assert_close(fresh.meta_gradient(tasks).grads, learner.meta_gradient(tasks).grads)


def test_a_batch_of_tasks_is_sliced_as_a_sequence():
    x = torch.arange(4.0)[:, None, None].expand(4, 3, 1)
    tasks = mb.TaskBatch((x, {"a": x, "flag": True}), (x, x))
    some = tasks[1:3]
    assert (len(some), some.support[1]["flag"], float(some[0].query[0][0])) == (2, True, 1.0)
    assert len(tasks[::2]) == 2
    for wrong in (slice(4, None), slice(None, None, -1)):
        with pytest.raises(mb.MetablocksError, match=r"a batch has one task or more"):
            tasks[wrong]
