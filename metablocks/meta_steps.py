"""The training loop: tasks in, meta-gradient, optimiser step; and the accuracy that judges it.

    for each meta-step: tasks → learner.backward → finite? → clip → optimizer.step

`metablocks run` and `train_maml` train by it.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from metablocks.errors import NonfiniteError
from metablocks.executors import Loop, share_of
from metablocks.learner import MetaGradient, MetaLearner, Metric
from metablocks.per_step import collected_buffers
from metablocks.types import Progress, Task, TaskBatch, Tasks

Nonfinite = Literal["stop", "skip"]

_log = logging.getLogger(__name__)


def meta_steps(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tasks, Progress]],
    *,
    clip: Callable[[], object] | None = None,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    first: int = 0,
    nonfinite: Nonfinite = "stop",
    indexed: bool = False,
    metric: Metric | None = None,
) -> Iterator[MetaGradient]:
    """Take a meta-step for each of `batches`, and yield its meta-gradient once it is taken.

    A batch is asked for when the meta-step before it is taken: an iterator may step a schedule.
    `clip` changes the gradients in place. `precision` is the context of the backward pass. `first` is
    the number of the first meta-step, counted from 0, for messages. `metric` is for `backward`.
    Gradients are cleared at the end, however it comes.

    If the loss or the meta-gradient is not finite, `nonfinite="stop"` raises `NonfiniteError` before a
    parameter or buffer moves; clipping does not mend that. `"skip"` leaves them as they are, logs the
    same message, and yields the meta-gradient as `skipped`. The message names meta-step, parameters
    and tasks, each taken by itself: by their place in the batch, or if the batches are `indexed`
    by their index in a source, of which meta-step n takes the next.

    Law: the hand-written loop of `learner.backward`, `optimizer.step()` and `optimizer.zero_grad()`,
    bit for bit.

    >>> from metablocks.rules import LearningRate
    >>> from metablocks.types import TaskBatch
    >>> model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> learner = MetaLearner(model, loss=loss, steps=1, rule=LearningRate(0.1))
    >>> x = torch.ones(2, 3, 1)
    >>> batches = [(TaskBatch((x, x), (x, x)), Progress())] * 2
    >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    >>> one, two = (float(result.loss) for result in meta_steps(learner, optimizer, batches))
    >>> two < one
    True
    """
    optimizer.zero_grad()
    try:
        for number, (tasks, progress) in enumerate(batches, first + 1):
            model = learner.model
            collected = {n: model.get_buffer(n).clone() for n in collected_buffers(model)}
            with precision():
                result = learner.backward(tasks, progress=progress, metric=metric)
            if problem := result.nonfinite:
                for name, before in collected.items():
                    model.get_buffer(name).copy_(before)
                with precision():
                    places = alone_nonfinite(learner, tasks, progress)
                share = share_of(learner.executor)
                first_task, count = share.place(len(tasks), len(tasks))
                first_task += (number - 1) * int(count) if indexed else 0
                named = share.gather([first_task + place for place in places])
                where = _where(result, [*chain(*named)], indexed=indexed)
                message = f"the {problem} at meta-step {number}, which was not taken ({where})"
                if nonfinite == "stop":
                    raise NonfiniteError(
                        f"{message}: training diverged, or the data is not finite. A lower inner or "
                        "outer learning rate, or fewer inner steps, usually helps",
                        number,
                    )
                _log.warning("%s", message)
                result = result._replace(skipped=True)
            else:
                if clip:
                    clip()
                optimizer.step()
            optimizer.zero_grad()
            yield result
    finally:
        optimizer.zero_grad()


def alone_nonfinite(learner: MetaLearner, tasks: Tasks, progress: Progress) -> list[int]:
    """The places of tasks whose loss or meta-gradient is not finite if each is taken by itself.

    A model that draws at random draws anew for each.
    """
    alone = copy.copy(learner)  # the same parameters
    alone.executor = Loop()
    return [
        place
        for place in range(len(tasks))
        if alone.meta_gradient(single(tasks, place), progress=progress).nonfinite
    ]


def single(tasks: Tasks, place: int) -> Tasks:
    """One task of a batch, as a batch.

    >>> x = torch.zeros(3, 5, 1)
    >>> len(single(TaskBatch((x, x), (x, x)), 2))
    1
    """
    task: Task = tasks[place]
    return TaskBatch.stack([task]) if isinstance(tasks, TaskBatch) else [task]


def nonfinite_names(result: MetaGradient) -> str:
    """The parameters whose meta-gradient is not finite: the first three, and how many more."""
    return _some(
        [name for name, g in result.grads.items() if not nn.utils.get_total_norm([g]).isfinite()]
    )


def _where(result: MetaGradient, tasks: list[int], *, indexed: bool) -> str:
    names = nonfinite_names(result)
    gradients = f"not finite: the gradient of {names}" if names else "every gradient is finite"
    place = "by its index in the source" if indexed else "by its place in the batch"
    if not tasks:
        return f"{gradients}; each task by itself is finite"
    return f"{gradients}; by itself, too, task {_some(tasks)}, {place}"


def _some(items: list[str] | list[int]) -> str:
    shown = ", ".join(map(str, items[:3]))
    return shown + f" and {len(items) - 3} more" * (len(items) > 3)


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of targets with the largest logit: `[n, classes, ...]`, `[n, ...]` → scalar.

    As in `cross_entropy`, classes are dimension 1; without examples, `[classes]` and `[]`, 0.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    hits = prediction.argmax(min(1, target.ndim)) == target
    return hits.to(torch.get_default_dtype()).mean()
