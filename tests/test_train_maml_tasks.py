"""What `train_maml` takes for tasks, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_training import (
    GOOD,
    NOT_FINITE,
    PAIR,
    X,
    assert_equal,
    by_hand,
    net,
    rows,
    sinusoids,
    train,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import metablocks as mb
from metablocks.errors import BlockError, RunError, SelectionError, TaskError

# --- whatever holds the tasks -------------------------------------------------------------------


def _loader(batches):
    tasks = [task for batch in batches for task in rows(batch)]
    return DataLoader([(task.support, task.query) for task in tasks], batch_size=3)


def _dict_loader(batches):
    tasks = [task for batch in batches for task in rows(batch)]
    return DataLoader([{"support": t.support, "query": t.query} for t in tasks], batch_size=3)


def _task_loader(batches):
    tasks = [task for batch in batches for task in rows(batch)]
    return DataLoader(tasks, batch_size=3, collate_fn=list)


@pytest.mark.parametrize(
    "hold",
    [
        lambda batches: [(b.support, b.query) for b in batches],
        lambda batches: [[list(b.support), list(b.query)] for b in batches],
        lambda batches: tuple({"support": b.support, "query": b.query, "id": 3} for b in batches),
        lambda batches: (batch for batch in batches),
        lambda batches: [rows(batch) for batch in batches],
        lambda batches: [batch.to(torch.float64) for batch in batches],
        _loader,
        _dict_loader,
        _task_loader,
        lambda batches: mb.tasks.Sinusoid(shots=5, queries=6),
    ],
    ids=[
        "pairs",
        "lists",
        "dicts",
        "generator",
        "tasks",
        "float64",
        "loader",
        "dict_loader",
        "task_loader",
        "source",
    ],
)
def test_however_the_tasks_are_held_the_learner_is_the_same(hold):
    model, batches = net(), sinusoids()
    expected, history = train(copy.deepcopy(model), batches)
    trained, other = train(model, hold(batches), iterations=4, tasks_per_step=3)
    assert other.losses == history.losses
    assert_equal(trained, expected)


def unequal(count=2):
    def task(support, query):
        return mb.Task(*((torch.randn(n, 1), torch.randn(n, 1)) for n in (support, query)))

    return [task(3 + index, 5 - index) for index in range(count)]


def test_tasks_of_unequal_size_run_under_loop():
    model, tasks = net().double(), [unequal(2), unequal(3)]
    learner = mb.MetaLearner(
        copy.deepcopy(model), loss=F.mse_loss, steps=2, rule=mb.LearningRate(0.01)
    )
    doubles = [
        [
            mb.Task(*(tuple(t.double() for t in side) for side in (task.support, task.query)))
            for task in batch
        ]
        for batch in tasks
    ]
    losses, _ = by_hand(learner, doubles, [0, 0])
    trained, history = train(model, tasks, validation=tasks)
    assert history.losses == losses
    assert_equal(trained, learner)
    scores = [learner.evaluate(batch).query_losses[:, -1] for batch in doubles]
    assert history.validation_losses == [float(torch.cat(scores).mean())]


def test_a_stream_of_unknown_length_may_be_loaded():
    class Stream(IterableDataset):
        def __iter__(self):
            return ((task.support, task.query) for batch in sinusoids() for task in rows(batch))

    model = net()
    expected, _ = train(copy.deepcopy(model), sinusoids() * 2)
    trained, _ = train(model, DataLoader(Stream(), batch_size=3), epochs=2)
    assert_equal(trained, expected)


def test_an_endless_generator_goes_on_from_epoch_to_epoch():
    batches, model = sinusoids(6), net()
    expected, _ = train(copy.deepcopy(model), batches)
    trained, history = train(model, iter(batches), epochs=3, iterations=2)
    assert_equal(trained, expected)
    assert len(history.losses) == 6


def test_a_source_is_sampled_freshly_in_every_epoch():
    source, model = mb.tasks.Sinusoid(shots=5, queries=6), net()
    expected, _ = train(copy.deepcopy(model), sinusoids(4))
    trained, _ = train(model, source, epochs=2, iterations=2, tasks_per_step=3)
    assert_equal(trained, expected)


def test_inputs_may_be_several_tensors_and_integers():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 2)

        def forward(self, x, index):
            return x * self.embed(index)

    x, index = torch.randn(6, 5, 2), torch.randint(4, (6, 5))
    pair = ((x, index), x)
    loader = DataLoader([((pair[0][0][i], index[i]), x[i]) for i in range(6)], batch_size=3)
    batches = [(batch, batch) for batch in loader]
    _, history = train(Gate(), batches, executor=mb.Loop())
    assert len(history.losses) == 2


def test_tasks_move_to_the_device_of_the_model(device):
    model = net()
    learner, _ = train(model, [*sinusoids(2), unequal()], device=device, plus_plus=True)
    assert learner.model is model
    assert all(p.device.type == device.type for p in learner.parameters())


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "options", "kind", "message"),
    [
        ([], {}, TaskError, "tasks gave no batch in epoch 1; it is empty"),
        (iter([GOOD]), {"epochs": 2}, TaskError, "runs once, but epochs is 2; give a list"),
        (
            iter([GOOD]),
            {"epochs": 2, "iterations": 1},
            TaskError,
            "tasks gave no batch in epoch 2; a generator runs once",
        ),
        (mb.TaskBatch(*GOOD), {}, TaskError, "tasks is a TaskBatch; it takes a TaskSource, or an"),
        ({"support": PAIR}, {}, TaskError, "tasks is a dict with keys ['support']"),
        (3, {}, TaskError, "tasks is a int; it takes a TaskSource"),
        (
            GOOD,
            {},
            TaskError,
            "tasks, batch 1 of epoch 1 is a tuple of (a Tensor, a Tensor); a bat",
        ),
        ([GOOD, X], {}, TaskError, "tasks, batch 2 of epoch 1 is a Tensor; a batch of tasks is"),
        ([GOOD, []], {}, TaskError, "tasks, batch 2 of epoch 1 is a list of (); a batch of tasks"),
        ([{"support": PAIR}], {}, TaskError, "batch 1 of epoch 1 is a dict with keys ['support']"),
        ([(PAIR, (X,))], {}, TaskError, "is a tuple of (a tuple of (a Tensor, a Tensor), a tuple"),
        (
            [mb.Task(*GOOD)],
            {},
            TaskError,
            "batch 1 of epoch 1 is a single Task; make a batch of it",
        ),
        (
            [(PAIR, (X, X.numpy()))],
            {},
            TaskError,
            "batch 1 of epoch 1: it holds a ndarray; it takes",
        ),
        ([(PAIR, (X[:2], X))], {}, TaskError, "batch 1 of epoch 1: every tensor of a TaskBatch is"),
        (mb.tasks.Sinusoid, {}, TaskError, "the class Sinusoid; did you mean Sinusoid(…)?"),
        (mb.tasks.Sinusoid(), {}, TaskError, "say how many meta-steps: iterations=1000"),
        (
            torch.utils.data.TensorDataset(X, X),
            {},
            TaskError,
            "tasks is a TensorDataset, which gives single tasks; batch them: torch.utils.data.Data",
        ),
        ([GOOD], {"validation": []}, TaskError, "validation gave no batch in epoch 1"),
        ([GOOD], {"validation": [X]}, TaskError, "validation, batch 1 of epoch 1 is a Tensor"),
        (
            [GOOD],
            {"validation": iter([GOOD]), "epochs": 2},
            TaskError,
            "validation is a list_iterator, which runs once, but epochs is 2",
        ),
        ([((X, X[..., 0]), PAIR)], {}, TaskError, "prediction has shape [5, 1], the target [5]"),
        (
            [((X, {"y": X}), PAIR)],
            {},
            TaskError,
            "the target a dict; the default loss compares two",
        ),
        (
            [GOOD],
            {"inner_lr": -0.1},
            BlockError,
            "inner_lr is -0.1; it takes a finite number above 0",
        ),
        ([GOOD], {"outer_lr": "fast"}, BlockError, "outer_lr is 'fast'"),
        ([GOOD], {"inner_steps": 0}, BlockError, "inner_steps is 0; it takes a whole number, 1 or"),
        ([GOOD], {"epochs": 1.5}, BlockError, "epochs is 1.5"),
        ([GOOD], {"iterations": 0}, BlockError, "iterations is 0"),
        ([GOOD], {"tasks_per_step": True}, BlockError, "tasks_per_step is True"),
        ([GOOD], {"adapt": "haed"}, SelectionError, '"haed" matches no parameter'),
        (
            [GOOD, NOT_FINITE],
            {},
            RunError,
            "the training loss is nan at meta-step 2, which was not taken",
        ),
        (
            [(PAIR, (X, 0 * X))],
            {"loss": lambda p, t: (p * t).abs().sqrt().mean()},  # 0, with a slope of 0/0
            RunError,
            "the meta-gradient is not finite at meta-step 1",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tasks, options, kind, message):
    with pytest.raises(kind) as caught:
        train(nn.Linear(1, 1), tasks, **options)
    assert message in str(caught.value)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(BlockError, match=r"model is .*Linear.*; it takes an nn.Module"):
        train(nn.Linear, [GOOD])
