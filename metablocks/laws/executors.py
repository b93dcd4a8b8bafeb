"""Laws of executors: a sum over tasks, the plain loop's results, random draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.devices import in_float64
from metablocks.errors import LawError, TaskError
from metablocks.executors import Executor, Loop
from metablocks.laws import gradients
from metablocks.laws.cases import MakeRule, Problem
from metablocks.laws.compare import assert_close, fixed_draws, named
from metablocks.types import Progress, Task, TaskBatch, Tensors


def adds_up(executor: Executor, *, tasks: int) -> None:
    """The first result is the *sum* over tasks, the second is stacked in the order of tasks.

    For nested results, floats and whole numbers, of a batch and of a list of tasks; a task is neither
    dropped nor taken twice, and every task starts from the same buffers. A learner divides by
    the number of tasks, so an executor that takes the mean gives a gradient that is too small.
    """
    rows = in_float64(torch.arange(tasks * 6)).reshape(tasks, 3, 2).square()
    batch = TaskBatch(support=(rows, rows), query=(rows + 1, rows))
    shared, buffers = {"scale": rows.new_tensor(2.0)}, {"seen": rows.new_zeros(2)}

    def work(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
        inputs = task.support[0]
        seen = buffers["seen"] + inputs[0]
        totals = {"sum": shared["scale"] * inputs.sum(0), "count": torch.ones((), dtype=torch.long)}
        return (totals, seen), (task.query[0], {"first": inputs[0]})

    total = {"sum": 2 * rows.sum((0, 1)), "count": torch.tensor(tasks), "seen": rows[:, 0].sum(0)}
    expected = {"query": rows + 1, "first": rows[:, 0]}
    for argument in (batch, [batch[index] for index in range(tasks)]):
        with torch.no_grad():
            (summed, seen), (query, first) = executor(work, shared, buffers, argument)
        assert_close("adds up", {**summed, "seen": seen}, total, within=1e-14)
        got = {"query": query, "first": first["first"]}
        for name, stacked in expected.items():
            shape = list(getattr(got[name], "shape", ()))
            if shape != list(stacked.shape):
                raise LawError(
                    f"adds up: rows are {shape}, expected {list(stacked.shape)}, stacked"
                )
        assert_close("adds up: rows come in the order of tasks", got, expected, within=0)


def equals_the_loop(
    executor: Executor, problem: Problem, *, progress: Progress | None = None, **blocks: Any
) -> None:
    """Law 8: loss, query losses, meta-gradient and buffers are those of `Loop`, batch norm included.

    Twice, since an executor may work differently on later calls; evaluations too.
    """

    make, own = gradients.moved_learner, [executor]
    for _ in range(2):
        gradients.alike(problem, make, executors=own, estimators=(), progress=progress, **blocks)
    got, expected = (
        make(problem, executor=block, **blocks).evaluate(problem.tasks)
        for block in (executor, Loop())
    )
    for name in ("query_losses", "predictions"):
        left, right = ({name: getattr(evaluation, name)} for evaluation in (got, expected))
        assert_close(f"{named(executor)} = Loop, evaluation", left, right, 1e-10)


def draws_are_independent(
    executor: Executor, problem: Problem, *, rule: MakeRule | None = None, seed: int = 0
) -> None:
    """Tasks draw random numbers of their own, which follow from the global seed.

    Six copies of one task: what differs between their losses are the draws of the rule, or of
    dropout if none is given.
    """
    tasks = TaskBatch.stack([problem.tasks[0]] * 6)
    dropping = replace(problem, model=lambda: _Dropping(problem.model()), adapt="*")
    learner = (problem if rule else dropping).with_steps(1).learner(rule, executor=executor)

    def losses(act: Callable[[TaskBatch], Any], seed: int) -> Tensor:
        with fixed_draws():
            torch.manual_seed(seed)
            drawn: Tensor = act(tasks).query_losses[:, -1]
            return drawn

    for act in (learner.meta_gradient, learner.evaluate) if rule else (learner.meta_gradient,):
        first = losses(act, seed)
        if len(set(first.tolist())) < len(first):
            raise LawError(f"draws: copies of a task have the same draws: losses {first.tolist()}")
        if not torch.equal(first, losses(act, seed)):
            raise LawError(f"draws: the same seed, {seed}, gives other losses when asked again")
        if torch.equal(first, losses(act, seed + 1)):
            raise LawError(f"draws: seeds {seed} and {seed + 1} give the same losses")


def unequal_tasks(executor: Executor, problem: Problem) -> None:
    """Tasks of unequal size give the loop's gradient, or are refused with a `TaskError`."""
    task = problem.tasks[0]
    shorter = Task(task.support, (task.query[0][:-1], task.query[1][:-1]))
    expected = problem.learner().meta_gradient([task, shorter]).grads
    try:
        got = problem.learner(executor=executor).meta_gradient([task, shorter]).grads
    except TaskError:
        return
    assert_close("tasks of unequal size", got, expected, 1e-10)


class _Dropping(nn.Module):
    """A model whose predictions are noisy in training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        prediction = self.model(inputs)
        return prediction + 0.1 * F.dropout(torch.ones_like(prediction), training=self.training)
