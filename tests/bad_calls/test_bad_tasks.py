"""Tasks, and other arguments of a learner's calls, that do not do are refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calls import NAN, WEIGHTS, check_refusal, each_of, half, learner_of, meta, tasks
from torch import nn

import metablocks as mb
from metablocks.errors import (
    BlockError,
    ExecutorError,
    MetablocksError,
    ModuleError,
    RuleError,
    TaskError,
)

pytestmark = pytest.mark.filterwarnings("ignore::metablocks.CompileWarning")


def labelled(dtype, executor):
    batch = torch.randn(3, 6, 2), torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype).expand(3, 6)
    return learner_of(nn.Linear(2, 3), loss=F.cross_entropy, executor=executor).meta_gradient(
        mb.TaskBatch(batch, batch)
    )


class Two(nn.Linear):
    """Outputs, and those of an auxiliary head."""

    def forward(self, x):
        return super().forward(x), super().forward(x)


EMPTY = (torch.zeros(3, 0, 2), torch.zeros(3, 0, 1))
LISTS = ([[1.0, 2.0]], [[1.0]])
ARRAYS = (np.ones((4, 2)), np.ones((4, 1)))
FAR = (torch.randn(3, 6, 2), torch.full((3, 6), 7))

TASKS: dict[str, tuple[Any, type[MetablocksError], str, str]] = {
    **{
        f"empty {side}, {method}": (
            lambda s=side, m=method: getattr(learner_of(), m)(tasks(**{s: EMPTY})),
            TaskError,
            side,
            f"tasks.{side}[0] has no examples",
        )
        for side in ("support", "query")
        for method in ("meta_gradient", "backward", "evaluate")
    },
    "empty support, adapt": (
        lambda: learner_of().adapt(half(examples=0)),
        TaskError,
        "support",
        "has no examples",
    ),
    "adapt(task)": (
        lambda: learner_of().adapt(tasks()[0]),
        BlockError,
        "support",
        "adapt support is a Task; it takes a pair (inputs, target)",
    ),
    "adapt(inputs)": (
        lambda: learner_of().adapt(torch.ones(3, 2)),
        BlockError,
        "support",
        "adapt support is a Tensor [3, 2]",
    ),
    "adapt(None)": (lambda: learner_of().adapt(None), BlockError, "support", "support is None"),
    "lists": (lambda: learner_of().adapt(LISTS), TaskError, "support", "the inputs are a list"),
    "arrays": (
        lambda: learner_of().adapt(ARRAYS),
        TaskError,
        "support",
        "the inputs are a ndarray",
    ),
    "a list for the target": (
        lambda: learner_of().adapt((torch.ones(2, 2), [1.0, 2.0])),
        TaskError,
        "support",
        "the target is a list: give tensors",
    ),
    "a list of lists": (
        lambda: meta([mb.Task(LISTS, LISTS)]),
        TaskError,
        "tasks",
        "the inputs are a list",
    ),
    **{
        f"inputs of {dtype}, {executor!r}": (
            lambda d=dtype, e=executor: meta(
                tasks((torch.ones(3, 6, 2, dtype=d), torch.ones(3, 6, 1))), executor=e
            ),
            TaskError,
            "tasks",
            f"the inputs are a Tensor [6, 2] of {dtype}",
        )
        for dtype in (torch.float16, torch.int64)
        for executor in (mb.Loop(), mb.Vmap())
    },
    **{
        f"labels of {dtype}, {executor!r}": (
            lambda d=dtype, e=executor: labelled(d, e),
            TaskError,
            "tasks",
            "class numbers as target.long()",
        )
        for dtype in (torch.int32, torch.int16, torch.int8, torch.bool)
        for executor in (mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace"), mb.Vmap())
    },
    "a model that returns two": (
        lambda: learner_of(Two(2, 3), loss=F.cross_entropy).meta_gradient(tasks(FAR, FAR)),
        BlockError,
        "loss",
        "loss cross_entropy does not take what the model returns, a tuple",
    ),
    "class beyond the outputs": (
        lambda: learner_of(nn.Linear(2, 3), loss=F.cross_entropy).meta_gradient(tasks(FAR, FAR)),
        TaskError,
        "tasks",
        "Target 7 is out of bounds; the inputs are a Tensor [6, 2]",
    ),
    "inputs of another width": (
        lambda: meta(tasks(half(3, inputs=1))),
        TaskError,
        "tasks",
        "the inputs are a Tensor [6, 1]",
    ),
    "support and query that Reptile cannot join": (
        lambda: meta(tasks(half(3), half(3, inputs=1)), estimator=mb.Reptile()),
        TaskError,
        "examples",
        "joins support and query, whose tensors differ in form",
    ),
    "more steps than rates": (
        lambda: learner_of(rule=mb.lslr(0.1)).evaluate(tasks(), steps=2),
        BlockError,
        "steps",
        "take at most 1",
    ),
    "no tasks": (lambda: learner_of().meta_gradient([]), TaskError, "tasks", "an empty list"),
    "a tensor": (
        lambda: learner_of().evaluate(torch.ones(3)),
        TaskError,
        "tasks",
        "tasks is a Tensor",
    ),
    "a number": (lambda: learner_of().evaluate([1]), TaskError, "tasks", "tasks[0] is a int"),
    "a task": (
        lambda: learner_of().backward(tasks()[0]),
        TaskError,
        "tasks",
        "it takes a TaskBatch or a list of Task",
    ),
    "none": (lambda: learner_of().meta_gradient(None), TaskError, "tasks", "tasks is a NoneType"),
    "progress": (
        lambda: learner_of().backward(tasks(), progress=3),
        BlockError,
        "progress",
        "backward progress is 3; it takes a Progress",
    ),
    "a metric": (
        lambda: learner_of().evaluate(tasks(), metric="accuracy"),
        BlockError,
        "metric",
        "it takes a function",
    ),
    "steps": (
        lambda: learner_of().evaluate(tasks(), steps=1.5),
        BlockError,
        "steps",
        "evaluate steps is 1.5; it takes a whole number, 0 or more",
    ),
    "statistics": (
        lambda: learner_of().evaluate(tasks(), norm_statistics="bach"),
        BlockError,
        "norm_statistics",
        'did you mean "batch"? It takes "batch", "running" or "support"',
    ),
    "numbers of tasks": (
        lambda: mb.TaskBatch(half(3), half(2)),
        TaskError,
        "support",
        "one number of tasks",
    ),
    "index": (lambda: tasks()["a"], TaskError, "index", "it takes a whole number"),
    "place": (lambda: tasks().to("nope"), TaskError, "target", "target is 'nope'"),
    "stack": (lambda: mb.TaskBatch.stack([1]), TaskError, "tasks", "each a Task"),
    **{
        f"sample {split!r} {indices!r}": (
            lambda s=split, i=indices: mb.tasks.Sinusoid().sample(s, i),
            TaskError,
            field,
            message,
        )
        for split, indices, field, message in (
            ("train", 3, "indices", "it takes a list of task numbers, at least one"),
            ("train", [0.5], "indices", "indices is [0.5]"),
            ("train", [NAN], "indices", "indices is [nan]"),
            ("train", [True], "indices", "indices is [True]"),
            ("train", [-1], "indices", "they count from 0"),
            ("train", "1", "indices", "indices is '1'"),
            ("train", None, "indices", "indices is None"),
            ("trian", [0], "split", "it is one of train, validation, test"),
            (None, [0], "split", "unknown split None"),
        )
    },
    "device that is not here": (
        lambda: mb.train_maml(nn.Linear(2, 1), [tasks()], device="nope", progress=False),
        BlockError,
        "device",
        '"nope" is no device; it takes auto, cpu',
    ),
    "tasks of train_maml": (
        lambda: mb.train_maml(nn.Linear(2, 1), None, progress=False),
        TaskError,
        "tasks",
        "it takes a TaskSource, or an iterable of batches",
    ),
    "batch of train_maml": (
        lambda: mb.train_maml(nn.Linear(2, 1), [3], progress=False),
        TaskError,
        "tasks",
        "batch 1 of epoch 1 is a int",
    ),
    "memory": (
        lambda: mb.choose_executor(learner_of(), tasks(), memory="lots"),
        BlockError,
        "memory",
        "choose_executor memory is 'lots'; it takes bytes, or a size such as",
    ),
    "parameters to set up for": (
        lambda: mb.LearningRate(0.1).setup({"w": 3}, 1),
        RuleError,
        "params",
        "setup params is {'w': 3}; it takes a dict",
    ),
    "steps to set up for": (lambda: mb.lslr(0.1).setup(WEIGHTS, -1), RuleError, "steps", "is -1"),
    "state of a module": (
        lambda: mb.FunctionalModule(nn.Linear(2, 1))(None, torch.ones(1, 2)),
        ModuleError,
        "state",
        "Linear state is None; it takes a ModuleState",
    ),
}


@each_of(TASKS)
def test_bad_tasks_are_refused_by_name(call, kind, field, message):
    check_refusal(call, kind, field, message)


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace")])
def test_bytes_are_class_numbers_where_torch_takes_them_for_some(executor):
    torch.manual_seed(0)
    losses = []
    for dtype in (torch.int64, torch.uint8):
        torch.manual_seed(0)
        losses.append(labelled(dtype, executor).loss)
    assert torch.equal(*losses)
    with pytest.raises(ExecutorError, match=r"Vmap cannot run .* Use executor=Loop\(\)"):
        labelled(torch.uint8, mb.Vmap())
