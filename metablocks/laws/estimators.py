"""Laws of the estimators that do not look through the inner loop: Reptile and the implicit gradient."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metablocks.errors import LawError
from metablocks.estimators import Implicit, Reptile
from metablocks.laws.problem import Problem, hold, parameters, relative_error, tolerance
from metablocks.learner import MetaLearner
from metablocks.rules import LearningRate
from metablocks.types import Tensors


def reptile_is_joint_training(problem: Problem, *, rate: float = 0.1, **blocks: Any) -> None:
    """Law 12: Reptile with one step of rate α is α times the gradient of the loss on the examples.

    The examples of a task are its support and query set together.
    """
    learner = problem.learner(LearningRate(rate), estimator=Reptile(), steps=1, **blocks)
    expected: Tensors = {}
    for index in range(len(problem.tasks)):
        task = problem.tasks[index]
        joined = [torch.cat(pair) for pair in zip(task.support, task.query, strict=True)]
        for name, grad in _gradient(problem, problem.model(), joined).items():
            expected[name] = expected.get(name, 0) + rate * grad / len(problem.tasks)
    got = learner.meta_gradient(problem.tasks).grads
    hold("Reptile in one step", got, expected, tolerance(problem, float64=1e-12))


def reptile_is_interpolation(
    problem: Problem, *, rate: float = 0.1, epsilon: float = 0.3, **blocks: Any
) -> None:
    """An outer gradient step of rate ε on Reptile's gradient is φ ← φ + ε · mean of (φ̃ − φ).

    φ̃ comes from `adapt`, on the support set.
    """
    estimator = Reptile(examples="support")
    learner = problem.learner(LearningRate(rate), estimator=estimator, **blocks)
    before = parameters(learner)
    expected = dict(before)
    for index in range(len(problem.tasks)):
        adapted = learner.adapt(problem.tasks[index].support)
        for name, end in adapted.named_parameters():
            key = f"model.{name}"
            expected[key] = expected[key] + epsilon * (end - before[key]) / len(problem.tasks)
    learner.backward(problem.tasks)
    torch.optim.SGD(learner.parameters(), lr=epsilon).step()
    hold(
        "Reptile is interpolation", parameters(learner), expected, tolerance(problem, float64=1e-12)
    )


def implicit_quadratic(
    problem: Problem, *, proximal: float = 2.0, rate: float = 0.1, **blocks: Any
) -> None:
    """Law 12: on `laws.problem.quadratic` the implicit gradient is its closed form.

        φ* = (A + λI)⁻¹ (b + λθ),    ∂/∂θ = λ (A + λI)⁻¹ (C φ* − d)

    with (A, b) the support and (C, d) the query set. The problem's steps must be enough for the
    inner loop to converge.
    """
    size = problem.tasks.support[1].shape[-1]
    learner = problem.learner(
        LearningRate(rate), estimator=Implicit(proximal=proximal, cg_steps=size), **blocks
    )
    theta = parameters(learner)["model.theta"]
    expected = torch.zeros_like(theta)
    for index in range(len(problem.tasks)):
        (a, b), (c, d) = problem.tasks[index].support, problem.tasks[index].query
        pulled = a + proximal * torch.eye(size).to(a)
        end = torch.linalg.solve(pulled, b + proximal * theta)
        slope = torch.linalg.solve(pulled, c @ end - d)
        expected += proximal * slope / len(problem.tasks)
    got = learner.meta_gradient(problem.tasks).grads
    hold("implicit quadratic", got, {"model.theta": expected}, tolerance(problem, float64=1e-9))


def implicit_tends_to_the_plain_gradient(
    problem: Problem, *, proximals: Sequence[float] = (1e2, 1e3, 1e4), **blocks: Any
) -> None:
    """Law 12: as λ grows, the implicit gradient becomes ∇L_q(φ*), with an error like 1/λ.

    A λ ten times as large must leave at most a fifth of the error.
    """
    errors: list[float] = []
    for proximal in proximals:
        learner = problem.learner(
            LearningRate(0.5 / proximal), estimator=Implicit(proximal=proximal), **blocks
        )
        got = learner.meta_gradient(problem.tasks).grads
        errors.append(relative_error(got, _plain(problem, learner)))
    if not errors[-1] < 1e-2 or any(b > a / 5 for a, b in pairwise(errors)):
        raise LawError(
            f"implicit → plain gradient: for λ = {list(proximals)} they differ by "
            f"{[float(f'{error:.2e}') for error in errors]}; this should fall like 1/λ"
        )


def _plain(problem: Problem, learner: MetaLearner) -> Tensors:
    """The mean over tasks of the query gradient at the adapted parameters."""
    total: Tensors = {}
    for index in range(len(problem.tasks)):
        task = problem.tasks[index]
        for name, grad in _gradient(problem, learner.adapt(task.support), task.query).items():
            total[name] = total.get(name, 0) + grad / len(problem.tasks)
    return total


def _gradient(problem: Problem, model: torch.nn.Module, batch: Sequence[Any]) -> Tensors:
    """The supervised gradient of a model on a batch, under a learner's names."""
    inputs, target = batch
    params = dict(model.train().named_parameters())
    loss: Tensor = problem.loss(model(inputs), target)
    grads = torch.autograd.grad(loss, list(params.values()))
    return {f"model.{name}": grad for name, grad in zip(params, grads, strict=True)}
