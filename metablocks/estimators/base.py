"""Estimators: ways to compute one task's meta-gradient."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metablocks.batches import Side
from metablocks.checks import name_of, shown, wrong_answer
from metablocks.inner_loop import InnerLoop, QueryPass
from metablocks.pieces import At, Pieces, weighed
from metablocks.rules.base import UpdateRule
from metablocks.types import Batch, Drawn, Task, Tasks, Tensors


class TaskGradient(NamedTuple):
    """One task's contribution; a pytree.

    >>> import torch
    >>> import metablocks as mb
    >>> grads = {"model.weight": torch.zeros(1, 1)}
    >>> one_step = torch.tensor([torch.nan, 0.5])       # the loss before the step did not count
    >>> mb.TaskGradient(grads, loss=one_step[-1], query_losses=one_step).metrics
    {}
    """

    grads: Tensors
    """∂(weighted query loss)/∂(meta-parameter), under the learner's names. By plain autograd a name
    may be absent if the loss does not depend on it."""
    loss: Tensor
    """The weighted query loss, a scalar."""
    query_losses: Tensor
    """`[steps + 1]`; nan where the step loss gives no weight."""
    changes: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """By how much the task's passes moved the buffers that are collected (`InnerLoop.changes`)."""
    scores: Tensor | None = None
    """`[steps + 1]`, as `query_losses`: the metric, if the inner loop has one."""
    metrics: Tensors = {}  # noqa: RUF012
    """Figures of the estimator's own work: scalars by name, the same names for each task."""


class Estimator(ABC):
    """Computes the meta-gradient of one task. Subclass it to write an estimator.

    Law: a pure function of its arguments that composes with `torch.func.vmap`; an estimator that
    claims exactness equals `Unrolled`.

    `inner` is the learner's inner loop as functions of the meta-parameters `meta`; `buffers` is what of
    the model's buffers changes within a task. `vjp` gives gradients under every executor, and tells
    what the loss does not depend on, for which `torch.func.grad` has zeros. `inner.weights` are the
    step loss's, by the carry.

    >>> import torch
    >>> import metablocks as mb
    >>> from metablocks.derivatives import vjp
    >>> class LastQueryLoss(mb.Estimator):
    ...     def __call__(self, inner, meta, buffers, task):
    ...         def loss(meta):
    ...             carry = inner.start(meta, buffers)
    ...             for index in range(inner.steps):
    ...                 carry, _ = inner.step(meta, carry, task.support, index)
    ...             return inner.query(meta, carry, task.query, inner.steps).loss, None
    ...         value, pull, _ = vjp(loss, meta)
    ...         (slopes,) = pull(torch.ones_like(value))
    ...         grads = {name: slope for name, slope in slopes.items() if slope is not None}
    ...         losses = torch.cat([value.new_full((inner.steps,), torch.nan), value[None]])
    ...         return mb.TaskGradient(grads, value, losses)
    >>> tasks = mb.tasks.Linear(shots=3, queries=3).sample("train", range(4))
    >>> model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> blocks = {"loss": loss, "steps": 2, "rule": mb.LearningRate(0.1), "executor": mb.Vmap()}
    >>> learner = mb.MetaLearner(model, estimator=LastQueryLoss(), **blocks)
    >>> gradient = learner.meta_gradient(tasks).grads["model.weight"]
    >>> unrolled = mb.MetaLearner(model, **blocks | {"rule": mb.LearningRate(0.1)})
    >>> bool(torch.allclose(gradient, unrolled.meta_gradient(tasks).grads["model.weight"]))
    True
    """

    exact: ClassVar[bool] = False
    """True if it claims `Unrolled`'s gradient."""
    reads: ClassVar[tuple[Side, ...] | None] = None
    """The sets whose loss at θ_0 must depend on every meta-parameter.

    None for an estimator that differentiates the query loss after the inner loop, which must.
    """

    @abstractmethod
    def __call__(
        self, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
    ) -> TaskGradient:
        """The gradient of the task's weighted query loss, a scalar, by the entries of `meta`.

        It has their names and shapes; the tensors of `task` are `[examples, ...]`.
        """

    def in_pieces(self, run: Pieces) -> TaskGradient:
        """The meta-gradient of the tasks that `run` is for, cut into pieces to be compiled one by one.

        Unless overridden it is one piece, compiled for each number of inner steps apart.
        """
        inner = run.inner
        grads: Tensors = {}
        name = ("task", inner.steps, inner.through, *inner.weights)
        (result,) = run(
            name,
            partial(_task, self),
            (run.buffers, run.drawn),
            at=At(weights=inner.weights),
            data=("support", "query", "weight"),
            totals=grads,
        )
        opened: TaskGradient = run.open(result)
        return opened._replace(grads=grads)

    def inner_rule(self, rule: UpdateRule) -> UpdateRule:
        """The update rule of a learner with this estimator, in training and at evaluation alike."""
        return rule

    def low_memory(self, steps: int) -> "Estimator | None":
        """An estimator of the same gradient that takes less memory and more time, if there is one."""
        return None

    def in_training(self, tasks: Tasks) -> Tasks:
        """The tasks as it trains on them: their support sets are what the inner steps see."""
        return tasks


