"""Laws of estimators: of every one, and of those that claim the exact gradient."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metablocks.errors import GradientError, LawError
from metablocks.estimators import Estimator
from metablocks.laws import gradients
from metablocks.laws.cases import Problem
from metablocks.order import FirstOrder
from metablocks.types import Progress


def names_what_is_idle(estimator: Estimator, problem: Problem) -> None:
    """Law 16: a meta-parameter that no loss depends on is named in an error, and no other is."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = problem.model()
            like = next(self.used.parameters())
            self.idle = nn.Parameter(torch.ones(2).to(like))

        def forward(self, inputs: Any) -> Any:
            return self.used(inputs)

    learner = replace(problem, model=Idle, adapt="*").learner(estimator=estimator)
    try:
        learner.meta_gradient(problem.tasks)
    except GradientError as error:
        names = [n for n, p in learner.named_parameters() if p.requires_grad and n in str(error)]
        if names != ["model.idle"]:
            raise LawError(f"names what is idle: {names}, expected model.idle") from error
    else:
        raise LawError(
            "names what is idle: the loss does not depend on model.idle; no error said so"
        )


def equals_unrolled(
    estimator: Estimator, problem: Problem, *, progress: Progress | None = None, **blocks: Any
) -> None:
    """Law 8: an exact estimator gives `Unrolled`'s loss, gradient and buffers, from the same draws."""
    make, own = gradients.moved_learner, [estimator]
    gradients.alike(problem, make, executors=(), estimators=own, progress=progress, **blocks)


def closed_form(estimator: Estimator, problem: Problem, *, rate: float = 0.1) -> None:
    """Law 6: on `Case(kind="quadratic")` an exact gradient is Π(I − αA) …, to both orders."""
    gradients.quadratic(problem, rate=rate, estimator=estimator)
    first = FirstOrder()
    gradients.quadratic(problem, rate=rate, order_two=False, order=first, estimator=estimator)
