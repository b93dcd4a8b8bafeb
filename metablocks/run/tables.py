"""Scores as text: the tables that `run` and `eval` print."""

from torch import nn

from metablocks.recipe import Experiment
from metablocks.run.scores import Scores


def table(experiment: Experiment, scores: Scores) -> str:
    """The scores after each inner step, a line each."""
    rows = [_row(scores, index, str(index)) for index in range(len(scores.mean))]
    marks = ["  (as trained)" * (step == experiment.learner.steps) for step in range(len(rows))]
    head = f"{scores.split}, {scores.tasks} tasks: mean ± 95 % confidence interval over tasks"
    lines = [head, *_aligned([_head(scores), *rows], ["", *marks])]
    if _has_norm(experiment):
        lines.append(
            "  transductive: batch norm uses the statistics of the query set it predicts on"
        )
    return "\n".join(lines)


def _head(scores: Scores) -> list[str]:
    if scores.measure == "accuracy":
        return ["inner steps", "query accuracy", "std", "worst 10 %", "query loss"]
    return ["inner steps", "query MSE", "std", "worst 10 %"]


def _row(scores: Scores, index: int, steps: str) -> list[str]:
    loss = [f"{scores.loss[index]:.4f}"] * (scores.measure == "accuracy")
    return [steps, scores.text(index), *scores.spread_text(index), *loss]


def _aligned(rows: list[list[str]], marks: list[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {'  '.join(f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True))}{mark}"
        for row, mark in zip(rows, marks, strict=True)
    ]


def _has_norm(experiment: Experiment) -> bool:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(module, norms) for module in experiment.learner.model.modules())
