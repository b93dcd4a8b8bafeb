"""Training in Python: epochs of meta-steps, with validation, the best weights and callbacks.

    history = mb.fit(learner, tasks, optimizer=…, epochs=…, validation=…, metric=…)

`train_maml` trains by the same epochs. `metablocks run` takes the same meta-steps, from a recipe, and
keeps checkpoints to go on from.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from metablocks.checks import UNCHECKED, Count, Such, checked
from metablocks.errors import BlockError, concerning
from metablocks.executors import Share, share_of
from metablocks.learner import MetaGradient, MetaLearner, Metric
from metablocks.meta_steps import Nonfinite, meta_steps
from metablocks.processes import leads
from metablocks.tasks.base import Split, TaskSource
from metablocks.tasks.task_batches import check_tasks, epoch_batches, known_length
from metablocks.types import Progress, Tasks, Tensors

Schedule = Annotated[
    LRScheduler | None,
    Such(
        lambda schedule: not isinstance(schedule, ReduceLROnPlateau),
        "an LRScheduler whose step takes no number; ReduceLROnPlateau as one of the callbacks: "
        "lambda epoch: plateau.step(epoch.validation.losses[-1])",
    ),
]


class Validation(NamedTuple):
    """Means over the validation tasks, before adaptation and after each inner step: `[steps + 1]`.

    >>> import torch
    >>> import metablocks as mb
    >>> mb.Validation(losses=torch.tensor([0.9, 0.4]), scores=None).losses[-1]
    tensor(0.4000)
    """

    losses: Tensor
    """The query losses."""
    scores: Tensor | None
    """The metric, if one was given."""


@dataclass(frozen=True)
class Epoch:
    """A finished epoch of `fit`.

    >>> import metablocks as mb
    >>> mb.Epoch(number=1, loss=0.5, scores=None, validation=None, seconds=2.0).number
    1
    """

    number: int
    """Counted from 1."""
    loss: float
    """The mean over its meta-steps of the training loss."""
    scores: Tensor | None
    """`[steps + 1]`: the mean over the training tasks of the metric; nan where no query pass was made."""
    validation: Validation | None
    """The means over the validation tasks after the epoch; None without `validation`."""
    seconds: float
    """Its time, validation included."""

    @property
    def score(self) -> float:
        """The validation as one number, the larger the better: the metric, else minus the loss.

        After the last inner step; nan counts as minus infinity. Raises `BlockError` without a validation.
        """
        if self.validation is None:
            message = "the epoch has no validation to be scored by; give fit validation=…"
            raise BlockError(message, block="fit", field="validation")
        losses, scores = self.validation
        score = float(-losses[-1] if scores is None else scores[-1])
        return -math.inf if math.isnan(score) else score


@checked()
def fit(
    learner: MetaLearner,
    tasks: Annotated[TaskSource | Iterable[Any], UNCHECKED],
    *,
    optimizer: Optimizer,
    epochs: Count = 1,
    steps_per_epoch: Count | None = None,
    tasks_per_step: Count = 25,
    scheduler: Schedule = None,
    validation: Annotated[TaskSource | Iterable[Any] | None, UNCHECKED] = None,
    metric: Metric | None = None,
    keep_best: bool = False,
    callbacks: Sequence[Callable[[Epoch], Any]] = (),
    progress: bool = True,
) -> list[Epoch]:
    """Train a learner, in place, and return its epochs.

    - `tasks`: an iterable of batches of tasks, one a meta-step, such as a `DataLoader` (see
      `train_maml` for what a batch may be), or a `TaskSource`, of which each meta-step takes the next
      `tasks_per_step` tasks.
    - `optimizer`: over `learner.parameters()`, or some of them. `scheduler` takes a step after each
      epoch.
    - `epochs`: passes over `tasks`. `steps_per_epoch`: the most meta-steps of an epoch; needed with a
      source, or a generator that is to last several epochs.
    - `validation`: as `tasks`, evaluated after each epoch (the first 100 validation tasks of a source).
    - `metric`: `(prediction, target) -> score`, of training and validation tasks; the larger the
      better (give minus an error).
    - `keep_best`: at the end, however it comes, the learner has the weights of the best epoch by
      `Epoch.score`.
    - `callbacks`: functions that get each finished epoch; training stops if one returns True, of
      Python, NumPy or PyTorch.
    - `progress`: show a bar.

    With the executor `Distributed` all processes call this alike, and have equal epochs: of a source each
    samples its own tasks alone; an iterable gives each process its own batches, equally many (a
    `DataLoader` by a `DistributedSampler`); callbacks are to answer alike.

    What ends training early (Ctrl-C, an error) is raised as it is and carries the finished epochs:
    `stop.history`.

    Law: without `keep_best`, learner and losses are, bit for bit, those of the hand-written loop of
    `learner.backward`, `optimizer.step()` and `optimizer.zero_grad()`.

    >>> import torch
    >>> import metablocks as mb
    >>> learner = mb.MetaLearner(
    ...     torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)),
    ...     loss=torch.nn.functional.mse_loss,
    ...     steps=1,
    ...     rule=mb.LearningRate(0.01),
    ...     executor=mb.Vmap(),
    ... )
    >>> source = mb.tasks.Sinusoid(shots=5, queries=10)
    >>> optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    >>> best = []
    >>> def patient(epoch):                  # stop after three epochs without a better one
    ...     best.append(epoch.score)
    ...     return len(best) - best.index(max(best)) > 3
    >>> def save(epoch):
    ...     torch.save(learner.state_dict(), f"{folder}/epoch{epoch.number}.pt")
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = mb.fit(
    ...         learner, source, optimizer=optimizer, epochs=2, steps_per_epoch=3, validation=source,
    ...         keep_best=True, callbacks=[patient, save], progress=False,
    ...     )
    >>> [epoch.number for epoch in history], history[0].validation.losses.shape
    ([1, 2], torch.Size([2]))

    Raises `BlockError` for a value out of range, for `keep_best` without a validation and for an
    `optimizer` of nothing that the learner learns, `TaskError` for tasks of another structure,
    `RunError` if the loss or the meta-gradient is no longer finite (before it is applied), and what the
    learner raises.
    """
    if keep_best and validation is None:
        message = "fit keep_best is True, but there is no validation to judge by; give validation=…"
        raise BlockError(message, block="fit", field="keep_best")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, learner.parameters())):
        message = (
            "fit optimizer holds no parameter of the learner, which would learn nothing; make it of "
            "learner.parameters() (surgery on a model may have made a copy of it)"
        )
        raise BlockError(message, block="fit", field="optimizer")
    with concerning("fit", "tasks"):
        check_tasks(tasks, "train", epochs, steps_per_epoch, "steps_per_epoch")
    if validation is not None:
        with concerning("fit", "validation"):
            check_tasks(validation, "validation", epochs)
    history: list[Epoch] = []
    best: Tensors = {}
    try:
        for epoch in train_epochs(
            "fit",
            learner,
            optimizer,
            tasks,
            epochs=epochs,
            iterations=steps_per_epoch,
            tasks_per_step=tasks_per_step,
            validation=validation,
            metric=metric,
            judge=lambda _: metric,
            progress=progress,
        ):
            if scheduler is not None:
                scheduler.step()
            if keep_best and epoch.score > max((e.score for e in history), default=-math.inf):
                best = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
            history.append(epoch)
            answers = [callback(epoch) for callback in callbacks]
            if any(map(_is_true, answers)):
                break
    except BaseException as error:
        error.history = history  # type: ignore[attr-defined]
        raise
    finally:
        if best:
            learner.load_state_dict(best)
    return history


def train_epochs(
    name: str,
    learner: MetaLearner,
    optimizer: Optimizer,
    tasks: TaskSource | Iterable[Any],
    *,
    epochs: int,
    iterations: int | None,
    tasks_per_step: int,
    validation: TaskSource | Iterable[Any] | None,
    judge: Callable[[Tasks], Metric | None],
    progress_at: Callable[[int, int], Progress] = lambda epoch, index: Progress(epoch),
    take: Callable[[MetaGradient], object] = lambda result: None,
    nonfinite: Nonfinite = "stop",
    metric: Metric | None = None,
    progress: bool,
) -> Iterator[Epoch]:
    """Take the meta-steps of each epoch, evaluate, and yield it: the loop of `fit` and `train_maml`.

    `name` is the caller's, for errors. `progress_at` is asked before each meta-step, by the numbers from
    0 of its epoch and of its batch there; `take` gets each meta-gradient once its step is taken.
    `metric` is of training tasks, `judge` gives that of validation tasks.
    """
    like, taken, share = next(learner.model.parameters()), 0, share_of(learner.executor)
    length = known_length(tasks, iterations)

    def batches(of: TaskSource | Iterable[Any], split: Split, most: int | None) -> Iterator[Tasks]:
        with concerning(name, "tasks" if split == "train" else split):
            yield from epoch_batches(
                of,
                split,
                epoch=epoch,
                like=like,
                tasks_per_step=tasks_per_step,
                iterations=most,
                part=share.part,
            )

    total = epochs * length if length else None
    hidden = not (progress and leads())
    with tqdm(total=total, desc="meta-training", unit="step", disable=hidden) as bar:
        for epoch in range(epochs):
            started, losses, scores = time.perf_counter(), list[float](), list[Tensor]()
            drawn = enumerate(batches(tasks, "train", iterations))
            for result in meta_steps(
                learner,
                optimizer,
                ((batch, progress_at(epoch, index)) for index, batch in drawn),
                first=taken,
                nonfinite=nonfinite,
                indexed=isinstance(tasks, TaskSource),
                metric=metric,
            ):
                taken += 1
                losses.append(float(result.loss))
                if result.scores is not None:
                    scores.append(_of_all([result.scores], share))
                take(result)
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            judged = None
            if validation is not None:
                judged = _validate(learner, batches(validation, "validation", None), judge)
            yield Epoch(
                epoch + 1,
                sum(losses) / len(losses),
                torch.cat(scores).nanmean(0) if scores else None,
                judged,
                time.perf_counter() - started,
            )


def _validate(
    learner: MetaLearner,
    batches: Iterable[Tasks],
    judge: Callable[[Tasks], Metric | None],
) -> Validation:
    """Means over the tasks of all batches."""
    share = share_of(learner.executor)
    results = [learner.evaluate(tasks, metric=judge(tasks)) for tasks in batches if len(tasks)]
    losses = _of_all([result.query_losses for result in results], share)
    scores = _of_all([result.metrics for result in results if result.metrics is not None], share)
    return Validation(losses.mean(0), scores.mean(0) if len(scores) else None)


def _of_all(rows: list[Tensor], share: Share) -> Tensor:
    """Results by task, of all processes: `[tasks, ...]`; empty without any."""
    if share.processes > 1:
        rows = [row for own in share.gather([row.cpu() for row in rows]) for row in own]
    return torch.cat(rows) if rows else torch.empty(0)


def _is_true(answer: Any) -> bool:
    """True for a True, whether of Python, NumPy or PyTorch; a count, say, is not an answer."""
    kind = getattr(answer, "dtype", type(answer))
    return kind in (bool, np.dtype(bool), torch.bool) and bool(answer)
