"""The best checkpoints as one predictor: their predictions on the query set, averaged.

    prediction = (1/k) Σᵢ fᵢ(query inputs),  fᵢ: checkpoint i, adapted to the support set

In classification the predictions are logits; accuracy and loss are those of the mean logits.
Source: Antoniou, Edwards, Storkey 2018, section 5: the 5 best epochs by validation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import Measure, Scores, accuracy, summarise, task_batches
from metablocks.tasks.base import Split


@dataclass(frozen=True)
class EnsembleScores:
    """Scores of the mean prediction of several checkpoints, after the last inner step only.

    Each list of `scores` therefore holds one number, after `inner_steps` inner steps. `members` are
    the epochs of the checkpoints, the best first.
    """

    scores: Scores
    members: list[int]
    inner_steps: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values: those of the scores, `members` and `inner_steps`."""
        more = {"members": self.members, "inner_steps": self.inner_steps}
        return {**self.scores.as_dict(), **more}


def ensemble_scores(
    experiment: Experiment,
    directory: RunDirectory,
    members: Sequence[int],
    split: Split,
    *,
    tasks: int | None = None,
    steps: int | None = None,
) -> EnsembleScores:
    """Scores of the checkpoints of these epochs as one predictor, on the fixed tasks of a split.

    `members` holds at least one epoch. Numbers of tasks and steps are the recipe's unless given.
    Leaves the last member's parameters in the experiment's learner.

    Law: an ensemble of one scores what its checkpoint scores after the last step.
    """
    plan = experiment.evaluation
    tasks = plan.tasks if tasks is None else tasks
    steps = plan.inner_steps if steps is None else steps
    total, targets = torch.zeros(()), torch.zeros(())
    for epoch in members:
        checkpoint.restore_learner(directory.member(epoch), experiment)
        predictions, targets = _predict(experiment, split, tasks, steps)
        total = total + predictions
    measure: Measure = "accuracy" if experiment.kind == "classification" else "mse"
    mean = total / len(members)
    scores = score_predictions(mean, targets, split, measure, experiment.learner.loss)
    return EnsembleScores(scores, list(members), steps)


def score_predictions(
    predictions: Tensor,
    targets: Tensor,
    split: Split,
    measure: Measure,
    loss: Callable[[Any, Any], Tensor],
) -> Scores:
    """The statistics of `predictions` `[tasks, examples, ...]`, each list of one number.

    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [3.0, 0.0]]])
    >>> targets = torch.tensor([[0, 1], [0, 1]])
    >>> loss = torch.nn.functional.cross_entropy
    >>> score_predictions(logits, targets, "test", "accuracy", loss).mean
    [0.75]
    """
    pairs = list(zip(predictions, targets, strict=True))
    losses = torch.stack([loss(*pair) for pair in pairs]).double().unsqueeze(1)
    if measure == "mse":
        return summarise(split, measure, losses, losses)
    hits = torch.stack([accuracy(*pair) for pair in pairs]).double().unsqueeze(1)
    return summarise(split, measure, hits, losses)


def _predict(experiment: Experiment, split: Split, tasks: int, steps: int) -> tuple[Tensor, Tensor]:
    """Predictions after the last step, and targets: `[tasks, examples, ...]`, float64 on the CPU."""
    learner, batch = experiment.learner, experiment.tasks_per_step
    predictions, targets = [], []
    for some in task_batches(experiment.source, split, tasks, batch, experiment.dtype):
        with experiment.precision():
            result = learner.evaluate(some, steps=steps)
        predictions.append(result.predictions.cpu().double())
        targets.append(some.query[1].cpu())
    stacked = torch.cat(targets)
    return torch.cat(predictions), stacked.double() if stacked.is_floating_point() else stacked
