"""The inner loop: one step, and the one loop around it.

    g_k = ∇L_s(θ_k),    θ_{k+1} = θ_k + rule(g_k)

`support_pass` is the left half, `step` the right one, and the only place where fast weights are
made. Everything above is written in terms of them: `adapt` for a loss function of one's own,
`InnerLoop` for a whole learner, and every estimator on top of `InnerLoop`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metablocks.errors import BlockError, GradientError
from metablocks.functional import FunctionalModule, ModuleState, detach, trainable
from metablocks.order import Order, SecondOrder
from metablocks.rules.base import StepInfo, UpdateRule, check_updates
from metablocks.transforms import vjp_once
from metablocks.types import Batch, Progress, Tensors

StatefulLoss: TypeAlias = Callable[[Tensors, Tensors], tuple[Tensor, Tensors]]
"""`(params, buffers) -> (scalar loss, new buffers)`, the data being bound already."""

Rule: TypeAlias = Callable[[Tensors, Any, StepInfo], tuple[Tensors, Any]]


class Carry(NamedTuple):
    """What one inner step hands to the next; a pytree."""

    params: Tensors
    """The fast weights: adapted parameters only."""
    rule: Any
    """The rule's own state."""
    buffers: Tensors
    """The model's buffers, as the last support pass left them."""


class SupportPass(NamedTuple):
    """What a carry makes of the support batch."""

    gradients: Tensors
    """∇L_s(θ_k), by the names of the fast weights."""
    loss: Tensor
    """L_s(θ_k), a constant scalar."""
    buffers: Tensors
    """The model's buffers as this pass left them."""


def support_pass(
    loss: StatefulLoss, carry: Carry, rest: Tensors, *, through: bool, recorded: bool = False
) -> SupportPass:
    """g_k = ∇L_s(θ_k): the gradient that an inner step goes by.

    `rest` holds the parameters that the loss needs and the step leaves alone. `through` says whether
    derivatives flow through the gradient; where not, it is taken at detached parameters, which is
    the same as detaching it and builds no graph. `recorded` says that the innermost transform at
    work is a reverse-mode derivative that goes through the carry: the gradient then comes out of
    its graph, where a transform of its own would record everything twice. (A parameter frozen since
    the learner was made adapts still, and is in no graph at first.)
    """
    fast, fixed = carry.params, rest
    if not through:
        fast, fixed = detach(fast), detach(fixed)

    def support_loss(fast: Tensors) -> tuple[Tensor, Tensors]:
        value, buffers = loss({**fixed, **fast}, carry.buffers)
        return check_scalar(value), buffers

    if through and recorded and all(tensor.requires_grad for tensor in fast.values()):
        # Nodes of their own: the derivative at θ_k alone, whatever else the loss makes of θ_k.
        own = {name: tensor.view_as(tensor) for name, tensor in fast.items()}
        value, buffers = support_loss(own)
        gradients = _slopes(value, own)
    else:
        value, pull, buffers = vjp_once(support_loss, fast)
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            (gradients,) = pull(torch.ones_like(value))
    return SupportPass(gradients if through else detach(gradients), value.detach(), buffers)


