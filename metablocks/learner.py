"""The meta-learner: seven independent choices put together.

It holds the meta-parameters and hands each block what it needs; the mathematics is in the blocks.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metablocks.adapted import adapted_model
from metablocks.checks import UNCHECKED, CountFrom0, checked, name_of, wrong_answer
from metablocks.compatibility import Assembly, check_compatible
from metablocks.derivatives import detach_tree
from metablocks.diagnose import unfit_data
from metablocks.errors import BlockError, MetablocksError, TaskError, concerning
from metablocks.estimators import Estimator, Unrolled
from metablocks.estimators.base import filled, is_cut, task_gradient
from metablocks.estimators.sweep import start, step
from metablocks.executors import Executor, Loop, TaskWork, check_tasks, share_of
from metablocks.fingerprint import Same, fingerprint
from metablocks.functional import (
    FunctionalModule,
    ModuleState,
    ModuleView,
    NormStatistics,
    detach,
    norm_buffers,
    step_aware_modules,
)
from metablocks.generators import Draws, generators_of
from metablocks.inner_loop import Carry, InnerLoop, QueryPass
from metablocks.order import Order, SecondOrder, steps_through
from metablocks.pieces import At, InPieces, Pieces
from metablocks.reach import (
    check_constant,
    check_inference,
    check_reach,
    check_reads,
    trainable_flags,
)
from metablocks.rules.base import UpdateRule
from metablocks.selection import select_parameters
from metablocks.step_loss import FinalStepLoss, StepLoss, step_weights
from metablocks.twins import Survey
from metablocks.types import Batch, Progress, Task, Tasks, Tensors, map_tensors

Metric = Callable[[Any, Any], Any]
"""`(prediction, target) -> score`: a scalar tensor, or a number."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _differentiating(method: Method) -> Method:
    """The method with gradients enabled, whatever the caller's mode; data at fault is named."""

    data = list(inspect.signature(method).parameters)[1]

    @wraps(method)
    def run(learner: "MetaLearner", *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                return method(learner, *args, **kwargs)
            except MetablocksError:
                raise
            except Exception as error:
                given = args[0] if args else kwargs[data]
                if given == []:
                    raise
                batch = given if data == "support" else given[0].support
                reason = unfit_data(error, learner.model, batch)
                if not reason:
                    raise
                raise TaskError(reason, block=method.__name__, field=data) from error

    return run  # type: ignore[return-value]


class MetaGradient(NamedTuple):
    """Result of `meta_gradient` and `backward`."""

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
    """Result of `evaluate`."""

    query_losses: Tensor
    """`[tasks, steps + 1]`: before adaptation, then after each step."""
    predictions: Any
    """The model's output on the query set after the last step, `[tasks, examples, ...]`; what of it is
    not a tensor of one shape is a list by task."""
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
    - `loss`: `(prediction, target) -> scalar`.
    - `steps`: inner steps on the support set.
    - `rule`, `order`, `step_loss`, `estimator`, `executor`: one block for each axis. `rule` is set up
      here, for the adapted parameters.
    - `adapt`: patterns that select which parameters move inside a task (see `selection`). Frozen
      parameters (`requires_grad=False`) neither move nor get a meta-gradient; freezing and unfreezing
      count from the next call on.
    - `norm_statistics`: what batch norms normalise by, in the inner loop, the query pass and at
      evaluation: `"batch"`, the statistics of the batch at hand; `"running"`, those they have
      stored, for a pre-trained net; or `"support"`, at evaluation the support set's of the last step
      before the query pass, as what `adapt` returns does, and in training those of the batch. Stored
      statistics are neither updated nor replaced.
    - `allow_unused`: patterns of meta-parameters that no task need reach (`"experts.*"`).

    `named_parameters()` gives the model's parameters under `model.` and the rule's under `rule.`.

    Laws: `meta_gradient`, `evaluate` and `adapt` leave parameters, buffers, plain attributes of modules,
    `.grad`, training flags and random states bit-identical, also when the loss raises. A batch's
    gradient is the mean of its tasks', whatever their order and the executor. What is changed between
    two calls is seen by the next. Every trainable tensor that the loss depends on is a meta-parameter,
    or is refused by name.

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
        steps: CountFrom0,
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
        self.steps = steps
        self.rule = rule
        self.order = order or SecondOrder()
        self.step_loss = step_loss or FinalStepLoss()
        self.estimator = estimator or Unrolled()
        self.executor = executor or Loop()
        _check_loss(loss)
        rule = self.rule = self.estimator.inner_rule(rule)
        self.norm_statistics = norm_statistics
        self.allow_unused = (
            (allow_unused,) if isinstance(allow_unused, str) else tuple(allow_unused)
        )
        self._functional_models: dict[NormStatistics, FunctionalModule] = {}
        self._functional_model(_in_training(norm_statistics))
        self._patterns = adapt
        self._selected: tuple[Hashable, tuple[str, ...]] = ((), ())
        parameters = dict(model.named_parameters())
        rule.setup({name: parameters[name].detach() for name in self.adapted}, steps)
        self._functional_rule = FunctionalModule(rule)
        self._identity = object()  # tells this learner's compiled functions from another's
        self._draws: dict[Hashable, Draws] = {}
        self._read: tuple[Hashable, ...] = ()
        self._reached = False
        self._evaluation_steps(steps)
        check_compatible(self._assembly())

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the parameters that move inside a task, frozen ones left out."""
        flags = tuple((name, p.requires_grad) for name, p in self.model.named_parameters())
        if self._selected[0] != flags:
            with concerning("MetaLearner", "adapt"):
                self._selected = flags, select_parameters(self._patterns, self.model)
        return self._selected[1]

    @property
    def max_steps(self) -> int | None:
        """The most inner steps that can be taken, where a block is made for so many; else None."""
        limits = [
            self.rule.max_steps,
            *(module.max_steps for module in step_aware_modules(self.model).values()),
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

        `tasks` is a `TaskBatch`, or a list of `Task` where sizes differ. Random draws start from the
        current global state, which is put back. `metric(prediction, target)` is taken of every query
        pass that is made anyway (`scores`).

        Raises `GradientError` for a meta-parameter that no task of the first batch reaches, and for
        trainable tensors that the loss reads and that are none; `TaskError` for malformed tasks, and
        what the blocks raise.
        """
        return self._meta_gradient(tasks, progress or Progress(), metric, put_back=True)

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
        result = self._meta_gradient(tasks, progress or Progress(), metric, put_back=False)
        parameters = self._meta_parameters()
        torch.autograd.backward(
            list(parameters.values()), [result.grads[name].clone() for name in parameters]
        )
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
        check_tasks(tasks)
        inner, buffers = self._inner_at_evaluation(tasks, steps, metric, norm_statistics)
        work = self._evaluation_work(inner, detach(self._meta_parameters()))
        with inner.draws.put_back():
            _, result = self._execute(work, buffers, tasks)
        losses, predictions, scores = result
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
        task = Task(*map_tensors(torch.Tensor.detach, (support, support)))
        check_tasks([task])
        inner, buffers = self._inner_at_evaluation([task], steps)
        meta = detach(self._meta_parameters())
        with inner.draws.put_back():
            self._check_reads(inner, buffers, [task], reach=False)
        with inner.draws.put_back(), inner.draws.observed():
            last = carry = inner.start(meta, buffers)
            for index in range(inner.steps):
                last = carry
                carry, _ = inner.step(meta, carry, task.support, index)
            replaced = self.norm_statistics != "running"
            return adapted_model(
                self.model, carry, last, inner.steps, task.support, replaced=replaced
            )

    def __getstate__(self) -> dict[str, Any]:
        caches = {"_draws": {}, "_read": (), "_identity": object()}
        return self.__dict__ | caches

    def _meta_gradient(
        self, tasks: Tasks, progress: Progress, metric: Metric | None, *, put_back: bool
    ) -> MetaGradient:
        share, count = share_of(self.executor), 0
        if share.processes == 1 or tasks != []:  # one of several processes may have none
            count = check_tasks(tasks, differentiated=True)
        _, weight = share.place(count, count)
        through = steps_through(self.order, self.steps, progress)
        weights = step_weights(self.step_loss, self.steps, progress)
        inner, buffers = self._inner(tasks, self.steps, through, weights, metric=metric)
        with inner.draws.put_back():
            self._check_reads(inner, buffers, tasks, reach=True)
        work = self._work(inner, detach(self._meta_parameters()))
        with inner.draws.put_back() if put_back else nullcontext():
            totals, (query_losses, scores) = self._execute(work, buffers, tasks)
        grads, changes, metrics, loss = totals
        grads = {name: grad / weight for name, grad in grads.items()}
        changes = {f"model.{name}": _mean(change, weight) for name, change in changes.items()}
        metrics = {name: total / weight for name, total in metrics.items()}
        return MetaGradient(
            loss / weight, grads, query_losses, changes, metrics, None if metric is None else scores
        )

    def _work(self, inner: InnerLoop, meta: Tensors) -> TaskWork:
        """The estimator as a function of tasks that may be compiled."""
        estimator = self.estimator
        cut = is_cut(estimator)
        meta_gradient = estimator.in_pieces if cut else partial(Estimator.in_pieces, estimator)

        def estimate(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
            meta, tensors = shared
            result = task_gradient(estimator, replace(inner, **tensors), meta, buffers, task)
            totals = (filled(result.grads, meta), result.changes, result.metrics, result.loss)
            scores = () if result.scores is None else result.scores
            return totals, (result.query_losses, scores)

        def drive(run: Pieces) -> tuple[Any, Any]:
            result = meta_gradient(run)
            totals = run.sum((result.changes, result.metrics, result.loss))
            scores = () if result.scores is None else result.scores
            return (filled(result.grads, meta), *totals), (result.query_losses, scores)

        def short() -> TaskWork:
            return self._work(inner.shortened(), meta)

        pieces = InPieces(inner, meta, drive, short if cut else None)
        return self._compilable(TaskWork(estimate, inner.draws, pieces), estimator)

    def _evaluation_work(self, inner: InnerLoop, meta: Tensors) -> TaskWork:
        """Losses, predictions and scores after each step as a function of tasks that may be compiled."""
        norms = norm_buffers(self.model)

        def judge(shared: Any, buffers: Tensors, task: Task) -> tuple[Any, Any]:
            meta, tensors = shared
            support, query = map_tensors(torch.Tensor.detach, (task.support, task.query))
            loop = replace(inner, **tensors)
            return drive(Pieces(loop, meta, buffers, Task(support, query)))

        def statistics(
            inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
        ) -> tuple[Carry]:
            return (inner.with_statistics(meta, carry, batch, norms),)

        def drive(run: Pieces) -> tuple[Any, Any]:
            passes: list[QueryPass] = []
            (carry,) = run(("start",), start, (run.buffers,), fuse=False)
            if inner.predicting is not None:  # before the first step, by the support set, too
                (carry,) = run(("statistics",), statistics, (carry,), data=("support",))
            for index in range(inner.steps + 1):
                at = At(index)
                passed, prediction = run(("judge",), _judge, (carry,), at=at, data=("query",))
                passes.append(run.open(passed))
                if passes[-1].loss.requires_grad:
                    check_constant(passes[-1].loss, self._assembly())
                if index < inner.steps:
                    (carry,) = run(("step", False), step, (carry,), at=at, data=("support",))
            losses = torch.stack([passed.loss.detach() for passed in passes], -1)
            scores = [passed.score for passed in passes if passed.score is not None]
            rows = torch.stack(scores, -1) if scores else ()
            return (), (losses, detach_tree(run.open(prediction)), rows)

        cut = InPieces(inner, meta, drive, lambda: self._evaluation_work(inner.shortened(), meta))
        return self._compilable(TaskWork(judge, inner.draws, cut), "evaluation")

    def _compilable(self, work: TaskWork, kind: Hashable) -> TaskWork:
        """The work with its key, which tells it from work of another kind."""
        assert work.pieces is not None
        inner = work.pieces.inner

        def identify() -> Hashable:
            functions = map(fingerprint, (self.loss, inner.metric))
            blocks = (self._identity, kind, inner.training, inner.model.key, inner.rule.key)
            return (*blocks, *functions)

        return replace(work, identify=identify)

    def _execute(self, work: TaskWork, buffers: Tensors, tasks: Tasks) -> tuple[Any, Any]:
        """`work((meta, tensors of the inner loop), buffers, task)` on every task."""
        assert work.pieces is not None
        answer = self.executor(work, work.pieces.shared, buffers, tasks)
        if not isinstance(answer, tuple) or len(answer) != 2:
            takes = "a pair: the sum over tasks, and what is stacked"
            raise wrong_answer("executor", name_of(self.executor), answer, takes)
        return answer

    def _inner(
        self,
        tasks: Tasks,
        steps: int,
        through: tuple[bool, ...],
        weights: tuple[float, ...],
        training: bool | None = None,
        metric: Metric | None = None,
        norm_statistics: NormStatistics | None = None,
    ) -> tuple[InnerLoop, Tensors]:
        """The inner loop as everything is now, and the buffers that a task begins with.

        A model that has not run yet runs on the first support set, to tell which buffers it changes.
        """
        model = self._functional_model(norm_statistics or _in_training(self.norm_statistics)).now()
        predicting = None
        if norm_statistics == "support":
            predicting = self._functional_model("running").now()
        rule = self._functional_rule.now()
        frozen = detach({n: p for n, p in self.named_parameters() if not p.requires_grad})
        params, buffers = map(detach, model.state())
        for view in (model, predicting):
            if view is None or view.was_run(training=training) or not len(tasks):
                continue
            held = Draws(generators_of(params, view.generators))
            with held.put_back(), held.observed():
                check_inference(self)
                view.apply(ModuleState(params, buffers), tasks[0].support[0], training=training)
        changing = model.changing_buffers(training=training)
        inner = InnerLoop(
            model=model,
            rule=rule,
            loss_fn=self.loss,
            adapted=self.adapted,
            constants=frozen,
            model_buffers={n: b for n, b in buffers.items() if n not in changing},
            rule_buffers=detach(rule.state().buffers),
            steps=steps,
            through=through,
            draws=self._draws_of(training, model, rule, metric),
            weights={
                index: torch.tensor(weight, dtype=torch.float64, device="cpu")
                for index, weight in enumerate(weights)
                if weight
            },
            collected=tuple(n for n in buffers if n in model.collected and n in changing),
            training=training,
            metric=metric,
            predicting=predicting,
        )
        return inner, {n: b for n, b in buffers.items() if n in changing}

    def _inner_at_evaluation(
        self,
        tasks: Tasks,
        steps: int | None,
        metric: Metric | None = None,
        norm_statistics: NormStatistics | None = None,
    ) -> tuple[InnerLoop, Tensors]:
        """In `eval()` mode, through no step; the last query loss counts."""
        steps = self._evaluation_steps(steps)
        if norm_statistics is not None:
            check_compatible(self._assembly(norm_statistics))
        weights = (0.0,) * steps + (1.0,)
        norms = norm_statistics or self.norm_statistics
        return self._inner(tasks, steps, (False,) * steps, weights, False, metric, norms)

    def _functional_model(self, norm_statistics: NormStatistics) -> FunctionalModule:
        if norm_statistics not in self._functional_models:
            made = FunctionalModule(self.model, norm_statistics=norm_statistics)
            self._functional_models[norm_statistics] = made
        return self._functional_models[norm_statistics]

    def _draws_of(
        self, training: bool | None, model: ModuleView, rule: ModuleView, metric: Metric | None
    ) -> Draws:
        """The draws of work on model and rule as they are, in this mode; the last few are remembered."""
        key = (training, model.key, rule.key, Same(self.loss), Same(metric))
        if key not in self._draws:
            held = [*model.generators, *rule.generators]
            held += Survey(self.loss).generators if isinstance(self.loss, nn.Module) else []
            kept = [*self._draws.items()][-7:]
            draws = Draws(generators_of(self._meta_parameters(), held))
            self._draws = {**dict(kept), key: draws}
        return self._draws[key]

    def _assembly(self, norm_statistics: NormStatistics | None = None) -> Assembly:
        """The learner's choices, as they are now."""
        return Assembly(
            model=self.model,
            loss=self.loss,
            steps=self.steps,
            rule=self.rule,
            order=self.order,
            step_loss=self.step_loss,
            estimator=self.estimator,
            adapted=self.adapted,
            parameters=dict(self.named_parameters()),
            norm_statistics=norm_statistics or self.norm_statistics,
            allow_unused=self.allow_unused,
        )

    def _meta_parameters(self) -> Tensors:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _check_reads(
        self, inner: InnerLoop, buffers: Tensors, tasks: Tasks, *, reach: bool
    ) -> None:
        """Once for each state of model, rule and loss: nothing trainable is read but meta-parameters.

        With `reach`, once for all: the tasks reach all of these.
        """
        flags = trainable_flags(self.parameters(), inner)
        key = (inner.model.key, inner.rule.key, Same(self.loss), Same(inner.metric), flags)
        if reach and not self._reached:
            check_reach(self._assembly(), inner, buffers, tasks, share_of(self.executor))
            self._reached = True
        elif key not in self._read and len(tasks):
            check_reads(self._assembly(), inner, buffers, tasks[0])
        if key not in self._read and len(tasks):
            self._read = (*self._read[-7:], key)

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


def _judge(
    inner: InnerLoop, meta: Tensors, totals: Tensors, at: At, carry: Carry, batch: Batch
) -> tuple[QueryPass, Any]:
    passed = inner.query(meta, carry, batch, at.index)
    return passed._replace(prediction=None), passed.prediction


def _check_loss(loss: Any) -> None:
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise BlockError(
            f"the loss {type(loss).__name__} has trainable parameters, which no gradient "
            "would reach; put them into the model, or freeze them with requires_grad_(False)",
            block="MetaLearner",
            field="loss",
        )


def _in_training(norm_statistics: NormStatistics) -> NormStatistics:
    return "batch" if norm_statistics == "support" else norm_statistics


def _mean(total: Tensor, weight: float) -> Tensor:
    """The mean of tensors of this weight that add up to `total`; integers stay integers."""
    return (total / weight).to(total.dtype)
