"""The best checkpoints as one predictor: their predictions on the query set, averaged.

    prediction = (1/k) Σᵢ fᵢ(query inputs),  fᵢ: checkpoint i, adapted to the support set

In classification the predictions are logits; accuracy and loss are those of the mean logits.
Source: Antoniou, Edwards, Storkey 2018, section 5: the 5 best epochs by validation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metablocks.executors import share_of
from metablocks.meta_steps import accuracy
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import Measure, Scores, from_losses, measure_of, score_by
from metablocks.tasks.base import Split
from metablocks.types import Tasks


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
    plan, source, learner = experiment.evaluation, experiment.source, experiment.learner
    tasks = plan.tasks if tasks is None else tasks
    steps = plan.inner_steps if steps is None else steps
    states = []
    for epoch in members:
        member = directory.member(epoch)
        checkpoint.from_first(experiment, checkpoint.restore_learner, member, experiment)
        states.append({name: tensor.clone() for name, tensor in learner.state_dict().items()})

    def judge(part: Tasks) -> tuple[Tensor, Tensor]:
        each = []
        for state in states:
            learner.load_state_dict(state)
            with experiment.precision():
                result = learner.evaluate(part, steps=steps)
            each.append([task.cpu().double() for task in result.predictions])
        mean = [sum(task) / len(states) for task in zip(*each, strict=True)]
        targets = [part[number].query[1].cpu() for number in range(len(part))]
        exact = [task.double() if task.is_floating_point() else task for task in targets]
        return score_predictions(mean, exact, measure_of(source), learner.loss)

    share, batch = share_of(learner.executor), experiment.tasks_per_step
    scores = score_by(judge, source, split, tasks, batch, experiment.dtype, share)
    return replace(scores, members=list(members), inner_steps=steps)


def score_predictions(
    predictions: Iterable[Tensor],
    targets: Iterable[Tensor],
    measure: Measure,
    loss: Callable[[Any, Any], Tensor],
) -> tuple[Tensor, Tensor]:
    """Scores and losses `[tasks, 1]` of tasks' `predictions` `[examples, ...]`.

    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [3.0, 0.0]]])
    >>> targets = torch.tensor([[0, 1], [0, 1]])
    >>> loss = torch.nn.functional.cross_entropy
    >>> score_predictions(logits, targets, "accuracy", loss)[0].tolist()
    [[1.0], [0.5]]
    """
    pairs = list(zip(predictions, targets, strict=True))
    losses = torch.stack([loss(*pair) for pair in pairs]).double().unsqueeze(1)
    if measure != "accuracy":
        return from_losses(losses, measure), losses
    return torch.stack([accuracy(*pair) for pair in pairs]).double().unsqueeze(1), losses
