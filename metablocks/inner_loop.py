"""The inner loop: one step, and the one loop around it.

    g_k = ∇L_s(θ_k),    θ_{k+1} = θ_k + rule(g_k)

`support_pass` is the left half, `step` the right one, and the only place where fast weights are
made. Everything above is written in terms of them: `adapt` for a loss function of one's own,
`InnerLoop` for a whole learner, and every estimator on top of `InnerLoop`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from metablocks.batches import Batches, FullBatch, Side
from metablocks.checks import CountFrom0, checked, name_of, shown, wrong_answer
from metablocks.derivatives import detach_tree, gradient, nodes_of, transformed
from metablocks.errors import BlockError, GradientError, RuleError, TaskError
from metablocks.functional import ModuleState, ModuleView, detach, module_arguments, trainable
from metablocks.generators import Draws, Watch, Written, storage
from metablocks.objective import Loss, LossRole, Pass
from metablocks.order import Order, SecondOrder, steps_through
from metablocks.per_step import Position
from metablocks.rules.base import StepInfo, TracedStep, UpdateRule, answer_of, check_updates
from metablocks.start import AsLearned, Start
from metablocks.types import (
    Batch,
    Progress,
    Task,
    Tensors,
    as_input,
    map_tensors,
    tensors_of,
    versions_of,
)

StatefulLoss: TypeAlias = Callable[[Tensors, Tensors], tuple[Tensor, Tensors]]
"""`(params, buffers) -> (scalar loss, new buffers)`, the data being bound already."""

Rule: TypeAlias = Callable[[Tensors, Any, StepInfo], tuple[Tensors, Any]]


class Carry(NamedTuple):
    """State carried between inner steps; a pytree.

    >>> import torch
    >>> import metablocks as mb
    >>> carry = mb.Carry(params={"w": torch.zeros(2)}, rule=(), buffers={})
    >>> carry._replace(params={"w": carry.params["w"] + 1}).params
    {'w': tensor([1., 1.])}
    """

    params: Tensors
    """The fast weights: adapted parameters only, in their own shapes."""
    rule: Any
    """The rule's own state."""
    buffers: Tensors
    """The model's buffers, as the last support pass left them."""


class SupportPass(NamedTuple):
    """Gradient, loss and buffers of the support batch at a carry."""

    gradients: Tensors
    """∇L_s(θ_k), by the names of the fast weights."""
    loss: Tensor
    """L_s(θ_k), a constant scalar."""
    buffers: Tensors
    """The model's buffers as this pass left them."""
    written: Tensors = {}  # noqa: RUF012  (nobody writes into it)
    """By how much the pass changed fast weights in place, of a model that does so; constants."""


def support_pass(loss: StatefulLoss, carry: Carry, rest: Tensors, *, through: bool) -> SupportPass:
    """g_k = ∇L_s(θ_k): the gradient that an inner step goes by.

    `rest` holds the parameters that the loss needs and the step leaves alone. `through` says whether
    derivatives flow through the gradient; if not, it is taken at detached parameters, which is the
    same as detaching it and builds no graph.
    """
    fixed = rest if through else detach(rest)

    def support_loss(fast: Tensors) -> tuple[Tensor, Tensors]:
        value, buffers = loss({**fixed, **fast}, carry.buffers)
        return check_scalar(value), buffers

    gradients, value, buffers = gradient(support_loss, carry.params, differentiable=through)
    if not through and not any(buffer.requires_grad for buffer in carry.buffers.values()):
        buffers = detach_tree(buffers)
    return SupportPass(gradients, value, buffers)


def step(
    carry: Carry,
    support: SupportPass,
    rule: Rule,
    *,
    index: int,
    steps: int,
    position: Position | None = None,
) -> Carry:
    """θ_{k+1} = θ_k + rule(g_k): inner step `index` of `steps`, on what the support pass gave."""
    start = carry.params
    if support.written:
        start = start | {name: start[name] + move for name, move in support.written.items()}
    at = StepInfo(index, steps, start)
    if position is not None:
        at = TracedStep(index, steps, start, position)
    try:
        answer = rule(support.gradients, carry.rule, at)
    except (Written, RuntimeError) as error:
        # θ_0 is a view of the leaf; what is a leaf itself is the rule's own.
        if isinstance(error, Written) or "a view of a leaf Variable" in str(error):
            raise _writes(rule) from error
        raise
    updates, state = answer_of(rule, answer)
    check_updates(updates, start)
    params = {name: parameter + updates[name] for name, parameter in start.items()}
    return Carry(params, state, support.buffers)