def _slopes(value: Tensor, params: Tensors) -> Tensors:
    """The gradient in the graph that autograd has of `value`, differentiable in it; zero without one."""
    if value.grad_fn is None:
        return {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    slopes = torch.autograd.grad(
        value, list(params.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(params, slopes, strict=True))


def step(carry: Carry, support: SupportPass, rule: Rule, *, index: int, steps: int) -> Carry:
    """θ_{k+1} = θ_k + rule(g_k): inner step `index` of `steps`, on what the support pass gave."""
    updates, state = rule(support.gradients, carry.rule, StepInfo(index, steps, carry.params))
    check_updates(updates, carry.params)
    params = {name: parameter + updates[name] for name, parameter in carry.params.items()}
    return Carry(params, state, support.buffers)


class QueryPass(NamedTuple):
    """What a carry makes of a query batch."""

    loss: Tensor
    """A scalar."""
    prediction: Any
    buffers: Tensors
    """The model's buffers as this pass left them. They are not handed on to later steps."""


class Trajectory(NamedTuple):
    """What `adapt` returns."""

    params: list[Tensors]
    """[θ_0, …, θ_K], each a dict of all parameters, differentiable by autograd."""
    losses: Tensor
    """The support losses `[K]` at θ_0 … θ_{K−1}: numbers to read, cut off from autograd."""


def adapt(
    loss_fn: Callable[[Tensors, Batch], Tensor],
    params: Tensors,
    batch: Batch,
    *,
    rule: UpdateRule,
    steps: int,
    order: Order | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Adapt parameters to one batch by `steps` inner steps.

    `loss_fn(params, batch)` returns a scalar. Every parameter moves except frozen ones (an
    `nn.Parameter` with `requires_grad=False`). `order` is `SecondOrder()` unless given.

    Law: `adapt` is its hand-written loop, θ_{k+1} = θ_k + rule(∇ loss_fn(θ_k)); the result is
    differentiable with respect to `params`, the rule's parameters and the batch, by autograd and by
    `torch.func` alike.

    Source: Finn, Abbeel, Levine 2017.

    >>> from metablocks.rules import LearningRate
    >>> params = {"w": torch.tensor([4.0])}
    >>> rule = LearningRate(0.25).setup(params, steps=2)
    >>> square = lambda params, batch: (params["w"] ** 2).sum()
    >>> [float(p["w"]) for p in adapt(square, params, (), rule=rule, steps=2).params]
    [4.0, 2.0, 1.0]

    Raises `BlockError` for negative `steps`, `GradientError` for a loss that is no scalar, and what
    the rule raises.
    """
    check_steps(steps)
    order = order or SecondOrder()
    progress = progress or Progress()
    fast = trainable(params)
    rest = {name: tensor for name, tensor in params.items() if name not in fast}

    def loss(params: Tensors, buffers: Tensors) -> tuple[Tensor, Tensors]:
        return loss_fn(params, batch), buffers

    def take(carry: Carry, index: int) -> tuple[Carry, Tensor]:
        support = support_pass(loss, carry, rest, through=order(index, steps, progress))
        return step(carry, support, rule, index=index, steps=steps), support.loss

    states, losses = [], []
    for carry, value in rollout(take, Carry(fast, rule.init(fast), {}), steps):
        states.append({name: carry.params.get(name, tensor) for name, tensor in params.items()})
        losses.append(value)
    some = next(iter(params.values()), torch.empty(0))
    return Trajectory(states, torch.stack(losses[1:]) if steps else some.new_zeros(0))


def rollout(
    take: Callable[[Carry, int], tuple[Carry, Tensor]], carry: Carry, steps: int
) -> Iterator[tuple[Carry, Tensor]]:
    """Carry 0 … `steps`, each with the support loss of the step that led to it (nan for carry 0)."""
    yield carry, torch.tensor(torch.nan)
    for index in range(steps):
        carry, loss = take(carry, index)
        yield carry, loss


@dataclass(frozen=True)
class InnerLoop:
    """One learner's inner loop as pure functions of the meta-parameters: all an estimator needs.

    `meta` holds the meta-parameters under the learner's names, `model.…` and `rule.…`. Nothing here
    knows how the meta-gradient is computed or how tasks are spread.
    """

    model: FunctionalModule
    rule: FunctionalModule
    loss_fn: Callable[[Any, Any], Tensor]
    adapted: tuple[str, ...]
    constants: Tensors
    """Frozen parameters, under the learner's names: needed by the forward pass, never learned."""
    rule_buffers: Tensors
    steps: int
    through: tuple[bool, ...]
    """Per step: is it differentiated through?"""
    weights: dict[int, Tensor]
    """The step loss: weights of the query losses, by the carry; the others do not count."""
    collected: tuple[str, ...] = ()
    """The model's buffers whose changes are handed to the learner (see `changes`)."""
    training: bool | None = None
    """Overrides the model's train/eval flags, as in `FunctionalModule.apply`."""
    recorded: bool = False
    """Set by an estimator around whose steps a derivative is at work (see `support_pass`)."""

    def start(self, meta: Tensors, buffers: Tensors) -> Carry:
        """Carry 0 of a task: θ_0 and a fresh rule state."""
        params = self._params("model.", meta)
        fast = {name: params[name] for name in self.adapted}
        state, _ = self.rule.call("init", self._rule_state(meta), (fast,))
        return Carry(fast, state, buffers)

    def step(self, meta: Tensors, carry: Carry, support: Batch, index: int) -> tuple[Carry, Tensor]:
        """Inner step `index` on the support batch: the next carry and the support loss before it."""
        passed = self.support(meta, carry, support, index)
        return self.update(meta, carry, passed, index), passed.loss

    def support(self, meta: Tensors, carry: Carry, support: Batch, index: int) -> SupportPass:
        """The first half of inner step `index`: the gradient on the support batch."""

        def loss(params: Tensors, buffers: Tensors) -> tuple[Tensor, Tensors]:
            value, _, buffers = self._forward(params, buffers, support, index)
            return value, buffers

        return support_pass(
            loss, carry, self._rest(meta), through=self.through[index], recorded=self.recorded
        )

    def update(self, meta: Tensors, carry: Carry, support: SupportPass, index: int) -> Carry:
        """The second half: the rule turns the gradient into the next carry."""

        def rule(gradients: Tensors, state: Any, info: StepInfo) -> tuple[Tensors, Any]:
            (updates, state), _ = self.rule.call(
                "forward", self._rule_state(meta), (gradients, state, info)
            )
            return updates, state

        return step(carry, support, rule, index=index, steps=self.steps)

    def query(self, meta: Tensors, carry: Carry, query: Batch, index: int) -> QueryPass:
        """The query pass at carry `index`; it belongs to the step that led there."""
        params = {**self._rest(meta), **carry.params}
        value, prediction, buffers = self._forward(params, carry.buffers, query, max(index - 1, 0))
        return QueryPass(check_scalar(value), prediction, buffers)

    def weighted(self, value: Tensor, index: int) -> Tensor:
        """v_k · `value`, in the dtype of `value`."""
        return self.weights[index].to(value.dtype) * value

    @property
    def tensors(self) -> dict[str, Any]:
        """The fields that hold tensors, to be handed to a function that is compiled."""
        return {name: getattr(self, name) for name in ("constants", "rule_buffers", "weights")}

    def changes(self, *passes: tuple[Tensors, Tensors]) -> Tensors:
        """Σ (after − before) of the collected buffers over passes `(before, after)`, as constants."""

        def change(name: str) -> Tensor:
            moves = [after[name].detach() - before[name].detach() for before, after in passes]
            return torch.stack(moves).sum(0)

        return {name: change(name) for name in self.collected}

    def rollout(
        self, meta: Tensors, buffers: Tensors, support: Batch, steps: int | None = None
    ) -> Iterator[tuple[int, Carry]]:
        """`(index, carry)` for carry 0 … `steps` (all of them unless given)."""

        def take(carry: Carry, index: int) -> tuple[Carry, Tensor]:
            return self.step(meta, carry, support, index)

        steps = self.steps if steps is None else steps
        carries = rollout(take, self.start(meta, buffers), steps)
        return ((index, carry) for index, (carry, _) in enumerate(carries))

    def _forward(
        self, params: Tensors, buffers: Tensors, batch: Batch, index: int
    ) -> tuple[Tensor, Any, Tensors]:
        inputs, target = batch
        prediction, state = self.model.apply(
            ModuleState(params, buffers), inputs, step=index, training=self.training
        )
        return self.loss_fn(prediction, target), prediction, state.buffers

    def _rest(self, meta: Tensors) -> Tensors:
        """The parameters that stay put inside a task: those not adapted, learned or frozen."""
        params = self._params("model.", meta)
        return {name: tensor for name, tensor in params.items() if name not in self.adapted}

    def _rule_state(self, meta: Tensors) -> ModuleState:
        return ModuleState(self._params("rule.", meta), self.rule_buffers)

    def _params(self, owner: str, meta: Tensors) -> Tensors:
        return {
            name.removeprefix(owner): tensor
            for name, tensor in (self.constants | meta).items()
            if name.startswith(owner)
        }


def check_scalar(loss: Any) -> Tensor:
    """The loss, or a `GradientError` saying why it cannot be differentiated."""
    if not isinstance(loss, Tensor):
        raise GradientError(
            f"the loss returned a {type(loss).__name__}; it must return a scalar tensor"
        )
    if loss.ndim != 0:
        raise GradientError(
            f"the loss returned a tensor of shape {list(loss.shape)}; it must return a scalar: "
            "take the mean over examples"
        )
    return loss


def check_steps(steps: object) -> int:
    """The number of steps, or a `BlockError`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise BlockError(f"steps is {steps!r}; it takes a whole number of inner steps, 0 or more")
    return steps
