"""`fit` is the hand-written loop, with validation, the best weights and callbacks; `load_run`."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import NOT_FINITE, assert_equal, by_hand, net, sinusoids
from torch.utils.data import DataLoader

import metablocks as mb
from metablocks.errors import BlockError, RunError, TaskError


def learner_of(model):
    return mb.MetaLearner(
        model, loss=F.mse_loss, steps=2, rule=mb.LearningRate(0.05), executor=mb.Vmap()
    )


def adam(learner, lr=0.01):
    return torch.optim.Adam(learner.parameters(), lr=lr)


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau(adam(net()), patience=0, factor=0.5)


def twins():
    torch.manual_seed(0)
    first = learner_of(net())
    torch.manual_seed(0)
    return first, learner_of(net())


def minus_error(prediction, target):
    return -F.mse_loss(prediction, target)


def train(learner, tasks, **options):
    return mb.fit(learner, tasks, **{"optimizer": adam(learner), "progress": False, **options})


def test_it_is_the_hand_written_loop_bit_for_bit():
    learner, by_loop = twins()
    losses, _ = by_hand(by_loop, sinusoids() * 2, [0] * 4 + [1] * 4, outer_lr=0.01)
    history = train(learner, sinusoids(), epochs=2, validation=sinusoids(1), metric=minus_error)
    assert_equal(learner, by_loop)
    assert [epoch.number for epoch in history] == [1, 2]
    assert [epoch.loss for epoch in history] == [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    result = by_loop.evaluate(sinusoids(1)[0], metric=minus_error)
    losses, scores = history[-1].validation
    assert torch.equal(losses, result.query_losses.mean(0))
    assert torch.equal(scores, result.metrics.mean(0))
    assert history[-1].score == float(scores[-1])
    assert history[-1].scores.shape == (3,)
    assert history[-1].scores[-1] < 0
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_source_goes_on_from_epoch_to_epoch_and_the_schedule_takes_a_step_each():
    source = mb.tasks.Sinusoid(shots=5, queries=6)
    learner, by_loop = twins()
    optimizer = adam(learner, 0.001)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, 0.001 / 100)
    options = {"steps_per_epoch": 2, "tasks_per_step": 3, "scheduler": schedule}
    train(learner, source, optimizer=optimizer, epochs=3, **options)
    batches = [source.sample("train", range(3 * n, 3 * n + 3)) for n in range(6)]
    by_hand(by_loop, batches, [0, 0, 1, 1, 2, 2], cosine=3)
    assert_equal(learner, by_loop)


def test_scores_are_means_over_tasks_of_batches_of_any_size():
    learner, batches = learner_of(net()), [sinusoids(1)[0], sinusoids(1)[0][:1]]
    still = torch.optim.SGD(learner.parameters(), lr=0.0)
    (epoch,) = train(learner, batches, optimizer=still, metric=minus_error)
    each = torch.cat([learner.evaluate(tasks, metric=minus_error).metrics for tasks in batches])
    torch.testing.assert_close(epoch.scores[-1], each[:, -1].mean())
    assert epoch.scores[:-1].isnan().all()


@pytest.mark.parametrize("metric", [lambda p, t: (p > t).sum(), lambda p, t: (p > t).any()])
def test_a_metric_may_count(metric):
    learner = learner_of(net())
    (epoch,) = train(learner, sinusoids(1), validation=sinusoids(1), metric=metric)
    assert epoch.validation.scores.dtype == epoch.scores.dtype == torch.float32
    assert epoch.score == float(epoch.validation.scores[-1])


@pytest.mark.parametrize(
    ("scores", "best"),
    [([math.nan, 0.9, 0.5], 2), ([0.2, math.nan, 0.5], 3), ([0.9, math.nan, math.nan], 1)],
)
def test_an_epoch_whose_score_is_nan_is_not_the_best(scores, best):
    learner, states = learner_of(net()), []
    history = train(
        learner,
        sinusoids(1),
        epochs=3,
        validation=[sinusoids(1)[0][:1]],
        keep_best=True,
        metric=lambda prediction, target: scores[len(states)],
        callbacks=[lambda epoch: states.append(copy.deepcopy(learner.state_dict()))],
    )
    same = [all(torch.equal(s[n], t) for n, t in learner.state_dict().items()) for s in states]
    assert same == [epoch == best for epoch in (1, 2, 3)]
    assert [epoch.score == -math.inf for epoch in history] == [s != s for s in scores]


@pytest.mark.parametrize("fails", [False, True])
def test_the_best_weights_are_put_back_however_training_ends(fails):
    learner, by_loop = twins()
    validation = sinusoids(1)
    by_hand(by_loop, sinusoids(2), [0, 0], outer_lr=0.01)

    def spoil(epoch):
        for group in optimizer.param_groups:
            group["lr"] = 10.0
        if fails and epoch.number == 2:
            raise KeyboardInterrupt

    optimizer = adam(learner)
    options = {"optimizer": optimizer, "epochs": 2, "keep_best": True, "callbacks": [spoil]}
    if fails:
        with pytest.raises(KeyboardInterrupt) as stop:
            train(learner, sinusoids(2), validation=validation, **options)
        history = stop.value.history
    else:
        history = train(learner, sinusoids(2), validation=validation, **options)
    assert history[1].score < history[0].score == -float(history[0].validation.losses[-1])
    assert_equal(learner, by_loop)


def test_a_callback_that_returns_true_stops_and_each_one_is_called():
    seen = []
    learner = learner_of(net())
    for true in (True, np.True_, torch.tensor(True)):
        seen.clear()
        callbacks = [lambda epoch, true=true: epoch.number == 2 and true, seen.append]
        history = train(learner, sinusoids(1), epochs=5, callbacks=callbacks)
        assert seen == history
        assert len(history) == 2
    for answer in (1, "stop", torch.tensor(1.0)):
        callbacks = [lambda epoch, answer=answer: answer]
        assert len(train(learner, sinusoids(1), epochs=2, callbacks=callbacks)) == 2
    with pytest.raises(BlockError, match="no validation to be scored by"):
        _ = history[0].score


def test_what_a_data_loader_makes_of_pairs_goes_into_all_calls():
    x = torch.randn(6, 5, 1)
    data = [((x[n], x[n].sin()), (-x[n], -x[n].sin())) for n in range(6)]
    loader = DataLoader(data, batch_size=3)
    (batch, _), tasks = loader, mb.TaskBatch((x[:3], x[:3].sin()), (-x[:3], -x[:3].sin()))
    assert type(batch) is list
    learner, other = twins()
    same = torch.equal
    assert same(mb.TaskBatch(*batch).query[1], tasks.query[1])
    assert same(learner.evaluate(batch).predictions, other.evaluate(tasks).predictions)
    for form in (batch, {"support": batch[0], "query": batch[1]}):
        learner.backward(form)
        other.backward(tasks)
    gradients = [[p.grad for p in of.parameters()] for of in (learner, other)]
    assert all(map(same, *gradients))
    both = [mb.TaskBatch(*pair) for pair in loader]
    train(learner, loader)
    train(other, both)
    assert_equal(learner, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_best": True}, BlockError, "fit keep_best is True, but there is no validation"),
        ({"epochs": 0}, BlockError, "fit epochs is 0; it takes a whole number, 1 or more"),
        ({"tasks": mb.tasks.Sinusoid(shots=1, queries=1)}, TaskError, "steps_per_epoch=1000"),
        ({"tasks": [[1, 2, 3]]}, TaskError, "tasks, batch 1 of epoch 1 is a list of"),
        ({"tasks": [NOT_FINITE]}, RunError, "at meta-step 1, which was not taken"),
        ({"optimizer": 0.1}, BlockError, "fit optimizer is 0.1; it takes"),
        ({"optimizer": adam(net())}, BlockError, "holds no parameter of the learner"),
        ({"scheduler": 3}, BlockError, "fit scheduler is 3; it takes an LRScheduler"),
        (
            {"scheduler": PLATEAU},
            BlockError,
            "lambda epoch: plateau.step(epoch.validation.losses[-1])",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, error, message):
    learner = learner_of(net())
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    with pytest.raises(error) as caught:
        train(learner, **{"tasks": sinusoids(1), **options})
    assert message in str(caught.value)
    assert caught.value.block == "fit" or error is RunError
    assert all(torch.equal(before[n], t) for n, t in learner.state_dict().items())


def test_the_bar_shows_the_steps(capsys):
    learner = learner_of(net())
    train(learner, sinusoids(2), progress=True)
    assert "meta-training: 100%" in capsys.readouterr().err


def test_a_schedule_by_the_validation_takes_its_steps_as_a_callback():
    learner = learner_of(net())
    optimizer = adam(learner, 1e-12)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, eps=0)
    callbacks = [lambda epoch: plateau.step(epoch.validation.losses[-1])]
    options = {"epochs": 3, "validation": sinusoids(1), "callbacks": callbacks}
    train(learner, sinusoids(1), optimizer=optimizer, **options)
    assert optimizer.param_groups[0]["lr"] == 1e-12 / 4