class QueryPass(NamedTuple):
    """Loss and prediction of a query batch at a carry."""

    loss: Tensor
    """A scalar."""
    prediction: Any
    buffers: Tensors
    """The model's buffers as this pass left them. They are not handed on to later steps."""
    score: Tensor | None = None
    """The metric of the prediction, a constant; None without a metric."""


class Reached(NamedTuple):
    """The point that an inner loop has reached, beside its fast weights."""

    rule: Any
    """The rule's own state."""
    steps: int
    """The number of steps taken."""


class Trajectory(NamedTuple):
    """Result of `adapt`.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.tensor(2.0)}
    >>> rule = mb.LearningRate(0.25).setup(params, steps=1)
    >>> trajectory = mb.adapt(lambda params, batch: params["w"] ** 2, params, (), rule=rule, steps=1)
    >>> trajectory.params[-1], trajectory.losses
    ({'w': tensor(1.)}, tensor([4.]))
    """

    params: list[Tensors]
    """[θ_0, …, θ_K], each a dict of all parameters, differentiable by autograd."""
    losses: Tensor
    """The support losses `[K]` at θ_0 … θ_{K−1}: numbers to read, cut off from autograd."""
    state: Reached
    """The state from which `adapt` goes on, at the last of `params`."""


@checked()
def adapt(
    loss_fn: Callable[[Tensors, Batch], Tensor],
    params: Tensors,
    batch: Any,
    *,
    rule: UpdateRule,
    steps: CountFrom0,
    order: Order | None = None,
    progress: Progress | None = None,
    state: Reached | None = None,
) -> Trajectory:
    """Adapt parameters to one batch by `steps` inner steps.

    `loss_fn(params, batch)` returns a scalar. Every parameter moves except frozen ones (an
    `nn.Parameter` with `requires_grad=False`). `order` is `SecondOrder()` unless given. With the
    `state` of a trajectory and the last of its `params` the inner loop goes on, on any batch: the rule's
    state and the index of the step are as they were left. (Online learning, bilevel loops.)

    Law: `adapt` is its hand-written loop, θ_{k+1} = θ_k + rule(∇ loss_fn(θ_k)); the result is
    differentiable with respect to `params`, the rule's parameters and the batch, by autograd and by
    `torch.func` alike. n + m steps in two calls are n + m steps in one, derivatives included, for rules
    and orders that do not go by the number of steps.

    Source: Finn, Abbeel, Levine 2017.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.tensor([4.0])}
    >>> rule = mb.LearningRate(0.25).setup(params, steps=2)
    >>> square = lambda params, batch: (params["w"] ** 2).sum()
    >>> [float(p["w"]) for p in mb.adapt(square, params, (), rule=rule, steps=2).params]
    [4.0, 2.0, 1.0]
    >>> once = mb.adapt(square, params, (), rule=rule, steps=1)
    >>> twice = mb.adapt(square, once.params[-1], (), rule=rule, steps=1, state=once.state)
    >>> float(twice.params[-1]["w"]), twice.state.steps
    (1.0, 2)

    Raises `BlockError` for negative `steps`, `GradientError` for a loss that is no scalar, and what
    the rule raises.
    """
    order = order or SecondOrder()
    progress = progress or Progress()
    fast = trainable(params)
    rest = {name: tensor for name, tensor in params.items() if name not in fast}

    def loss(params: Tensors, buffers: Tensors) -> tuple[Tensor, Tensors]:
        return loss_fn(params, batch), buffers

    first = 0 if state is None else state.steps
    carry = Carry(nodes_of(fast), rule.init(fast) if state is None else state.rule, {})
    states, losses = [dict(params)], []
    total = first + steps
    for index, through in [*enumerate(steps_through(order, total, progress))][first:]:
        support = support_pass(loss, carry, rest, through=through)
        versions = versions_of(carry.params.values())
        after = step(carry, support, rule, index=index, steps=total)
        if versions_of(carry.params.values()) != versions:
            raise _writes(rule)
        carry = after
        states.append({name: carry.params.get(name, tensor) for name, tensor in params.items()})
        losses.append(support.loss)
    like = next(iter(params.values()), torch.empty(0))
    support_losses = torch.stack(losses) if steps else like.new_zeros(0)
    return Trajectory(states, support_losses, Reached(carry.rule, total))


