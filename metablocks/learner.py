"""The meta-learner: seven independent choices put together.

It holds the meta-parameters and hands each block what it needs; the mathematics is in the blocks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metablocks.adapted import adapted_model
from metablocks.errors import BlockError, GradientError
from metablocks.estimators import Estimator, Unrolled
from metablocks.executors import (
    Executor,
    KeyedFunction,
    Loop,
    TaskFunction,
    Tasks,
    count_tasks,
)
from metablocks.functional import FunctionalModule, detach
from metablocks.inner import InnerLoop, check_steps
from metablocks.order import Order, SecondOrder
from metablocks.rules.base import UpdateRule
from metablocks.selection import select_parameters
from metablocks.step_loss import FinalStepLoss, StepLoss, step_weights
from metablocks.types import Batch, Progress, Task, Tensors


class MetaGradient(NamedTuple):
    """What `meta_gradient` and `backward` return."""

    loss: Tensor
    """Scalar: the mean over tasks of the weighted query loss."""
    grads: Tensors
    """The meta-gradient, under the names of the learner's trainable parameters."""
    query_losses: Tensor
    """`[tasks, steps + 1]`: before adaptation, then after each step; nan where not computed."""
    buffer_changes: Tensors
    """Mean over tasks of the changes of the buffers that are collected (see `MetaLearner`)."""
    metrics: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """Mean over tasks of what the estimator says of its own work: scalars by name."""

    @property
    def trouble(self) -> str | None:
        """What is not finite: the loss or the gradient; None where both are."""
        if not math.isfinite(self.loss):
            return f"training loss is {float(self.loss)}"
        finite = nn.utils.get_total_norm(self.grads.values()).isfinite()
        return None if finite else "meta-gradient is not finite"


class Evaluation(NamedTuple):
    """What `evaluate` returns."""

    query_losses: Tensor
    """`[tasks, steps + 1]`: before adaptation, then after each step."""
    predictions: Any
    """The model's output on the query set after the last step, `[tasks, examples, ...]`."""
    metrics: Tensor | None
    """`[tasks, steps + 1]`: the metric, where one was given."""