def task_gradient(
    estimator: Estimator, inner: InnerLoop, meta: Tensors, buffers: Tensors, task: Task
) -> TaskGradient:
    """The estimator's answer. Raises `BlockError` if it is not a `TaskGradient` of `meta`."""
    answer: Any = estimator(inner, meta, buffers, task)
    if not isinstance(answer, TaskGradient) or not isinstance(answer.grads, Mapping):
        takes = "a TaskGradient, its grads by the names of `meta`"
        raise wrong_answer("estimator", name_of(estimator), answer, takes)
    for name, grad in answer.grads.items():
        if name not in meta or not isinstance(grad, Tensor) or grad.shape != meta[name].shape:
            like = f"a tensor {list(meta[name].shape)}" if name in meta else "none of that name"
            takes = f"for {name} {like}"
            raise wrong_answer("estimator", name_of(estimator), {name: shown(grad)}, takes)
    return answer


def is_cut(estimator: Estimator) -> bool:
    """True if an estimator is cut into pieces, and none of its classes has another `__call__` since."""
    for kind in type(estimator).__mro__:
        if "in_pieces" in vars(kind) or "__call__" in vars(kind):
            return kind is not Estimator and "in_pieces" in vars(kind)
    return False


def _task(
    estimator: Estimator,
    inner: InnerLoop,
    meta: Tensors,
    totals: Tensors,
    at: At,
    buffers: Tensors,
    drawn: Drawn | None,
    support: Batch,
    query: Batch,
    weight: Tensor | None,
) -> tuple[TaskGradient]:
    task = Task(support, query, drawn=drawn)
    result = task_gradient(estimator, inner, meta, buffers, task)
    totals |= weighed(result.grads, weight)
    return (result._replace(grads={}),)


def reached(grads: Mapping[str, Tensor | None]) -> Tensors:
    """The gradients that there are."""
    return {name: grad for name, grad in grads.items() if grad is not None}


def filled(grads: Mapping[str, Tensor | None], like: Tensors) -> Tensors:
    """The gradients, zero where there is none."""
    return {
        name: torch.zeros_like(tensor) if (grad := grads.get(name)) is None else grad
        for name, tensor in like.items()
    }


def each_carry(inner: InnerLoop, values: Mapping[int, Tensor]) -> Tensor:
    """Constants `[..., steps + 1]` by the carry, of scalars or those of tasks; nan if there is none."""
    like = next(iter(values.values()))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    rows = [torch.full_like(like.detach(), torch.nan, dtype=dtype)] * (inner.steps + 1)
    for index, value in values.items():
        rows[index] = value.detach().to(dtype)
    return torch.stack(rows, -1)


def at_the_end(inner: InnerLoop, query: QueryPass) -> dict[str, Any]:
    """Losses and scores `[steps + 1]` of the last carry alone, for a `TaskGradient`."""
    score = None if query.score is None else each_carry(inner, {inner.steps: query.score})
    return {"query_losses": each_carry(inner, {inner.steps: query.loss}), "scores": score}