class Given:
    """A batch as passes are given it, which may ask for derivatives by it: others of the same numbers."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.inputs, self.target = (map_tensors(as_input, tree) for tree in batch)
        self._targets = tensors_of(self.target)
        self._versions = versions_of(self._targets)
        self._tensors = _fixed((self.inputs, self.target))
        self._asked = [tensor.requires_grad for tensor in self._tensors]

    def target_is_written(self) -> bool:
        """True if the target has been written in place."""
        return versions_of(self._targets) != self._versions

    def serves_again(self) -> bool:
        """True if a pass cannot have left a trace: tensors, not asked for derivatives, no attributes."""
        asked = [tensor.requires_grad for tensor in self._tensors]
        marked = [tensor for tensor in self._tensors if tensor.__dict__]
        return bool(asked) and asked == self._asked and not marked


def _fixed(tree: Any) -> list[Tensor]:
    """The tensors of tuples of them; none if anything else is there, which a pass could write."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = [_fixed(part) for part in tree] if isinstance(tree, tuple) else []
    return [tensor for part in parts for tensor in part] if all(parts) else []


@dataclass(frozen=True)
class InnerLoop:
    """One learner's inner loop as pure functions of the meta-parameters: all an estimator needs.

    `meta` holds the meta-parameters under the learner's names, `model.…`, `rule.…`, and `loss.…` and
    `support_loss.…` of losses that are learned. Nothing here knows how the meta-gradient is computed or
    how tasks are spread.

    An estimator gets it (the example of `Estimator` uses it):

        carry = inner.start(meta, buffers, inner.support_of(task, -1))   # θ_0, the rule's state, buffers
        carry, _ = inner.step(meta, carry, inner.support_of(task, index), index)       # θ_k → θ_{k+1}
        passed = inner.query(meta, carry, inner.query_of(task, index), index)  # .loss, .score, .buffers

    >>> import metablocks as mb
    >>> [name for name in ("start", "step", "query", "changes") if not hasattr(mb.InnerLoop, name)]
    []
    """

    model: ModuleView
    rule: ModuleView
    loss: Loss
    """Judges queries."""
    support_loss: Loss
    """The loss that the inner steps descend."""
    adapted: tuple[str, ...]
    constants: Tensors
    """Frozen parameters, under the learner's names: needed by the forward pass, never learned."""
    model_buffers: Tensors
    """The model's buffers that no pass writes."""
    rule_buffers: Tensors
    loss_buffers: Tensors
    """The buffers of losses, under the learner's names."""
    steps: int
    through: tuple[bool, ...]
    """Per step: is it differentiated through?"""
    draws: Draws
    """The random generators that the work draws from."""
    weights: dict[int, Tensor]
    """The step loss: weights of the query losses, by the carry; the others do not count."""
    collected: tuple[str, ...] = ()
    """The model's buffers whose changes are handed to the learner (see `changes`)."""
    training: bool | None = None
    """Overrides the model's train/eval flags, as in `FunctionalModule.apply`."""
    metric: Callable[[Any, Any], Any] | None = None
    """`(prediction, target) -> score`, of every query pass."""
    predicting: ModuleView | None = None
    """The model in query passes, if another view of it than in support passes: it goes by the statistics
    that the last of them has left in the carry's buffers."""
    batches: Batches = FullBatch()  # noqa: RUF009  (which is frozen)
    """The examples that each step sees."""
    starting: Start = AsLearned()  # noqa: RUF009  (which is frozen)
    """The fast weights that a task begins with."""
    reshapes: bool = False
    """True if tasks come one by one, so that `starting` may ask for other shapes."""
    shapes_held: str | None = None
    """The member of the rule that is made for the parameters' own shapes; None if none is."""
    position: Position | None = None
    """The step, while a trace is made that is to serve all steps."""

    def first_order(self) -> "InnerLoop":
        """The same inner loop, differentiated through no step."""
        return replace(self, through=(False,) * self.steps)

    def shortened(self) -> "InnerLoop":
        """The same inner loop for two steps at most, the query losses of all carries counting."""
        steps = min(self.steps, 2)
        through = (*self.through[:1], *self.through[1:][-1:])
        weights = {
            k: torch.tensor(0.5 + k, dtype=torch.float64, device="cpu") for k in range(steps + 1)
        }
        return replace(self, steps=steps, through=through, weights=weights)

    def support_of(self, task: Task, index: int) -> Batch:
        """The batch of inner step `index` of a task; −1 for the whole support set."""
        if index < 0 or not self.batches.selects("support"):
            return task.support
        if task.drawn is None and self.training is None and self.batches.draws:
            raise TaskError(
                f"a task has come without the state that {self.batches!r} drew for it; an executor hands "
                "over the tasks that it is given, or makes others by dataclasses.replace(task, ...)",
                block="MetaLearner",
                field="executor",
            )
        state = None if task.drawn is None else task.drawn.state
        return self.batches.select(task.support, state, index)

    def query_of(self, task: Task, index: int) -> Batch:
        """The batch that judges carry `index` of a task; −1 for the whole query set."""
        if index < 0 or not self.batches.selects("query"):
            return task.query
        return self.batches.query(task.query, index)

    @property
    def start_reads(self) -> tuple[Side, ...]:
        """The sets that `start` is to be given."""
        return ("support",) if self.starting.reads or self.predicting is not None else ()

    def start(self, meta: Tensors, buffers: Tensors, support: Batch | None = None) -> Carry:
        """Carry 0 of a task: θ_0 and a fresh rule state. `support`: the whole set, if it is read.

        Where queries go by the statistics of support passes, those of one pass at θ_0.
        """
        parts = self._parts(meta)
        fast = nodes_of(parts.adapted)
        if type(self.starting) is not AsLearned:
            fast = nodes_of(self._started(meta, fast, buffers, support))
        state: Any = ()
        if getattr(self.rule.module.init, "__func__", None) is not UpdateRule.init:
            state, _ = self.rule.call("init", parts.rule, (fast,))
        carry = Carry(fast, state, buffers)
        if self.predicting is None:
            return carry
        return self.with_statistics(meta, carry, self.batches.select(self._read(support), None, 0))

    def _started(
        self, meta: Tensors, learned: Tensors, buffers: Tensors, support: Batch | None
    ) -> Tensors:
        """θ_0 by the start block, of the parameters as they are learned."""
        params, block = learned, name_of(self.starting)
        if self.starting.reads:
            support = self._read(support)
        if support is not None and self.reshapes:
            params = self.starting.shaped(learned, support)

        def features(name: str) -> Any:
            assert support is not None
            whole = ModuleState({**self._parts(meta).rest, **learned}, self.model_buffers | buffers)
            return self.model.entering(name, whole, support[0], training=self.training)

        answer: Any = self.starting(params, cast(Batch, support), features)
        known = isinstance(answer, dict) and answer.keys() == params.keys()
        shapes = {name: tensor.shape for name, tensor in params.items()}
        if not known or {n: getattr(t, "shape", None) for n, t in answer.items()} != shapes:
            takes = "a dict of tensors with the names and shapes of those it is given"
            raise wrong_answer("start", block, answer, takes)
        if self.shapes_held:
            for name, tensor in answer.items():
                if tensor.shape != learned[name].shape:
                    raise BlockError(
                        f"{block}: this task asks for a {name} of shape {list(tensor.shape)}, and the "
                        f"model's is {list(learned[name].shape)}, for which {self.shapes_held} is made; "
                        "use a rate without entries for single parameters, or tasks of as many classes",
                        block="MetaLearner",
                        field="start",
                    )
        started: Tensors = answer
        return started

    def _read(self, support: Batch | None) -> Batch:
        """The support set that `start` was given."""
        if support is None:
            reader = f"start {name_of(self.starting)} reads"
            if not self.starting.reads:
                reader = 'setting norm_statistics="support" reads'
            raise BlockError(
                f"the {reader} the support set; an estimator gives it, "
                "inner.start(meta, buffers, inner.support_of(task, -1))",
                block="MetaLearner",
                field="estimator",
            )
        return support

    def with_statistics(self, meta: Tensors, carry: Carry, support: Batch, index: int = 0) -> Carry:
        """The carry with the statistics of norms as a pass over the support batch leaves them.

        By the model of the step that led to carry `index`.
        """
        params = {**self._parts(meta).rest, **carry.params}
        inputs = self._given(support).inputs
        _, after = self._predict(self.model, params, carry.buffers, inputs, index, back=1)
        left = {name: b for name, b in after.buffers.items() if name in self.model.statistics}
        return carry._replace(buffers=carry.buffers | left)

    def step(self, meta: Tensors, carry: Carry, support: Batch, index: int) -> tuple[Carry, Tensor]:
        """Inner step `index` on the support batch: the next carry and the support loss before it."""
        passed = self.support(meta, carry, support, index)
        return self.update(meta, carry, passed, index), passed.loss

    def support(self, meta: Tensors, carry: Carry, support: Batch, index: int) -> SupportPass:
        """The first half of inner step `index`: the gradient on the support batch."""

        parts, through = self._parts(meta), self.through[index]
        own = parts.support_loss
        if own.params and not through:
            own = own._replace(params=detach(own.params))

        def loss(params: Tensors, buffers: Tensors) -> tuple[Tensor, Any]:
            value, _, after = self._forward("support_loss", own, params, buffers, support, index)
            moved: Tensors = {}
            if written := self.model.written(training=self.training):
                moved = {name: after.params[name] for name in written if name in carry.params}
            return value, (after.buffers, moved)

        passed = support_pass(loss, carry, parts.rest, through=through)
        after: Any = passed.buffers
        buffers, moved = after
        moves = {name: (t - carry.params[name]).detach() for name, t in moved.items()}
        return SupportPass(passed.gradients, passed.loss, buffers, moves)

    def update(self, meta: Tensors, carry: Carry, support: SupportPass, index: int) -> Carry:
        """The second half: the rule turns the gradient into the next carry."""

        own = self._parts(meta).rule

        def rule(*arguments: Any) -> tuple[Tensors, Any]:
            if self.rule.has_run("forward"):
                answer, _ = self.rule.call("forward", own, arguments)
            else:
                with _guarding(arguments[2].params):
                    answer, _ = self.rule.call("forward", own, arguments)
            return answer  # type: ignore[no-any-return]

        rule.__name__ = type(self.rule.module).__name__
        return step(carry, support, rule, index=index, steps=self.steps, position=self.position)

    def query(self, meta: Tensors, carry: Carry, query: Batch, index: int) -> QueryPass:
        """The query pass at carry `index`; it belongs to the step that led there."""
        parts = self._parts(meta)
        params = {**parts.rest, **carry.params}
        value, prediction, after = self._forward(
            "loss", parts.loss, params, carry.buffers, query, index
        )
        score = None
        if self.metric is not None:
            given = detach_tree(prediction), query[1]
            versions = versions_of(tensors_of(given))
            score = _as_scalar(self.metric(*given), value)
            if versions_of(tensors_of(given)) != versions:
                raise BlockError(
                    f"the metric {name_of(self.metric)} writes in place into what it is given, the "
                    "prediction and the target; it returns a number, and works on clones",
                    block="MetaLearner",
                    field="metric",
                )
        return QueryPass(check_scalar(value), prediction, after.buffers, score)

    def look(self, meta: Tensors, carry: Carry, query: Batch, index: int) -> QueryPass:
        """The query pass at a carry of constants.

        Where model or loss take derivatives of their own, by the fast weights or the prediction, these
        require gradients meanwhile.
        """
        if not self.model.differentiates:
            states = self.draws.states() if self.draws.kinds or not self.draws.known else []
            try:
                return self.query(meta, carry, query, index)
            except RuntimeError as error:
                if _NEEDS_GRAPH not in str(error):
                    raise
            self.draws.restore(states)
        nodes = {name: t.detach().requires_grad_() for name, t in carry.params.items()}
        passed = self.query(meta, carry._replace(params=nodes), query, index)
        self.model.differentiates = True
        return detach_tree(passed)  # type: ignore[no-any-return]

    def support_value(self, meta: Tensors, carry: Carry, support: Batch, index: int) -> Tensor:
        """The support loss at carry `index`, a scalar, by the model of the step that led there."""
        parts = self._parts(meta)
        params = {**parts.rest, **carry.params}
        own, before = parts.support_loss, carry.buffers
        value, _, _ = self._forward("support_loss", own, params, before, support, index, back=1)
        return check_scalar(value)

    def weighted(self, value: Tensor, index: int) -> Tensor:
        """v_k · `value`, in the dtype of `value`."""
        return self.weights[index].to(value.dtype) * value

    @property
    def tensors(self) -> dict[str, Any]:
        """The fields that hold tensors, to be handed to a function that is compiled."""
        names = ("constants", "model_buffers", "rule_buffers", "loss_buffers", "weights")
        return {name: getattr(self, name) for name in names}

    def with_tensors(self, tensors: dict[str, Any]) -> "InnerLoop":
        """The same inner loop with others in these fields."""
        own = all(getattr(self, name) is value for name, value in tensors.items())
        return self if own else replace(self, **tensors)

    def changes(self, *passes: tuple[Tensors, Tensors]) -> Tensors:
        """Σ (after − before) of the collected buffers over passes `(before, after)`, as constants."""

        def change(name: str) -> Tensor:
            moves = [after[name].detach() - before[name].detach() for before, after in passes]
            return torch.stack(moves).sum(0)

        return {name: change(name) for name in self.collected}

    def fixed(self, meta: Tensors) -> Tensors:
        """The meta-parameters that a step reads by itself: all but those that the carry holds."""
        return self._parts(meta).fixed

    def _forward(
        self,
        role: LossRole,
        own: ModuleState,
        params: Tensors,
        buffers: Tensors,
        batch: Batch,
        index: int,
        *,
        back: int | None = None,
    ) -> tuple[Tensor, Any, ModuleState]:
        """A pass at carry `index`: the loss, whose tensors are `own`, the prediction, the state after.

        The model is at the step of that index, or so many `back`; a query pass belongs to the step that
        led there.
        """
        loss: Loss = getattr(self, role)
        queries = role == "loss"
        model = (self.predicting or self.model) if queries else self.model
        back = int(queries) if back is None else back
        prediction, after = None, ModuleState(params, buffers)
        given = self._given(batch)
        if loss.predicts:
            prediction, after = self._predict(model, params, buffers, given.inputs, index, back)
        if loss.is_plain and self.training in loss.objective.watched:
            value: Any = loss.objective.loss(prediction, given.target)
        else:
            at = self._pass(model, params, buffers, given, index, back)
            value = loss(prediction, at, own)
        if given.target_is_written():
            raise loss.objective.writing("the task's target, which its first call did not")
        return value, prediction, after

    def _pass(
        self,
        model: ModuleView,
        params: Tensors,
        buffers: Tensors,
        given: Given,
        index: int,
        back: int,
    ) -> Pass:
        """The values that the pass at carry `index` offers a loss by name."""
        state = ModuleState(params, self.model_buffers | buffers)

        def call(*args: Any, **kwargs: Any) -> Any:
            step, training = self._step(index, back), self.training
            args, kwargs = map_tensors(as_input, (args, kwargs))
            return model.call("forward", state, args, kwargs, step=step, training=training)[0]

        position = self._step(index)
        fast = {name: params[name] for name in self.adapted}
        info = StepInfo(index, self.steps, fast)
        if isinstance(position, Position):
            info = TracedStep(index, self.steps, fast, position)
        own = given.inputs, given.target
        return Pass(*own, state, call, info, position, self.training)

    def _predict(
        self,
        model: ModuleView,
        params: Tensors,
        buffers: Tensors,
        inputs: Any,
        index: int,
        back: int = 0,
    ) -> tuple[Any, ModuleState]:
        """The prediction on inputs of the pass's own, and the model's state after it."""
        before = ModuleState(params, self.model_buffers | buffers)
        step, training = self._step(index, back), self.training
        arguments = module_arguments(inputs)
        prediction, state = model.call("forward", before, *arguments, step=step, training=training)
        return prediction, ModuleState(state.params, {n: state.buffers[n] for n in buffers})

    def _given(self, batch: Batch) -> Given:
        """The batch as passes are given it; kept, since most steps of a task have the same."""
        if transformed():  # whose tensors end with it
            return Given(batch)
        known: Given | None = self.__dict__.get("_last_given")
        if known is None or known.batch is not batch or not known.serves_again():
            known = self.__dict__["_last_given"] = Given(batch)
        return known

    def _step(self, index: int, back: int = 0) -> int | Position:
        """Inner step `index`, or so many `back`; the position while a trace is made."""
        own = max(index - back, 0)
        if self.position is None:
            return own
        return Position(own, (self.position.tensor - back).clamp(min=0))

    def _parts(self, meta: Tensors) -> "_Parts":
        """The meta-parameters by what they are for; kept, since all steps of a task have the same."""
        known: _Parts | None = self.__dict__.get("_known")
        if known is None or known.meta is not meta:
            tensors = {**self.constants, **meta}
            model = {n[6:]: t for n, t in tensors.items() if n.startswith("model.")}
            rule = {n[5:]: t for n, t in tensors.items() if n.startswith("rule.")}
            adapted = {name: model[name] for name in self.adapted if name in model}
            rest = {name: tensor for name, tensor in model.items() if name not in self.adapted}
            moving = {f"model.{name}" for name in self.adapted}
            fixed = {name: tensor for name, tensor in meta.items() if name not in moving}
            known = _Parts(
                meta,
                adapted,
                rest,
                fixed,
                ModuleState(rule, self.rule_buffers),
                self.loss.state(tensors, self.loss_buffers),
                self.support_loss.state(tensors, self.loss_buffers),
            )
            self.__dict__["_known"] = known
        return known


