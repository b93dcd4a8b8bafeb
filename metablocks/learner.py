"""The meta-learner: seven independent choices put together.

It holds the meta-parameters and hands each block what it needs; the mathematics is in the blocks.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from metablocks.adapted import adapted_model
from metablocks.batches import Batches, FullBatch
from metablocks.checks import UNCHECKED, CountFrom0, checked, name_of
from metablocks.compatibility import (
    Assembly,
    check_compatible,
    check_losses,
    learned,
    shapes_held,
)
from metablocks.derivatives import transformed
from metablocks.diagnose import unfit_data
from metablocks.errors import BlockError, GradientError, MetablocksError, TaskError, concerning
from metablocks.estimators import Estimator, Unrolled
from metablocks.executors import (
    Executor,
    Loop,
    check_tasks,
    executor_of,
    share_of,
    total_weight,
)
from metablocks.fingerprint import Same
from metablocks.functional import FunctionalModule, ModuleState, ModuleView, detach
from metablocks.generators import Draws, generators_of
from metablocks.inner_loop import InnerLoop
from metablocks.norm_statistics import NormStatistics
from metablocks.objective import Loss, LossRole, Objective
from metablocks.order import Order, SecondOrder, steps_through
from metablocks.per_step import step_aware_modules
from metablocks.reach import (
    check_constant,
    check_inference,
    check_reach,
    check_reads,
    trainable_beside,
)
from metablocks.rules.base import UpdateRule
from metablocks.selection import select_parameters
from metablocks.start import AsLearned, Start
from metablocks.step_loss import FinalStepLoss, StepLoss, step_weights
from metablocks.twins import generators_in
from metablocks.types import Batch, Progress, Task, Tasks, Tensors, as_tasks, constant, map_tensors
from metablocks.work import evaluation_work, execute, seeded, training_work

Metric = Callable[[Any, Any], Any]
"""`(prediction, target) -> score`: a scalar tensor, or a number."""


Parameters: TypeAlias = dict[str, nn.Parameter]

Method = TypeVar("Method", bound=Callable[..., Any])


def _differentiating(method: Method) -> Method:
    """The method with gradients enabled, whatever the caller's mode; data at fault is named."""

    data = list(inspect.signature(method).parameters)[1]

    @wraps(method)
    def run(learner: "MetaLearner", *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            if transformed():
                raise GradientError(
                    f"{method.__name__} of a learner is called inside a transform of torch.func (grad, "
                    "vmap, ...); call it outside, or take metablocks.adapt, which goes through them"
                )
            learner._check_blocks()
            try:
                return method(learner, *args, **kwargs)
            except MetablocksError:
                raise
            except Exception as error:
                given = args[0] if args else kwargs[data]
                if given == []:
                    raise
                support = given if data == "support" else as_tasks(given)[0].support
                reason = unfit_data(error, learner.model, learner._first_batch(support))
                if not reason:
                    raise
                raise TaskError(reason, block=method.__name__, field=data) from error

    return run  # type: ignore[return-value]


class MetaGradient(NamedTuple):
    """Result of `meta_gradient` and `backward`.

    >>> import torch
    >>> import metablocks as mb
    >>> learner = mb.MetaLearner(
    ...     torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss, steps=2, rule=mb.LearningRate(0.1)
    ... )
    >>> tasks = mb.tasks.Linear(shots=3, queries=3).sample("train", range(4))
    >>> result = learner.meta_gradient(tasks)
    >>> result.loss.shape, sorted(result.grads), result.query_losses.shape
    (torch.Size([]), ['model.bias', 'model.weight'], torch.Size([4, 3]))
    """

    loss: Tensor
    """Scalar: the mean over tasks, by their weights, of the weighted query loss."""
    grads: Tensors
    """The meta-gradient, under the names of the learner's trainable parameters."""
    query_losses: Tensor
    """`[tasks, steps + 1]`: before adaptation, then after each step; nan where not computed."""
    buffer_changes: Tensors
    """Mean over tasks of the changes of the buffers that are collected (see `MetaLearner`)."""
    metrics: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """Mean over tasks of what the estimator says of its own work: scalars by name."""
    scores: Tensor | None = None
    """`[tasks, steps + 1]`: the metric, if one was given; nan where no query pass was made."""
    skipped: bool = False
    """True if `fit` took no step by it, because it is not finite."""

    @property
    def nonfinite(self) -> str | None:
        """Message that the loss or the gradient is not finite; None if both are."""
        if not math.isfinite(self.loss):
            return f"training loss is {float(self.loss)}"
        finite = nn.utils.get_total_norm(self.grads.values()).isfinite()
        return None if finite else "meta-gradient is not finite"


class Evaluation(NamedTuple):
    """Result of `evaluate`.

    >>> import torch
    >>> import metablocks as mb
    >>> learner = mb.MetaLearner(
    ...     torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss, steps=2, rule=mb.LearningRate(0.1)
    ... )
    >>> tasks = mb.tasks.Linear(shots=3, queries=3).sample("train", range(4))
    >>> result = learner.evaluate(tasks)
    >>> result.query_losses.shape, result.predictions.shape, result.metrics
    (torch.Size([4, 3]), torch.Size([4, 3, 1]), None)
    """

    query_losses: Tensor
    """`[tasks, steps + 1]`: before adaptation, then after each step."""
    predictions: Any
    """The model's output on the query set after the last step, `[tasks, examples, ...]`; what of it is
    not a tensor of one shape is a list by task. None if the loss takes no prediction."""
    metrics: Tensor | None
    """`[tasks, steps + 1]`: the metric, where one was given."""


@checked()
class MetaLearner(nn.Module):
    """Gradient-based meta-learning of a model's initialisation, and of all that its blocks learn.

    - `model`: any `nn.Module`, seen as it is at each call. It stays the caller's own: the outer
      optimiser moves its parameters, and nothing else touches it. Buffers of a module of one's own pass
      from support pass to support pass within a task, and end with it; those of a `StepAware` module
      with `collects_buffers = True` (`per_step_batch_norm`) are brought up to date by `backward`: a
      task's passes move them, and what is stored moves by the mean over tasks.
    - `loss`: `(prediction, target) -> scalar`, which judges query sets; `support_loss`: what the inner
      steps descend, `loss` unless given. Either may ask by name for `inputs`, `params`, `step`, `model`
      (see `objective`). One that is a module with trainable parameters is learned.
    - `steps`: inner steps on the support set.
    - `start`: the fast weights that a task begins with. Parameters that it puts in the place of learned
      ones (`Zeros`, `Prototypes`, …) have no meta-gradient, and their `.grad` stays None.
    - `batches`: the examples that each inner step sees.
    - `rule`, `order`, `step_loss`, `estimator`, `executor`: one block for each axis. `rule` is set up
      here, for the adapted parameters.
    - `adapt`: patterns that select which parameters move inside a task (see `selection`). Frozen
      parameters (`requires_grad=False`) neither move nor get a meta-gradient; freezing and unfreezing
      count from the next call on.
    - `norm_statistics`: what batch norms normalise by, in the inner loop, the query pass and at
      evaluation: `"batch"`, the statistics of the batch at hand; `"running"`, those they have
      stored, for a pre-trained net; or `"support"`, in query passes the support set's of the last step
      before, as what `adapt` returns does (before any step, of one pass at θ_0). The meta-gradient
      looks through these too, but for those of a step whose gradient the order takes for a constant.
      Stored statistics are neither updated nor replaced.
    - `allow_unused`: patterns of meta-parameters that no task need reach (`"experts.*"`).

    `named_parameters()` gives the model's parameters under `model.`, the rule's under `rule.`, those of
    losses under `loss.` and `support_loss.`; a module that is both, under `loss.` alone.

    Laws: `meta_gradient`, `evaluate` and `adapt` leave parameters, buffers, plain attributes of modules,
    `.grad`, training flags and random states bit-identical, also when the loss raises. A batch's
    gradient is the mean of its tasks', whatever their order and the executor. What is changed between
    two calls is seen by the next. Every trainable tensor that the loss depends on is a meta-parameter,
    or is refused by name.

    >>> import torch
    >>> import metablocks as mb
    >>> learner = mb.MetaLearner(
    ...     torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss, steps=1, rule=mb.LearningRate(0.1)
    ... )
    >>> x = torch.ones(4, 3, 1)
    >>> result = learner.meta_gradient(mb.TaskBatch(support=(x, x), query=(x, x)))
    >>> sorted(result.grads), result.query_losses.shape
    (['model.bias', 'model.weight'], torch.Size([4, 2]))

    What is put in another block's place later counts from the next call on; `model` and `rule`, for which
    it is set up, are refused then.

    Raises, when built: `ModuleError` for a model that cannot be wrapped, `SelectionError` for
    patterns that select nothing, `BlockError` for blocks that make no sense together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor],
        support_loss: Callable[..., Tensor] | None = None,
        steps: CountFrom0,
        start: Start | None = None,
        batches: Batches | None = None,
        rule: UpdateRule,
        order: Order | None = None,
        step_loss: StepLoss | None = None,
        adapt: str | Sequence[str] = "*",
        norm_statistics: NormStatistics = "batch",
        allow_unused: str | Sequence[str] = (),
        estimator: Estimator | None = None,
        executor: Executor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.support_loss = None if support_loss is loss else support_loss
        self.steps = steps
        self.start = start or AsLearned()
        self.batches = batches or FullBatch()
        self.rule = rule
        self.order = order or SecondOrder()
        self.step_loss = step_loss or FinalStepLoss()
        self.estimator = estimator or Unrolled()
        self.executor = executor or Loop()
        self._objectives: dict[LossRole, Objective] = {}
        rule = self.rule = self.estimator.inner_rule(rule)
        self.norm_statistics = norm_statistics
        self.allow_unused = (
            (allow_unused,) if isinstance(allow_unused, str) else tuple(allow_unused)
        )
        self._functional_models: dict[NormStatistics, FunctionalModule] = {}
        self._functional_model(norm_statistics)
        self._patterns = adapt
        self._selected: tuple[Hashable, tuple[str, ...]] = ((), ())
        parameters = dict(model.named_parameters())
        # Not the property, of which `nn.Module` would hide what it raises.
        adapted = self._adapted(self._named())
        rule.setup({name: parameters[name].detach() for name in adapted}, steps)
        self._functional_rule = FunctionalModule(rule)
        self._identity = object()  # tells this learner's compiled functions from another's
        self._draws: dict[Hashable, Draws] = {}
        self._read: tuple[Hashable, ...] = ()
        self._reached = False
        self._evaluation_steps(steps)
        self._losses(self._named())
        check_compatible(self._assembly())

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the parameters that move inside a task, frozen ones left out."""
        return self._adapted(self._named())

    def _adapted(self, parameters: Parameters) -> tuple[str, ...]:
        flags = tuple(
            [(n, p.requires_grad) for n, p in parameters.items() if n.startswith("model.")]
        )
        if self._selected[0] != flags:
            with concerning("MetaLearner", "adapt"):
                self._selected = flags, select_parameters(self._patterns, self.model)
        return self._selected[1]

    @property
    def learned(self) -> Tensors:
        """The meta-parameters: all that is trainable, except for what `start` replaces."""
        return self._learned(self._named())

    @property
    def max_steps(self) -> int | None:
        """The most inner steps that can be taken, where a block is made for so many; else None."""
        limits = [
            self.rule.max_steps,
            *(module.max_steps for module in step_aware_modules(self.model).values()),
            *(objective.max_steps for objective in self._objectives_now),
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    @_differentiating
    @checked()
    def meta_gradient(
        self,
        tasks: Annotated[Tasks, UNCHECKED],
        *,
        progress: Progress | None = None,
        metric: Metric | None = None,
    ) -> MetaGradient:
        """The meta-gradient of the mean weighted query loss over tasks; touches nothing.

        `tasks` is a `TaskBatch`, a pair `(support, query)` of pairs `(inputs, target)` as a `DataLoader`
        makes it, or a list of `Task` where sizes differ. Random draws start from the
        current global state, which is put back. `metric(prediction, target)` is taken of every query
        pass that is made anyway (`scores`).

        Raises `GradientError` for a meta-parameter that no task of the first batch reaches, and for
        trainable tensors that the loss reads and that are none; `TaskError` for malformed tasks, and
        what the blocks raise.
        """
        parameters = self._named()
        return self._meta_gradient(tasks, parameters, progress, metric, put_back=True)

    @_differentiating
    @checked()
    def backward(
        self,
        tasks: Annotated[Tasks, UNCHECKED],
        *,
        progress: Progress | None = None,
        metric: Metric | None = None,
    ) -> MetaGradient:
        """Add the meta-gradient into `.grad`, as `loss.backward()` does, hooks and all, and return it.

        Buffers that are collected move by `buffer_changes`. Random draws advance the global state,
        so that the next call draws anew.
        """
        parameters = self._named()
        result = self._meta_gradient(tasks, parameters, progress, metric, put_back=False)
        learned = [parameters[name] for name in result.grads]
        torch.autograd.backward(learned, [grad.clone() for grad in result.grads.values()])
        for name, change in result.buffer_changes.items():
            self.model.get_buffer(name.removeprefix("model.")).add_(change)
        return result

    @_differentiating
    @checked()
    def evaluate(
        self,
        tasks: Annotated[Tasks, UNCHECKED],
        *,
        steps: CountFrom0 | None = None,
        metric: Metric | None = None,
        norm_statistics: NormStatistics | None = None,
    ) -> Evaluation:
        """Adapt to each task and judge on its query set, with no meta-gradient.

        The model runs in `eval()` mode (no dropout), batch norm by the learner's `norm_statistics`
        unless given: by default those of the batch, the field's transductive convention; with
        `"support"` or `"running"` no query example knows of another. `steps`
        overrides the trained number of inner steps; `metric(prediction, target)` is computed before
        adaptation and after each step.

        Raises `BlockError` for more steps than a per-step block was set up for.
        """
        tasks = as_tasks(tasks)
        check_tasks(tasks, self.batches, self.steps if steps is None else steps)
        parameters = self._named()
        inner, meta, buffers = self._inner_at_evaluation(
            tasks, parameters, steps, metric, norm_statistics
        )
        alone = [Task(*map_tensors(constant, (tasks[0].support, tasks[0].query)))]
        self._check_reads(inner, parameters, buffers, alone, reach=False)
        work = evaluation_work(self._identity, inner, meta, self._check_constant)
        with seeded(tasks, inner, put_back=True) as tasks:
            _, result = execute(self.executor, work, buffers, tasks)
        losses, predictions, scores = result
        predictions = predictions if inner.loss.predicts else None
        return Evaluation(losses, predictions, scores if metric is not None else None)

    @_differentiating
    @checked()
    def adapt(self, support: Batch, *, steps: CountFrom0 | None = None) -> nn.Module:
        """A copy of the model adapted to one support batch, in `eval()` mode, ready to predict.

        Its batch norms carry the support set's statistics of the last inner step (with
        `norm_statistics="running"` the stored ones): in `eval()` it predicts one example at a time, in
        `train()` it gives the transductive numbers of `evaluate`. Per-step batch norms have become
        ordinary ones, with the row of that step; where they evaluate by running statistics, these are
        what they carry. Frozen parameters that do not adapt are the model's own, not copies.
        """
        task = Task(*map_tensors(constant, (support, support)))
        steps = self.steps if steps is None else steps
        check_tasks([task], self.batches, steps, judged=False)
        parameters = self._named()
        inner, meta, buffers = self._inner_at_evaluation([task], parameters, steps, judged=False)
        batch = self._first_batch(task.support)
        whole = replace(inner, batches=FullBatch())
        self._check_reads(whole, parameters, buffers, [Task(batch, batch)], reach=False)
        drawn = seeded([task], inner, put_back=True)
        with drawn as tasks, inner.draws.seeded(tasks[0].seed), inner.draws.observed():
            last = carry = inner.start(meta, buffers, inner.support_of(task, -1))
            for index in range(inner.steps):
                last = carry
                carry, _ = inner.step(meta, carry, inner.support_of(task, index), index)
            replaced = self.norm_statistics != "running" and inner.support_loss.predicts
            support = inner.support_of(task, max(inner.steps - 1, 0))
            copying = Draws(inner.draws.generators)  # which may draw what no pass does
            with copying.put_back(), copying.observed():
                return adapted_model(
                    self.model, carry, last, inner.steps, support, replaced=replaced
                )

    def __getstate__(self) -> dict[str, Any]:
        caches = {"_draws": {}, "_read": (), "_objectives": {}, "_identity": object()}
        return self.__dict__ | caches

    def _meta_gradient(
        self,
        tasks: Tasks,
        parameters: Parameters,
        progress: Progress | None,
        metric: Metric | None,
        *,
        put_back: bool,
    ) -> MetaGradient:
        tasks, progress = as_tasks(tasks), progress or Progress()
        share = share_of(self.executor)
        if share.processes == 1 or tasks != []:  # one of several processes may have none
            check_tasks(tasks, self.batches, self.steps, differentiated=True)
            tasks = self.estimator.in_training(tasks)
        first, weight = share.place(len(tasks), float(total_weight(tasks)))
        if not weight:
            raise TaskError(
                "all weights of tasks are 0; weights are 0 or more and finite, and one of them is above "
                "0",
                block="TaskBatch",
                field="weight",
            )
        through = steps_through(self.order, self.steps, progress)
        weights = step_weights(self.step_loss, self.steps, progress)
        inner, meta, buffers = self._inner(
            tasks, parameters, self.steps, through, weights, metric=metric
        )
        with seeded(tasks, inner, first=first, put_back=put_back) as tasks:
            self._check_reads(inner, parameters, buffers, tasks, reach=True)
            work = training_work(self._identity, self.estimator, inner, meta)
            totals, (query_losses, scores) = execute(self.executor, work, buffers, tasks)
        grads, changes, metrics, loss = totals
        if loss.requires_grad:
            self._check_constant(loss)
        grads = {name: grad / weight for name, grad in grads.items()}
        changes = {
            f"model.{name}": (change / weight).to(self.model.get_buffer(name).dtype)
            for name, change in changes.items()
        }
        metrics = {name: total / weight for name, total in metrics.items()}
        return MetaGradient(
            loss / weight, grads, query_losses, changes, metrics, None if metric is None else scores
        )

    def _first_batch(self, support: Batch) -> Batch:
        """The batch of the first step, where nothing is drawn."""
        return self.batches.select(support, None, 0)

    def _inner(
        self,
        tasks: Tasks,
        parameters: Parameters,
        steps: int,
        through: tuple[bool, ...],
        weights: tuple[float, ...],
        training: bool | None = None,
        metric: Metric | None = None,
        norm_statistics: NormStatistics | None = None,
        judged: bool = True,
    ) -> tuple[InnerLoop, Tensors, Tensors]:
        """The inner loop as everything is now, the meta-parameters, and a task's buffers as it begins.

        A model that has not run yet runs on the first support set, as often as a task asks for, to tell
        what it writes. If nothing is `judged`, the support loss stands for both.
        """
        statistics = norm_statistics or self.norm_statistics
        model = self._functional_model(statistics).now()
        predicting = None
        if statistics == "support" and model.statistics:
            predicting = self._functional_model("running").now()
        rule = self._functional_rule.now()
        loss, support_loss = self._losses(parameters)
        loss = loss if judged else support_loss
        if metric is not None and not loss.predicts:
            raise BlockError(
                f"metric is {name_of(metric)}, but the loss {name_of(self.loss)} takes no prediction, so "
                "that none is made; give the loss (prediction, target) in the first places, or no metric",
                block="MetaLearner",
                field="metric",
            )
        meta = detach(self._learned(parameters))
        frozen = detach({n: p for n, p in parameters.items() if n not in meta})
        buffers = detach(model.state().buffers)
        runs = len(tasks) > 0 and (support_loss.predicts or loss.predicts)
        for view in (model, predicting):
            if view is None or not runs or view.was_watched(steps + 1, training=training):
                continue
            if support_loss.predicts:
                batch = self._first_batch(tasks[0].support)
            else:
                batch = self.batches.query(tasks[0].query, 0)
            check_inference(self)
            params = {
                name: p.detach().requires_grad_(p.requires_grad)
                for name, p in model.state().params.items()
            }
            held = Draws(generators_of(params, view.generators))
            with held.put_back(), held.observed():
                view.watch(ModuleState(params, buffers), batch[0], steps + 1, training=training)
        changing = model.changing_buffers(training=training) if runs else frozenset()
        inner = InnerLoop(
            model=model,
            rule=rule,
            loss=loss,
            support_loss=support_loss,
            adapted=self._adapted(parameters),
            constants=frozen,
            model_buffers={n: b for n, b in buffers.items() if n not in changing},
            rule_buffers=detach(rule.state().buffers),
            loss_buffers=loss.buffers | support_loss.buffers,
            steps=steps,
            through=through,
            draws=self._draws_of(training, (model, rule), (loss, support_loss), metric),
            weights=dict(_weight_tensors(weights)),
            collected=tuple(n for n in buffers if n in model.collected and n in changing),
            training=training,
            metric=metric,
            predicting=predicting,
            batches=self.batches,
            starting=self.start,
            reshapes=isinstance(one := executor_of(self), Loop) and not one.compile,
            shapes_held=shapes_held(self.rule),
        )
        return inner, meta, {n: b for n, b in buffers.items() if n in changing}

    def _inner_at_evaluation(
        self,
        tasks: Tasks,
        parameters: Parameters,
        steps: int | None,
        metric: Metric | None = None,
        norm_statistics: NormStatistics | None = None,
        judged: bool = True,
    ) -> tuple[InnerLoop, Tensors, Tensors]:
        """In `eval()` mode, through no step; the last query loss counts."""
        steps = self._evaluation_steps(steps)
        if norm_statistics is not None:
            check_compatible(self._assembly(norm_statistics))
        weights = (0.0,) * steps + (1.0,)
        through, norms = (False,) * steps, norm_statistics
        return self._inner(tasks, parameters, steps, through, weights, False, metric, norms, judged)

    def _functional_model(self, norm_statistics: NormStatistics) -> FunctionalModule:
        if norm_statistics not in self._functional_models:
            made = FunctionalModule(self.model, norm_statistics=norm_statistics)
            self._functional_models[norm_statistics] = made
        return self._functional_models[norm_statistics]

    def _objective(self, role: LossRole) -> Objective:
        loss = getattr(self, role)
        known = self._objectives.get(role)
        if known is None or known.loss is not loss:
            known = self._objectives[role] = Objective.of(loss, role)
        return known

    @property
    def _objectives_now(self) -> tuple[Objective, Objective]:
        loss = self._objective("loss")
        return loss, loss if self.support_loss is None else self._objective("support_loss")

    def _losses(self, parameters: Parameters) -> tuple[Loss, Loss]:
        """`loss` and `support_loss` as they are now."""
        loss, support_loss = self._objectives_now
        judge = loss.now(parameters.items())
        return judge, judge if support_loss is loss else support_loss.now(parameters.items())

    def _draws_of(
        self,
        training: bool | None,
        blocks: tuple[ModuleView, ...],
        losses: tuple[Loss, ...],
        metric: Metric | None,
    ) -> Draws:
        """The draws of work on these blocks, in this mode; the last few are remembered."""
        views = [*blocks, *(loss.view for loss in losses if loss.view is not None)]
        functions = (*(loss.objective.loss for loss in losses), metric)
        key = (training, *(view.key for view in views), *map(Same, functions))
        if key not in self._draws:
            held = [generator for view in views for generator in view.generators]
            held += [generator for function in functions for generator in generators_in(function)]
            kept = [*self._draws.items()][-7:]
            draws = Draws(generators_of(self.learned, held))
            self._draws = {**dict(kept), key: draws}
        return self._draws[key]

    def _assembly(self, norm_statistics: NormStatistics | None = None) -> Assembly:
        """The learner's choices, as they are now."""
        parameters = self._named()
        return Assembly(
            model=self.model,
            loss=self._objectives_now[0],
            support_loss=self._objectives_now[1],
            steps=self.steps,
            start=self.start,
            batches=self.batches,
            rule=self.rule,
            order=self.order,
            step_loss=self.step_loss,
            estimator=self.estimator,
            adapted=self._adapted(parameters),
            parameters=parameters,
            norm_statistics=norm_statistics or self.norm_statistics,
            allow_unused=self.allow_unused,
        )

    def _check_blocks(self) -> None:
        """Raise `BlockError` for a block put there since, where what is set up goes by the one before."""
        made_for = {
            "model": self._functional_model(self.norm_statistics).module,
            "rule": self._functional_rule.module,
        }
        changed = [name for name, block in made_for.items() if getattr(self, name) is not block]
        if not changed and self.estimator.inner_rule(self.rule) is not self.rule:
            changed = ["estimator"]
        for name in changed:
            raise BlockError(
                f"{name} is a {name_of(getattr(self, name))} that was put there after the learner was "
                "made, and what is set up goes by the one before; make a new MetaLearner with it",
                block="MetaLearner",
                field=name,
            )

    def _named(self) -> Parameters:
        """The parameters as they are now, to be found once in a call."""
        return dict(self.named_parameters())

    def _learned(self, parameters: Parameters) -> Tensors:
        return learned(parameters, self.start, self.model)

    def _check_reads(
        self,
        inner: InnerLoop,
        parameters: Parameters,
        buffers: Tensors,
        tasks: Tasks,
        *,
        reach: bool,
    ) -> None:
        """Once for each state of model, rule and losses: nothing trainable is read but meta-parameters.

        And the losses go with the rest as they are now. With `reach`, once for all: the tasks reach all
        of these; and in every call, if something else that is trainable is at hand to be read.
        """
        flags = tuple([parameter.requires_grad for parameter in parameters.values()])
        beside = trainable_beside(parameters.values(), inner)
        again = reach and bool(beside)
        losses = (loss.objective.loss for loss in (inner.loss, inner.support_loss))
        functions = map(Same, (*losses, inner.metric))
        key = (inner.model.key, inner.rule.key, *functions, flags, *map(id, beside))
        fresh, reach = key not in self._read, reach and not self._reached
        if fresh:
            check_losses(self._assembly())
        with inner.draws.put_back() if fresh or reach or again else nullcontext():
            if reach:
                check_reach(self._assembly(), inner, buffers, tasks, share_of(self.executor))
                self._reached = True
            elif (fresh or again) and len(tasks):
                check_reads(self._assembly(), inner, buffers, tasks[0])
        if fresh and len(tasks):
            self._read = (*self._read[-7:], key)

    def _check_constant(self, loss: Tensor) -> None:
        check_constant(loss, self._assembly())

    def _evaluation_steps(self, steps: int | None) -> int:
        steps = self.steps if steps is None else steps
        if self.max_steps is not None and steps > self.max_steps:
            raise BlockError(
                f"{steps} inner steps asked for, but a per-step block of this learner is set up for "
                f"{self.max_steps}; take at most {self.max_steps}",
                block="MetaLearner",
                field="steps",
            )
        return steps


@lru_cache(maxsize=16)
def _weight_tensors(weights: tuple[float, ...]) -> list[tuple[int, Tensor]]:
    """The weights of query losses that count, by the carry, as tensors; nobody writes into them."""
    return [
        (index, torch.tensor(weight, dtype=torch.float64, device="cpu"))
        for index, weight in enumerate(weights)
        if weight
    ]
