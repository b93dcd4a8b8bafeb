"""One call that trains MAML, FOMAML or MAML++, for a first use; the blocks stay within reach.

    learner, history = train_maml(model, tasks, first_order=…, plus_plus=…)

It trains a `MetaLearner` by Adam in the epochs of `fit`. Whoever needs another optimiser, rule or
schedule takes `fit`, writes that loop (README), or a recipe.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR

from metablocks.checks import UNCHECKED, Count, Positive, checked
from metablocks.devices import find_device
from metablocks.errors import BlockError, ExecutorError, TaskError, concerning
from metablocks.executors import Executor, Loop, TaskFunction, TaskWork, Vmap
from metablocks.fit import train_epochs
from metablocks.generators import set_states
from metablocks.learner import MetaGradient, MetaLearner, Metric
from metablocks.meta_steps import Nonfinite, accuracy
from metablocks.models import norm_patterns, per_step_batch_norm
from metablocks.order import AnnealedOrder, FirstOrder, Order, SecondOrder
from metablocks.rules import LearningRate, lslr
from metablocks.step_loss import AnnealedStepLoss, FinalStepLoss
from metablocks.tasks.base import TaskSource
from metablocks.tasks.task_batches import check_tasks, known_length
from metablocks.types import Progress, TaskBatch, Tasks, Tensors

log = logging.getLogger("metablocks")


@dataclass(frozen=True)
class History:
    """Losses, rates and times of a training."""

    losses: list[float] = field(default_factory=list)
    """Per meta-step, a skipped one too: the mean over tasks of the weighted query loss."""
    outer_lrs: list[float] = field(default_factory=list)
    """Per meta-step: the rate of the outer optimiser."""
    validation_losses: list[float] = field(default_factory=list)
    """Per epoch: the mean over validation tasks of the query loss after the last inner step."""
    validation_accuracies: list[float] = field(default_factory=list)
    """The same for the share of right answers; empty unless the default cross-entropy is the loss."""
    seconds: list[float] = field(default_factory=list)
    """Per epoch: its time, validation included."""


class TrainedMAML(NamedTuple):
    """The result of `train_maml`."""

    learner: MetaLearner
    history: History


@checked()
def train_maml(
    model: nn.Module,
    tasks: Annotated[TaskSource | Iterable[Any], UNCHECKED],
    *,
    inner_lr: Positive = 0.01,
    outer_lr: Positive = 0.001,
    inner_steps: Count = 5,
    first_order: bool = False,
    plus_plus: bool = False,
    loss: Callable[..., Tensor] | None = None,
    support_loss: Callable[..., Tensor] | None = None,
    adapt: str | Sequence[str] = "*",
    epochs: Count = 1,
    iterations: Count | None = None,
    tasks_per_step: Count = 25,
    validation: Annotated[TaskSource | Iterable[Any] | None, UNCHECKED] = None,
    executor: Executor | None = None,
    nonfinite: Nonfinite = "stop",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TrainedMAML:
    """Train MAML with Adam; `first_order=True` makes it FOMAML, `plus_plus=True` MAML++.

    - `tasks`: an iterable of batches of tasks, one a meta-step, or a `TaskSource`, of which each
      meta-step takes the next `tasks_per_step` tasks. A batch is a `TaskBatch`; a pair
      `(support, query)` or a dict with these keys, each a pair `(inputs, target)` of tensors
      `[tasks, examples, ...]`, tuples or lists (what a `DataLoader` makes of a data set of
      `(support, query)`); or a list of `Task`, of unequal size if need be (a `DataLoader` of `Task`
      with `collate_fn=list`). Tensors are moved to the model's device, and those of floats to its
      dtype.
    - `inner_lr`, `outer_lr`: α of the inner loop and the rate of Adam. `adapt`: see `MetaLearner`.
    - `loss`: `(prediction, target) -> scalar`; by default `default_loss`, which is cross-entropy
      if the target holds integers, and the mean squared error if it holds floats. `support_loss`: what
      the inner steps descend, `loss` unless given. For both see `MetaLearner`.
    - `epochs`: passes over `tasks`. `iterations`: the most meta-steps of an epoch; needed with a
      source, or a generator that is to last several epochs.
    - `validation`: as `tasks`, evaluated after each epoch (the first 100 validation tasks of a source).
    - `executor`: by default `Vmap()`, and `Loop()` for tasks of unequal size and for a model or loss
      that vmap cannot run (which is logged once). `Distributed(Vmap())` divides the tasks over
      processes, as in `fit`.
    - `nonfinite`: `"stop"` raises if the loss or the meta-gradient is not finite, `"skip"` leaves such
      a meta-step out, with a warning in the log.
    - `device`: where to train; the model is moved there. `progress`: show a bar.

    MAML++ is made of learned rates per tensor and step that start at `inner_lr` (`lslr`), step losses
    annealed over the first 10 epochs, or all if they are fewer (`AnnealedStepLoss`), first-order
    gradients in the first 50 epochs, or the first half of them if they are fewer than 100
    (`AnnealedOrder`), a cosine from `outer_lr` to a hundredth of it over the epochs, and, where the
    model has batch norms, `per_step_batch_norm`, whose γ and β the outer loop alone learns. More
    steps than trained go on with the last step's. Deviations:
    (1) A single epoch anneals the step losses and the outer rate in ten equal parts, each standing
        for an epoch, if its length is known (`iterations`, `len(tasks)`); else they stay as they
        start. It is second-order throughout.
    (2) With `first_order=True` every epoch is first-order.

    The model is trained in place and is `learner.model`, except that MAML++ replaces batch norms in
    a copy of it: then use `learner.model`. What ends training early (Ctrl-C, an error) is raised as
    it is and carries all that was learned so far: `except KeyboardInterrupt as stop:
    learner, history = stop.trained`.

    Law: learner and losses are, bit for bit, those of the hand-written loop of `learner.backward`,
    `optimizer.step()` and `optimizer.zero_grad()` over a `MetaLearner` of these blocks.

    Source: Finn, Abbeel, Levine 2017; Antoniou, Edwards, Storkey 2018 (MAML++).

    >>> import torch
    >>> import metablocks as mb
    >>> source = mb.tasks.Sinusoid(shots=5, queries=10)
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
    >>> learner, history = mb.train_maml(model, source, iterations=3, progress=False)
    >>> len(history.losses), learner.model is model
    (3, True)
    >>> task = source.sample("test", [0])[0]
    >>> learner.adapt(task.support)(task.query[0]).shape
    torch.Size([10, 1])

    Raises `BlockError` for a value out of range, `TaskError` for tasks of another structure (with the
    number of the batch), for none, and for a generator that is used up, `RunError` if the loss or
    the meta-gradient is no longer finite (before it is applied), naming meta-step, tasks and
    parameters, and what `MetaLearner` raises.
    """
    with concerning("train_maml", "tasks"):
        check_tasks(tasks, "train", epochs, iterations)
        if validation is not None:
            check_tasks(validation, "validation", epochs)
    if device is not None:
        try:
            for part in (model, loss, support_loss):
                if isinstance(part, nn.Module):
                    part.to(find_device(str(device)))
        except ValueError as error:
            raise BlockError(
                f"train_maml device: {error}", block="train_maml", field="device"
            ) from None
    if plus_plus:
        model, adapt = _per_step_norms(model, inner_steps, adapt)
    length = known_length(tasks, iterations)
    in_parts = epochs == 1 and length is not None  # a single epoch anneals in parts of itself
    parts = 10 if in_parts else epochs
    learner = MetaLearner(
        model,
        loss=loss or default_loss,
        support_loss=support_loss,
        steps=inner_steps,
        rule=lslr(inner_lr, beyond="last") if plus_plus else LearningRate(inner_lr),
        order=_order(first_order, plus_plus, epochs),
        step_loss=AnnealedStepLoss(epochs=min(parts, 10)) if plus_plus else FinalStepLoss(),
        adapt=adapt,
        executor=executor or VmapOrLoop(),
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=outer_lr)
    cosine = CosineAnnealingLR(optimizer, parts, outer_lr / 100) if plus_plus else None
    history = History()

    def progress_at(epoch: int, index: int) -> Progress:
        """The progress of a meta-step, to which the outer rate is brought first."""
        part = parts * min(index, length) / length if in_parts and length else epoch
        while cosine and cosine.last_epoch + 1 <= part:
            cosine.step()
        return Progress(epoch=part)

    def judge(batch: Tasks) -> Metric | None:
        target = batch[0].query[1]
        classes = isinstance(target, Tensor) and not target.is_floating_point()
        return accuracy if classes and learner.loss is default_loss else None

    def take(result: MetaGradient) -> None:
        history.losses.append(float(result.loss))
        history.outer_lrs.append(float(optimizer.param_groups[0]["lr"]))

    try:
        for done in train_epochs(
            "train_maml",
            learner,
            optimizer,
            tasks,
            epochs=epochs,
            iterations=iterations,
            tasks_per_step=tasks_per_step,
            validation=validation,
            judge=judge,
            progress_at=progress_at,
            take=take,
            nonfinite=nonfinite,
            progress=progress,
        ):
            if done.validation is not None:
                losses, scores = done.validation
                history.validation_losses.append(float(losses[-1]))
                if scores is not None:
                    history.validation_accuracies.append(float(scores[-1]))
            history.seconds.append(done.seconds)
    except BaseException as error:
        error.trained = TrainedMAML(learner, history)  # type: ignore[attr-defined]
        raise
    return TrainedMAML(learner, history)


def default_loss(prediction: Any, target: Any) -> Tensor:
    """Cross-entropy if the target holds integers, the mean squared error if it holds floats.

    Shapes: prediction `[examples, classes, ...]` with target `[examples, ...]`, or two equal ones.

    >>> default_loss(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
    tensor(0.6931)
    >>> default_loss(torch.zeros(4, 1), torch.ones(4, 1))
    tensor(1.)

    Raises `TaskError` if prediction or target is not one tensor, and for floats of unequal shape,
    which would be broadcast.
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        raise TaskError(
            f"the prediction is a {type(prediction).__name__}, the target a {type(target).__name__}; "
            "the default loss compares two tensors: give a loss=… of your own"
        )
    if not target.is_floating_point():
        return F.cross_entropy(prediction, target.long())
    if prediction.shape != target.shape:
        raise TaskError(
            f"the prediction has shape {list(prediction.shape)}, the target {list(target.shape)}; "
            "the mean squared error takes equal shapes: reshape the target, or give a loss=… of your "
            "own (class numbers are integers: target.long())"
        )
    return F.mse_loss(prediction, target)


@dataclass
class VmapOrLoop:
    """`Vmap()` for a `TaskBatch` of a model that vmap can run, else `Loop()`.

    A list of tasks may be of unequal size. What vmap refuses is logged once; `Loop()` runs it from then
    on.
    """

    _vmap_runs: bool = field(default=True, init=False, repr=False, compare=False)

    def __call__(
        self, fn: TaskFunction, shared: Any, buffers: Tensors, tasks: Tasks
    ) -> tuple[Any, Any]:
        if not self._vmap_runs or not isinstance(tasks, TaskBatch):
            return Loop()(fn, shared, buffers, tasks)
        states = fn.draws.states() if isinstance(fn, TaskWork) else []
        try:
            return Vmap()(fn, shared, buffers, tasks)
        except ExecutorError as error:
            self._vmap_runs = False
            log.warning("training goes on with Loop(): %s", error)
            set_states(states)
            return Loop()(fn, shared, buffers, tasks)


def _per_step_norms(
    model: nn.Module, steps: int, adapt: str | Sequence[str]
) -> tuple[nn.Module, list[str]]:
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        model = per_step_batch_norm(model, steps, beyond="last")
    patterns = [adapt] if isinstance(adapt, str) else list(adapt)
    return model, [*patterns, *norm_patterns(model)[1:]]


def _order(first_order: bool, plus_plus: bool, epochs: int) -> Order:
    if first_order:
        return FirstOrder()
    return AnnealedOrder(first_order_epochs=min(epochs // 2, 50)) if plus_plus else SecondOrder()
