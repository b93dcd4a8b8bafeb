"""One call trains MAML, FOMAML and MAML++: it equals the hand-written loop, learns and tells."""

import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from small_learners import small
from small_training import (
    GOOD,
    NOT_FINITE,
    assert_equal,
    by_hand,
    net,
    random_tasks,
    sinusoids,
    train,
)
from torch import nn

import metablocks as mb
from metablocks.errors import RunError
from metablocks.meta_steps import accuracy
from metablocks.train_maml import VmapOrLoop, default_loss

# --- the law: the hand-written loop, bit for bit ------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_and_fomaml_are_the_hand_written_loop(first_order):
    model, tasks = net().double(), sinusoids()
    learner = mb.MetaLearner(
        copy.deepcopy(model),
        loss=F.mse_loss,
        steps=2,
        rule=mb.LearningRate(0.05),
        order=mb.FirstOrder() if first_order else mb.SecondOrder(),
        executor=mb.Vmap(),
    )
    doubles = [batch.to(torch.float64) for batch in tasks]
    losses, rates = by_hand(learner, doubles * 3, itertools.repeat(0, 12), outer_lr=0.01)
    trained, history = train(
        model, tasks, inner_lr=0.05, outer_lr=0.01, epochs=3, first_order=first_order
    )
    assert history.losses == losses
    assert history.outer_lrs == rates == [0.01] * 12
    assert len(history.seconds) == 3
    assert_equal(trained, learner)
    assert trained.model is model
    assert all(parameter.grad is None for parameter in trained.parameters())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("epochs", "annealed", "first_order_epochs", "progress"),
    [
        (4, 4, 2, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        (1, 10, 0, [0, 2.5, 5, 7.5]),  # one epoch anneals in ten parts
    ],
)
def test_maml_plus_plus_is_the_hand_written_loop(
    first_order, normed, epochs, annealed, first_order_epochs, progress
):
    torch.manual_seed(3)
    model = (
        small() if normed else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ).double()
    x = torch.randn(4, 3, 5, 3)
    y = torch.randint(2, (4, 3, 5))
    tasks = [mb.TaskBatch((x[i], y[i]), (-x[i], y[i])) for i in range(4)]
    own = copy.deepcopy(model)
    if normed:
        own = mb.per_step_batch_norm(own, 3, beyond="last")
    learner = mb.MetaLearner(
        own,
        loss=F.cross_entropy,
        steps=3,
        rule=mb.lslr(0.1, beyond="last"),
        order=mb.FirstOrder()
        if first_order
        else mb.AnnealedOrder(first_order_epochs=first_order_epochs),
        step_loss=mb.AnnealedStepLoss(epochs=annealed),
        adapt=mb.norm_patterns(own),
        executor=mb.Vmap(),
    )
    doubles = [batch.to(torch.float64) for batch in tasks]
    expected = by_hand(learner, doubles * epochs, progress, cosine=annealed)
    before = copy.deepcopy(model.state_dict())
    trained, history = train(
        model,
        tasks,
        inner_lr=0.1,
        inner_steps=3,
        epochs=epochs,
        plus_plus=True,
        first_order=first_order,
    )
    assert (history.losses, history.outer_lrs) == expected
    assert_equal(trained, learner)
    assert (trained.model is model) is not normed
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()) is normed


def test_a_single_epoch_of_unknown_length_is_not_annealed():
    endless = (batch for batch in sinusoids(3))
    learner, history = train(net(), endless, plus_plus=True)
    assert history.outer_lrs == [0.001] * 3
    uniform = mb.UniformStepLoss()(2, mb.Progress())
    assert torch.equal(learner.step_loss(2, mb.Progress()), uniform)


def test_the_step_losses_anneal_to_the_last_step():
    seen = []

    class Watched(mb.AnnealedStepLoss):
        def __call__(self, steps, progress):
            weights = super().__call__(steps, progress)
            seen.append(round(float(weights[-1]), 4))
            return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["metablocks.train_maml"], "AnnealedStepLoss", Watched)
        train(net(), sinusoids(1), plus_plus=True, epochs=12)
        assert seen == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1]
        seen.clear()
        train(net(), mb.tasks.Sinusoid(), plus_plus=True, iterations=20, tasks_per_step=2)
        assert seen == [round(0.5 + 0.05 * part, 4) for part in range(10) for _ in range(2)]


