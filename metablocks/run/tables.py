"""Scores as text: the tables that `run` and `eval` print."""

from torch.nn.modules.batchnorm import _BatchNorm

from metablocks.models import PerStepBatchNorm
from metablocks.recipe import Experiment
from metablocks.run.ensemble import EnsembleScores
from metablocks.run.scores import Scores

TRANSDUCTIVE = "transductive: batch norm uses the statistics of the query set it predicts on"


def tables(experiment: Experiment, *results: Scores | EnsembleScores | None) -> str:
    """A table for each result that there is, and how the predictions are meant."""
    lines: list[str] = []
    for result in results:
        if isinstance(result, Scores):
            lines += _each_step(experiment, result)
        elif result:
            lines += _last_step(experiment, result)
    if transductive(experiment):
        lines.append(f"  {TRANSDUCTIVE}")
    return "\n".join(lines)


def _each_step(experiment: Experiment, scores: Scores) -> list[str]:
    steps = range(len(scores.mean))
    rows = [_row(scores, step, step) for step in steps]
    marks = ["  (as trained)" * (step == experiment.learner.steps) for step in steps]
    return [_title(scores), *_aligned([_head(scores), *rows], ["", *marks])]


def _last_step(experiment: Experiment, ensemble: EnsembleScores) -> list[str]:
    """Who the members of an ensemble are, and what they score together."""
    scores, count = ensemble.scores, len(ensemble.members)
    asked = experiment.evaluation.ensemble
    best = "best validation checkpoint" if count == 1 else f"{count} best validation checkpoints"
    what = "logits" if scores.measure == "accuracy" else "predictions"
    epochs = f"epoch{'s' * (count != 1)} {', '.join(map(str, ensemble.members))}"
    few = f"; {asked} asked for, {count} validated" if count < asked else ""
    return [
        f"ensemble of the {best}: mean {what} ({epochs}{few})",
        _title(scores),
        *_aligned([_head(scores), _row(scores, 0, ensemble.inner_steps)], ["", ""]),
    ]


def _title(scores: Scores) -> str:
    return f"{scores.split}, {scores.tasks} tasks: mean ± 95 % confidence interval over tasks"


def _head(scores: Scores) -> list[str]:
    if scores.measure == "accuracy":
        return ["inner steps", "query accuracy", "std", "worst 10 %", "query loss"]
    return ["inner steps", "query MSE", "std", "worst 10 %"]


def _row(scores: Scores, index: int, steps: int) -> list[str]:
    loss = [f"{scores.loss[index]:.4f}"] * (scores.measure == "accuracy")
    return [str(steps), scores.text(index), *scores.spread_text(index), *loss]


def _aligned(rows: list[list[str]], marks: list[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {'  '.join(f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True))}{mark}"
        for row, mark in zip(rows, marks, strict=True)
    ]


def transductive(experiment: Experiment) -> bool:
    """Whether a batch norm predicts on the query set by the query set's own statistics."""
    return any(
        isinstance(module, _BatchNorm)
        or (isinstance(module, PerStepBatchNorm) and not module.keeps_statistics)
        for module in experiment.learner.model.modules()
    )