class _Parts(NamedTuple):
    """Meta-parameters, divided."""

    meta: Tensors
    adapted: Tensors
    rest: Tensors
    """The model's that stay put inside a task: those not adapted, learned or frozen."""
    fixed: Tensors
    """All but the adapted, under the learner's names."""
    rule: ModuleState
    loss: ModuleState
    support_loss: ModuleState


_NEEDS_GRAPH = "does not require grad and does not have a grad_fn"  # PyTorch's words


def _guarding(params: Tensors) -> Watch:
    """Raises `Written` before one of the tensors is written."""
    guarded = {storage(tensor): name for name, tensor in params.items()}
    guarded.pop(0, None)
    return Watch(guarded)


def _writes(rule: Rule) -> RuleError:
    name = name_of(rule)
    return RuleError(
        f"the rule {name} writes in place into step.params, which are the fast weights themselves; it "
        "returns updates, which are added to them: new tensors",
        block=name,
        field="rule",
    )


def check_scalar(loss: Any) -> Tensor:
    """The loss as a scalar, or a `GradientError` saying why it cannot be differentiated."""
    if isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1:
        return loss.reshape(()) if loss.ndim else loss  # as `backward()` takes it
    given = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        given = f"a tensor of shape {list(loss.shape)}"
        given += "" if loss.is_floating_point() else f" and of {loss.dtype}"
    hint = ": take the mean over examples" if isinstance(loss, Tensor) and loss.ndim else ""
    raise GradientError(
        f"the loss returned {given}; it must return a scalar tensor of floats{hint}",
        block="MetaLearner",
        field="loss",
    )


def _as_scalar(score: Any, like: Tensor) -> Tensor:
    """A metric's tensor or number as a tensor of floats, of which means are taken."""
    if isinstance(score, Tensor) and score.numel() == 1 and not score.is_complex():
        number = score.detach().reshape(())
        return number if score.is_floating_point() else number.to(like.dtype)
    if isinstance(score, Real | np.bool_):
        return like.detach().new_tensor(float(score))
    raise BlockError(
        f"the metric returned {shown(score)}; it returns a scalar tensor or a number",
        block="MetaLearner",
        field="metric",
    )
