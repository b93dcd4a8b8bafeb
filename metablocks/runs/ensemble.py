"""The best checkpoints as one predictor: their predictions on the query set, averaged.

    prediction = (1/k) Σᵢ fᵢ(query inputs),  fᵢ: checkpoint i, adapted to the support set

In classification the predictions are logits; accuracy and loss are those of the mean logits.
Source: Antoniou, Edwards, Storkey 2018, section 5: the 5 best epochs by validation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metablocks.executors import share_of
from metablocks.meta_steps import accuracy
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import Measure, Scores, from_losses, measure_of, pool, task_batches
from metablocks.tasks.base import Split


def ensemble_scores(
    experiment: Experiment,
    directory: RunDirectory,
    members: Sequence[int],
    split: Split,
    *,
    tasks: int | None = None,
    steps: int | None = None,
) -> Scores:
    """Scores of the checkpoints of these epochs as one predictor, on the fixed tasks of a split.

    `members` holds at least one epoch. Numbers of tasks and steps are the recipe's unless given.
    Leaves the last member's parameters in the experiment's learner.

    Law: an ensemble of one scores what its checkpoint scores after the last step.
    """
    plan = experiment.evaluation
    tasks = plan.tasks if tasks is None else tasks
    steps = plan.inner_steps if steps is None else steps
    total, targets = list[Tensor](), list[Tensor]()
    for epoch in members:
        member = directory.member(epoch)
        checkpoint.from_first(experiment, partial(checkpoint.restore_learner, member, experiment))
        predictions, targets = _predict(experiment, split, tasks, steps)
        added = zip(total, predictions, strict=True) if total else ()
        total = [a + b for a, b in added] or predictions
    mean, loss = [task / len(members) for task in total], experiment.learner.loss
    scores = score_predictions(mean, targets, split, measure_of(experiment.source), loss)
    return replace(scores, members=list(members), inner_steps=steps)


def score_predictions(
    predictions: Iterable[Tensor],
    targets: Iterable[Tensor],
    split: Split,
    measure: Measure,
    loss: Callable[[Any, Any], Tensor],
) -> Scores:
    """The statistics of tasks' `predictions` `[examples, ...]`, each list of one number.

    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [3.0, 0.0]]])
    >>> targets = torch.tensor([[0, 1], [0, 1]])
    >>> loss = torch.nn.functional.cross_entropy
    >>> score_predictions(logits, targets, "test", "accuracy", loss).mean
    [0.75]
    """
    pairs = list(zip(predictions, targets, strict=True))
    losses = torch.stack([loss(*pair) for pair in pairs]).double().unsqueeze(1)
    if measure != "accuracy":
        return pool(split, measure, from_losses(losses, measure), losses)
    hits = torch.stack([accuracy(*pair) for pair in pairs]).double().unsqueeze(1)
    return pool(split, measure, hits, losses)


def _predict(
    experiment: Experiment, split: Split, tasks: int, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Each task's predictions after the last step, and targets `[examples, ...]`, float64 on the CPU."""
    learner, batch = experiment.learner, experiment.tasks_per_step
    share = share_of(learner.executor)
    predictions, targets = list[Tensor](), list[Tensor]()
    for some in task_batches(experiment.source, split, tasks, batch, experiment.dtype, share):
        own = list[Tensor](), list[Tensor]()
        if some is not None:
            with experiment.precision():
                result = learner.evaluate(some, steps=steps)
            own[0].extend(task.cpu().double() for task in result.predictions)
            of_tasks = [some[number].query[1].cpu() for number in range(len(some))]
            own[1].extend(task.double() if task.is_floating_point() else task for task in of_tasks)
        for part in share.gather(own):
            predictions += part[0]
            targets += part[1]
    return predictions, targets
