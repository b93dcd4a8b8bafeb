"""The training loop: tasks in, meta-gradient, optimiser step; and the accuracy that judges it.

    for each meta-step: tasks → learner.backward → finite? → clip → optimizer.step

`metablocks run` and `train_maml` train by it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from metablocks.errors import RunError
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.types import Progress, Tasks


def fit(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tasks, Progress]],
    *,
    clip: Callable[[], object] | None = None,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    first: int = 0,
) -> Iterator[MetaGradient]:
    """Take a meta-step for each of `batches`, and yield its meta-gradient once it is taken.

    A batch is asked for when the meta-step before it is taken: an iterator may step a schedule.
    `clip` changes the gradients in place. `precision` is the context of the backward pass. `first` is
    the number of the first meta-step, counted from 0, for messages. Gradients are cleared at the end,
    however it comes.

    Raises `RunError`, before a parameter moves, if the loss or the meta-gradient is not finite;
    clipping does not mend that.

    Law: the hand-written loop of `learner.backward`, `optimizer.step()` and `optimizer.zero_grad()`,
    bit for bit.

    >>> from metablocks.rules import LearningRate
    >>> from metablocks.types import TaskBatch
    >>> model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> learner = MetaLearner(model, loss=loss, steps=1, rule=LearningRate(0.1))
    >>> x = torch.ones(2, 3, 1)
    >>> batches = [(TaskBatch((x, x), (x, x)), Progress())] * 2
    >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    >>> one, two = (float(result.loss) for result in fit(learner, optimizer, batches))
    >>> two < one
    True
    """
    optimizer.zero_grad()
    try:
        for number, (tasks, progress) in enumerate(batches, first + 1):
            with precision():
                result = learner.backward(tasks, progress=progress)
            if result.nonfinite:
                raise RunError(
                    f"the {result.nonfinite} at meta-step {number}, which was not taken: training "
                    "diverged, or the data is not finite. A lower inner or outer learning rate, or "
                    "fewer inner steps, usually helps"
                )
            if clip:
                clip()
            optimizer.step()
            optimizer.zero_grad()
            yield result
    finally:
        optimizer.zero_grad()


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of targets with the largest logit: `[n, classes, ...]`, `[n, ...]` → scalar.

    As in `cross_entropy`, classes are dimension 1; without examples, `[classes]` and `[]`, 0.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    hits = prediction.argmax(min(1, target.ndim)) == target
    return hits.to(torch.get_default_dtype()).mean()