class MetaLearner(nn.Module):
    """Gradient-based meta-learning of a model's initialisation, and of all that its blocks learn.

    - `model`: any `nn.Module`. It stays the caller's own: the outer optimiser moves its parameters,
      and nothing else touches it. Its batch norms normalise by batch statistics in the inner loop
      and the query pass, at evaluation too; their running buffers are neither read nor written.
      Buffers of a module of one's own pass from support pass to support pass within a task, and end
      with it; those of a module with `collects_buffers = True` (`per_step_batch_norm`) are brought
      up to date by `backward`: a task's passes move them, and what is stored moves by the mean over
      tasks.
    - `loss`: `(prediction, target) -> scalar`.
    - `steps`: inner steps on the support set.
    - `rule`, `order`, `step_loss`, `estimator`, `executor`: one block for each axis. `rule` is set up
      here, for the adapted parameters.
    - `adapt`: patterns that select which parameters move inside a task (see `selection`). Frozen
      parameters (`requires_grad=False`) neither move nor get a meta-gradient.

    `named_parameters()` gives the model's parameters under `model.` and the rule's under `rule.`.

    Laws: `meta_gradient`, `evaluate` and `adapt` leave parameters, buffers, `.grad`, training flags
    and random states bit-identical, also when the loss raises. A batch's gradient is the mean of its
    tasks', whatever their order and the executor.

    >>> from metablocks.rules import LearningRate
    >>> from metablocks.types import TaskBatch
    >>> learner = MetaLearner(
    ...     nn.Linear(1, 1), loss=nn.functional.mse_loss, steps=1, rule=LearningRate(0.1)
    ... )
    >>> x = torch.ones(4, 3, 1)
    >>> result = learner.meta_gradient(TaskBatch(support=(x, x), query=(x, x)))
    >>> sorted(result.grads), result.query_losses.shape
    (['model.bias', 'model.weight'], torch.Size([4, 2]))

    Raises, when built: `ModuleError` for a model that cannot be wrapped, `SelectionError` for
    patterns that select nothing, `BlockError` for blocks that make no sense together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor],
        steps: int,
        rule: UpdateRule,
        order: Order | None = None,
        step_loss: StepLoss | None = None,
        adapt: str | Sequence[str] = "*",
        estimator: Estimator | None = None,
        executor: Executor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.steps = check_steps(steps)
        self.rule = rule
        self.order = order or SecondOrder()
        self.step_loss = step_loss or FinalStepLoss()
        self.estimator = estimator or Unrolled()
        self.executor = executor or Loop()
        _check_types(self)
        if hasattr(self.estimator, "inner_rule"):
            rule = self.rule = self.estimator.inner_rule(rule)
        self._functional_model = FunctionalModule(model, batch_statistics=True)
        self.adapted = select_parameters(adapt, model)
        parameters = dict(model.named_parameters())
        rule.setup({name: parameters[name].detach() for name in self.adapted}, steps)
        self._functional_rule = FunctionalModule(rule)
        # Of the model's state: not the buffers of batch norms, which nobody reads.
        collected = _collected_buffers(model)
        self._collected = tuple(n for n in self._functional_model.state().buffers if n in collected)
        self._identity = object()  # tells this learner's compiled functions from another's
        self._connected: set[tuple[Any, ...]] = set()
        self._evaluation_steps(steps)
        for block in (rule, self.order, self.step_loss, self.estimator, self.executor):
            if hasattr(block, "check"):
                block.check(self)

    @property
    def max_steps(self) -> int | None:
        """The most inner steps that can be taken, where a block is made for so many; else None."""
        limits = [
            self.rule.max_steps,
            *(getattr(m, "max_steps", None) for m in self.model.modules()),
        ]
        return min((limit for limit in limits if isinstance(limit, int)), default=None)

    def meta_gradient(self, tasks: Tasks, *, progress: Progress | None = None) -> MetaGradient:
        """The meta-gradient of the mean weighted query loss over tasks; touches nothing.

        `tasks` is a `TaskBatch`, or a list of `Task` where sizes differ. Random draws start from the
        current global state, which is put back.

        Raises `GradientError` for a meta-parameter that the loss does not depend on, `TaskError` for
        malformed tasks, and what the blocks raise.
        """
        with self._preserve_random_state():
            return self._meta_gradient(tasks, progress or Progress())

    def backward(self, tasks: Tasks, *, progress: Progress | None = None) -> MetaGradient:
        """Add the meta-gradient into `.grad`, as `loss.backward()` does, and return it.

        Buffers that are collected move by `buffer_changes`. Random draws advance the global state,
        so that the next call draws anew.
        """
        result = self._meta_gradient(tasks, progress or Progress())
        for name, parameter in self._meta_parameters().items():
            grad = result.grads[name]
            parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad
        for name, change in result.buffer_changes.items():
            self.model.get_buffer(name.removeprefix("model.")).add_(change)
        return result

    def evaluate(
        self,
        tasks: Tasks,
        *,
        steps: int | None = None,
        metric: Callable[[Any, Any], Tensor] | None = None,
    ) -> Evaluation:
        """Adapt to each task and judge on its query set, with no meta-gradient.

        The model runs in `eval()` mode (no dropout), batch norm by batch statistics all the same:
        the field's transductive convention. `steps` overrides the trained number of inner steps;
        `metric(prediction, target) -> scalar` is computed before adaptation and after each step.

        Raises `BlockError` for more steps than a per-step block was set up for.
        """
        inner = self._inner_at_evaluation(steps)

        def judge(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
            meta, _ = shared
            losses, scores = [], []
            prediction: Any = None
            for index, carry in inner.rollout(meta, buffers, task.support):
                loss, prediction, _ = inner.query(meta, carry, task.query, index)
                losses.append(loss)
                if metric is not None:
                    scores.append(metric(prediction, task.query[1]))
            return (), (torch.stack(losses), prediction, torch.stack(scores) if scores else ())

        count_tasks(tasks)
        with self._preserve_random_state():
            _, (losses, predictions, scores) = self._execute(judge, inner, tasks)
        return Evaluation(losses, predictions, scores if metric is not None else None)

    def adapt(self, support: Batch, *, steps: int | None = None) -> nn.Module:
        """A copy of the model adapted to one support batch, in `eval()` mode, ready to predict.

        Its batch norms carry the support set's statistics of the last inner step: in `eval()` it
        predicts one example at a time, in `train()` it gives the transductive numbers of `evaluate`.
        Per-step batch norms have become ordinary ones, with the row of that step; where they evaluate
        by running statistics, these are what they carry.
        """
        inner = self._inner_at_evaluation(steps)
        with self._preserve_random_state(), torch.no_grad():
            meta, buffers = detach(self._meta_parameters()), self._model_buffers()
            carries = [carry for _, carry in inner.rollout(meta, buffers, support)]
            return adapted_model(self.model, carries, support)

    def _meta_gradient(self, tasks: Tasks, progress: Progress) -> MetaGradient:
        through = tuple(self.order(k, self.steps, progress) for k in range(self.steps))
        weights = step_weights(self.step_loss, self.steps, progress)
        inner = self._inner(self.steps, through, weights)

        count = count_tasks(tasks)
        self._check_connected(inner, tasks[0])
        work = self._keyed(self.estimator, inner)
        totals, query_losses = self._execute(work, inner, tasks)
        grads, changes, metrics, loss = totals
        grads = {name: grad / count for name, grad in grads.items()}
        changes = {f"model.{name}": _mean(change, count) for name, change in changes.items()}
        metrics = {name: total / count for name, total in metrics.items()}
        return MetaGradient(loss / count, grads, query_losses, changes, metrics)

    def _keyed(self, estimator: Estimator, inner: InnerLoop) -> KeyedFunction:
        """The estimator as a function of tasks that may be compiled, and its thrifty twin."""

        def estimate(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
            meta, tensors = shared
            result = estimator(replace(inner, **tensors), meta, buffers, task)
            totals = (result.grads, result.changes, result.metrics, result.loss)
            return totals, result.query_losses

        modes = tuple(module.training for module in self.modules())
        key = (self._identity, estimator, inner.steps, inner.through, modes)
        twin = estimator.thrifty(inner.steps) if hasattr(estimator, "thrifty") else None
        return KeyedFunction(estimate, key, self._keyed(twin, inner) if twin else None)

    def _execute(self, work: TaskFunction, inner: InnerLoop, tasks: Tasks) -> tuple[Any, Any]:
        """`work((meta, tensors of the inner loop), buffers, task)` on every task."""
        shared = (detach(self._meta_parameters()), inner.tensors)
        with torch.no_grad():  # torch.func keeps its own graph; autograd's would be waste
            return self.executor(work, shared, self._model_buffers(), tasks)

    def _inner(
        self,
        steps: int,
        through: tuple[bool, ...],
        weights: tuple[float, ...],
        training: bool | None = None,
    ) -> InnerLoop:
        return InnerLoop(
            model=self._functional_model,
            rule=self._functional_rule,
            loss_fn=self.loss,
            adapted=self.adapted,
            constants=detach({n: p for n, p in self.named_parameters() if not p.requires_grad}),
            rule_buffers=detach(self._functional_rule.state().buffers),
            steps=steps,
            through=through,
            weights={
                index: torch.tensor(weight, dtype=torch.float64)
                for index, weight in enumerate(weights)
                if weight
            },
            collected=self._collected,
            training=training,
        )

    def _inner_at_evaluation(self, steps: int | None) -> InnerLoop:
        """In `eval()` mode, through no step; the last query loss counts."""
        steps = self._evaluation_steps(steps)
        return self._inner(steps, (False,) * steps, (0.0,) * steps + (1.0,), training=False)

    def _meta_parameters(self) -> Tensors:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _model_buffers(self) -> Tensors:
        return detach(self._functional_model.state().buffers)

    def _check_connected(self, inner: InnerLoop, task: Task) -> None:
        """Once for each set of decisions: every meta-parameter must reach the loss."""
        decisions = (inner.steps, inner.through, tuple(inner.weights))
        if decisions in self._connected:
            return
        with self._preserve_random_state():
            meta = detach(self._meta_parameters())
            names = self.estimator.disconnected(inner, meta, self._model_buffers(), task)
        if names:
            raise GradientError(
                f"the loss does not depend on {', '.join(names)}: there is no meta-gradient for "
                "it. Use it in the model's forward pass or the rule, take the steps that need it, "
                "or freeze it with requires_grad_(False)"
            )
        self._connected.add(decisions)

    def _evaluation_steps(self, steps: int | None) -> int:
        steps = self.steps if steps is None else check_steps(steps)
        if self.max_steps is not None and steps > self.max_steps:
            raise BlockError(
                f"{steps} inner steps asked for, but a per-step block of this learner is set up for "
                f"{self.max_steps}; take at most {self.max_steps}"
            )
        return steps

    @contextmanager
    def _preserve_random_state(self) -> Iterator[None]:
        devices = {p.device for p in self.parameters() if p.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            yield


def _check_types(learner: MetaLearner) -> None:
    for name, kind in (
        ("model", nn.Module),
        ("rule", UpdateRule),
        ("order", Order),
        ("step_loss", StepLoss),
        ("estimator", Estimator),
        ("executor", Executor),
    ):
        block = getattr(learner, name)
        if isinstance(block, type) or not isinstance(block, kind):
            given = f"the class {block.__name__}" if isinstance(block, type) else f"{block!r}"
            hint = f"; did you mean {block.__name__}(…)?" if isinstance(block, type) else ""
            raise BlockError(f"{name} is {given}; it takes a {kind.__name__}{hint}")
    if not callable(learner.loss):
        raise BlockError(f"loss is {learner.loss!r}; it takes (prediction, target) -> scalar")
    if isinstance(learner.loss, nn.Module) and any(
        p.requires_grad for p in learner.loss.parameters()
    ):
        raise BlockError(
            f"the loss {type(learner.loss).__name__} has trainable parameters, which no gradient "
            "would reach; put them into the model, or freeze them with requires_grad_(False)"
        )


def _collected_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers of modules with `collects_buffers = True`."""
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if getattr(module, "collects_buffers", False)
        for own, _ in module.named_buffers()
    }


def _mean(total: Tensor, count: int) -> Tensor:
    """The mean of `count` tensors that add up to `total`; integers stay integers."""
    return (total / count).to(total.dtype)
