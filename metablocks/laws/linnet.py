"""Laws of collapse: what linear layers appended to a model do, and what they leave as it is."""

import torch

from metablocks.errors import LawError
from metablocks.laws.problem import Problem, hold, relative_error, tolerance
from metablocks.learner import MetaLearner
from metablocks.models.linnet import collapse_linear
from metablocks.rules import LearningRate
from metablocks.types import Tensors


def collapse_keeps_the_function(problem: Problem) -> None:
    """Law 10: a model with appended layers (`problem.model`) and its collapsed form are one function.

    In `train()` and in `eval()`, on every input of the problem's tasks.
    """
    deep = problem.model()
    flat = collapse_linear(deep)
    for training in (True, False):
        got = _outputs(problem, flat.train(training))
        expected = _outputs(problem, deep.train(training))
        hold("collapse keeps the function", got, expected, tolerance(problem, float64=1e-12))


def collapse_after_adaptation(
    problem: Problem, *, rate: float = 0.1, apart: float = 1e-3, adapt: str = "*"
) -> None:
    """Law 10: adapted and then collapsed is adapted; collapsed and then adapted is something else.

    `problem.model` makes a model with appended layers. The predictions on the query sets must agree
    in the one case, and differ by more than `apart`, relatively, in the other.
    """
    within = tolerance(problem, float64=1e-12)
    deep, flat = problem.model(), collapse_linear(problem.model())
    expected, after, before = {}, {}, {}
    for index in range(len(problem.tasks)):
        task = problem.tasks[index]
        inputs = task.query[0]
        learner = problem.learner(LearningRate(rate), adapt=adapt)
        with torch.no_grad():
            adapted = learner.adapt(task.support)
            expected[f"task {index}"] = adapted(inputs)
            after[f"task {index}"] = collapse_linear(adapted)(inputs)
            plain = MetaLearner(
                flat, loss=problem.loss, steps=problem.steps, rule=LearningRate(rate), adapt=adapt
            )
            before[f"task {index}"] = plain.adapt(task.support)(inputs)
    hold("collapse after adaptation", after, expected, within)
    hold("collapse leaves the model", dict(deep.named_parameters()), _parameters(problem), 0)
    error = relative_error(before, expected)
    if not error > apart:
        raise LawError(
            f"collapse before adaptation: the adapted functions differ by {error:.2e} only; more "
            f"than {apart:.0e} was due"
        )


def _outputs(problem: Problem, model: torch.nn.Module) -> Tensors:
    sides = {"support": problem.tasks.support[0], "query": problem.tasks.query[0]}
    with torch.no_grad():
        return {
            f"{side} {index}": model(inputs[index])
            for side, inputs in sides.items()
            for index in range(len(problem.tasks))
        }


def _parameters(problem: Problem) -> Tensors:
    return dict(problem.model().named_parameters())