def test_maml_plus_plus_evaluates_with_more_steps_than_trained():
    learner, _ = train(small(), [random_tasks(3)], plus_plus=True, epochs=2)
    assert learner.evaluate(random_tasks(3), steps=6).query_losses.shape == (3, 7)
    assert not any("1." in name for name in learner.adapted)  # γ, β are the outer loop's


def test_only_the_head_adapts_where_that_is_asked_for():
    learner, _ = train(small(), [random_tasks(3)], plus_plus=True, adapt="4.*")
    assert learner.adapted == ("4.weight", "4.bias")
    learner, _ = train(net(), sinusoids(1), adapt="!2.*")
    assert learner.adapted == ("0.weight", "0.bias")


# --- what it learns and tells -------------------------------------------------------------------


def test_the_sinusoid_is_learned():
    source = mb.tasks.Sinusoid(shots=10, queries=10)
    _, history = train(
        nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)),
        source,
        outer_lr=0.005,
        epochs=2,
        iterations=40,
        tasks_per_step=10,
        validation=source,
    )
    # In the mean over ten steps, for the losses of single steps scatter.
    assert sum(history.losses[-10:]) < 0.85 * sum(history.losses[:10])
    assert len(history.validation_losses) == 2
    assert history.validation_accuracies == []


def test_maml_plus_plus_learns_to_tell_images_apart():
    torch.manual_seed(0)
    patterns = torch.randn(8, 2, 1, 8, 8)

    def images(examples):
        labels = torch.arange(2).repeat(8, examples)
        noise = 0.3 * torch.randn(8, 2 * examples, 1, 8, 8)
        return patterns[torch.arange(8)[:, None], labels] + noise, labels.int()

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
    )
    tasks = [(images(3), images(4)) for _ in range(5)]
    learner, history = train(
        model, tasks, inner_lr=0.1, plus_plus=True, epochs=3, validation=tasks[:2]
    )
    assert isinstance(learner.model[1], mb.PerStepBatchNorm)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert len(history.validation_losses) == len(history.validation_accuracies) == 3
    assert history.validation_accuracies[-1] > 0.9


@pytest.mark.parametrize("classes", [(5, 3), (5, 3, 4)], ids=["one label", "dense"])
def test_accuracy_has_the_classes_where_cross_entropy_has_them(classes):
    prediction, (examples, _, *rest) = torch.randn(classes), classes
    target = prediction.movedim(1, -1).argmax(-1)
    assert target.shape == (examples, *rest)
    wrong = (target + 1) % 3
    assert (accuracy(prediction, target), accuracy(prediction, wrong)) == (1, 0)
    assert F.cross_entropy(prediction, target) < F.cross_entropy(prediction, wrong)
    assert accuracy(prediction[0, ..., 0] if rest else prediction[0], target.flatten()[0]) == 1


def test_the_bar_shows_only_where_it_is_wanted(capsys):
    train(net(), sinusoids(2))
    assert capsys.readouterr().err == ""
    mb.train_maml(net(), sinusoids(2), inner_steps=1)
    assert "meta-training: 100%" in capsys.readouterr().err


def test_what_was_learned_survives_an_interrupt():
    def batches():
        yield from sinusoids(2)
        raise KeyboardInterrupt

    model = net()
    expected, history = train(copy.deepcopy(model), sinusoids(2))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(model, batches())
    learner, so_far = stopped.value.trained
    assert learner.model is model
    assert so_far.losses == history.losses
    assert_equal(learner, expected)


def test_a_step_that_diverges_is_not_taken():
    model = net()
    expected, _ = train(copy.deepcopy(model), [GOOD])
    with pytest.raises(RunError) as caught:
        train(model, [GOOD, NOT_FINITE])
    assert_equal(caught.value.trained.learner, expected)


def test_the_default_blocks_survive_a_copy():
    learner, _ = train(net(), sinusoids(1))
    twin = copy.deepcopy(learner)
    assert twin.executor == VmapOrLoop()
    assert twin.loss is default_loss
