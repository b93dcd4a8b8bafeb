"""Law 12: the closed forms and limits of Reptile and the implicit gradient."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metablocks.errors import LawError
from metablocks.estimators import Implicit, Reptile
from metablocks.laws.cases import Problem
from metablocks.laws.compare import assert_close
from metablocks.learner import MetaLearner
from metablocks.rules import Chain, LearningRate, Momentum
from metablocks.types import Tensors, relative_error


def reptile_is_joint_training(
    reptile: Reptile, problem: Problem, *, rate: float = 0.1, **blocks: Any
) -> None:
    """Law 12: Reptile with one step of rate α is α times the gradient of the loss on its examples.

    With `examples="all"` these are support and query set of a task together.
    """
    learner = problem.learner(LearningRate(rate), estimator=reptile, **{**blocks, "steps": 1})
    expected: Tensors = {}
    for index in range(len(problem.tasks)):
        for name, grad in _gradient(
            problem, problem.model(), _examples(reptile, problem, index)
        ).items():
            expected[name] = expected.get(name, 0) + rate * grad / len(problem.tasks)
    got = learner.meta_gradient(problem.tasks).grads
    assert_close("Reptile in one step", got, expected, 1e-12)


def reptile_is_its_loop(reptile: Reptile, problem: Problem, *, momentum: float = 0.9) -> None:
    """φ − φ̃, with φ̃ by `torch.optim.SGD` with momentum; the loss is the query loss at φ̃ alone."""
    expected: Tensors = {}
    losses = []
    for index in range(len(problem.tasks)):
        inputs, target = _examples(reptile, problem, index)
        model = problem.model().train()
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        for _ in range(problem.steps):
            optimizer.zero_grad()
            loss: Any = problem.loss(model(inputs), target)
            loss.backward()
            optimizer.step()
        end = dict(model.named_parameters())
        for name, p in start.items():
            moved = (p - end[name].detach()) / len(problem.tasks)
            expected[f"model.{name}"] = expected.get(f"model.{name}", 0) + moved
        query, due = problem.tasks[index].query
        with torch.no_grad():
            losses.append(problem.loss(model(query), due))
    rule = Chain(Momentum(momentum), LearningRate(0.1))
    got = problem.learner(rule, estimator=reptile).meta_gradient(problem.tasks)
    assert_close("Reptile is its loop", got.grads, expected, 1e-12)
    seen = {"query losses": got.query_losses.nan_to_num(-1)}
    nothing = torch.full_like(got.query_losses[:, :-1], -1.0)
    rows = {"query losses": torch.cat([nothing, torch.stack(losses)[:, None]], 1)}
    assert_close("Reptile's loss is the query loss at the end", seen, rows, 1e-12)


def reptile_is_interpolation(
    reptile: Reptile, problem: Problem, *, rate: float = 0.1, epsilon: float = 0.3, **blocks: Any
) -> None:
    """An outer gradient step of rate ε on Reptile's gradient is φ ← φ + ε · mean of (φ̃ − φ).

    φ̃ comes from `adapt`, on the support set.
    """
    estimator = replace(reptile, examples="support")
    learner = problem.learner(LearningRate(rate), estimator=estimator, **blocks)
    before = parameters(learner)
    expected = dict(before)
    for index in range(len(problem.tasks)):
        adapted = learner.adapt(problem.tasks[index].support)
        for name, end in adapted.named_parameters():
            key = f"model.{name}"
            expected[key] = expected[key] + epsilon * (end - before[key]) / len(problem.tasks)
    learner.backward(problem.tasks)
    learned = [p for p in learner.parameters() if p.grad is not None]
    torch.optim.SGD(learned, lr=epsilon).step()
    assert_close("Reptile is interpolation", parameters(learner), expected, 1e-12)


def implicit_quadratic(
    implicit: Implicit,
    problem: Problem,
    *,
    rate: float = 0.1,
    solver_steps: int | None = None,
    **blocks: Any,
) -> None:
    """Law 12: on `Case(kind="quadratic")` the implicit gradient is its closed form.

        φ* = (A + λI)⁻¹ (b + λθ),    ∂/∂θ = λ (A + λI)⁻¹ (C φ* − d)

    with (A, b) the support and (C, d) the query set. The problem's steps must be enough for the
    inner loop to converge; the solver gets as many as there are dimensions, unless given.
    """
    size, proximal = problem.tasks.support[1].shape[-1], implicit.proximal
    learner = problem.learner(
        LearningRate(rate), estimator=replace(implicit, cg_steps=solver_steps or size), **blocks
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
    assert_close("implicit quadratic", got, {"model.theta": expected}, 1e-9)


def implicit_tends_to_the_plain_gradient(
    implicit: Implicit,
    problem: Problem,
    *,
    proximals: Sequence[float] = (1e4, 1e5, 1e6),
    **blocks: Any,
) -> None:
    """Law 12: as λ grows, the implicit gradient becomes ∇L_q(φ*), with an error like 1/λ.

    A λ ten times as large must leave at most a fifth of the error, or what rounding leaves.
    """
    errors: list[float] = []
    for proximal in proximals:
        learner = problem.learner(
            LearningRate(0.5 / proximal), estimator=replace(implicit, proximal=proximal), **blocks
        )
        got = learner.meta_gradient(problem.tasks).grads
        errors.append(relative_error(got, _plain(problem, learner)))
    single = next(problem.model().parameters()).dtype == torch.float32
    rounding = 1e-4 if single else 1e-9
    if not errors[-1] < 1e-2 or any(b > max(a / 5, rounding) for a, b in pairwise(errors)):
        raise LawError(
            f"implicit → plain gradient: for λ = {list(proximals)} they differ by "
            f"{[float(f'{error:.2e}') for error in errors]}; this should fall like 1/λ"
        )


def parameters(learner: MetaLearner) -> Tensors:
    """Copies of the learner's parameters by name."""
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


def _examples(reptile: Reptile, problem: Problem, index: int) -> list[Any]:
    task = problem.tasks[index]
    if reptile.examples == "support":
        return list(task.support)
    return [torch.cat(pair) for pair in zip(task.support, task.query, strict=True)]


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
    params = {n: p for n, p in model.train().named_parameters() if p.requires_grad}
    loss: Tensor = problem.loss(model(inputs), target)
    grads = torch.autograd.grad(loss, list(params.values()))
    return {f"model.{name}": grad for name, grad in zip(params, grads, strict=True)}
