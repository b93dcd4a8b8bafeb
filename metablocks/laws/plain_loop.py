"""A learner's objective as a hand-written loop in plain autograd, the reference of its gradient.

    g_k = ∇L_s(θ_k),    θ_{k+1} = θ_k + rule(g_k),    L = mean over tasks of Σ_k v_k L_q(θ_k)

Nothing of `inner`, of the estimators or the executors is used: modules are called by
`torch.func.functional_call`, derivatives are `torch.autograd.grad`'s. A step that the order does not
differentiate through holds its g_k constant, never the parameters or the rates: that is the stated
first-order definition, and the loss with these g_k held at recorded values is a function whose
finite differences are its gradient, to any order.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metablocks.functional import detach, module_arguments, step_aware_modules, tracking_norms
from metablocks.generators import (
    States,
    devices_of,
    generators_of,
    get_states,
    kept_draws,
    set_states,
)
from metablocks.kernels import twice_differentiable
from metablocks.learner import MetaLearner
from metablocks.objective import LossRole, Objective
from metablocks.rules import Chain, MTMask, StepInfo, UpdateRule
from metablocks.types import Batch, Progress, Task, TaskBatch, Tensors

_ROLES: tuple[LossRole, ...] = ("loss", "support_loss")
SEED = 0
"""Of the draws of every evaluation: dropout, masks, batches."""


@dataclass
class Tape:
    """The gradients and buffers of steps that are not differentiated through, as they were first."""

    passes: dict[tuple[int, int], tuple[Tensors, Tensors]] = field(default_factory=dict)
    draws: dict[tuple[int, int], States] = field(default_factory=dict)
    """The generators' states after them."""


class PlainLoop:
    """The objective of a learner on tasks, on copies of its model, rule and losses.

    `parameters` are the copies' meta-parameters under the learner's names; move them to move the
    objective. Random draws are those of `Loop` and `Unrolled` from `SEED` on.

    Law: `gradient` is the learner's meta-gradient, if estimator and executor are exact.
    """

    def __init__(self, learner: MetaLearner, tasks: TaskBatch) -> None:
        self.learner = learner
        self.tasks = tasks
        self.model = copy.deepcopy(learner.model)
        self.rule = copy.deepcopy(learner.rule)
        copies: dict[int, Any] = {}
        self.objectives: dict[LossRole, Objective] = {}
        for role in _ROLES:
            loss = getattr(learner, role) or learner.loss
            self.objectives[role] = Objective.of(copy.deepcopy(loss, copies), role)
        for norm in tracking_norms(self.model).values():
            if learner.norm_statistics == "running":
                norm.eval()
            else:  # in training "support" is "batch"
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        # As they are now: of a module used twice, `functional_call` leaves its arguments in it.
        self.tensors: Tensors = dict(self.model.named_parameters())
        self.buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        named = [
            *((f"model.{name}", p) for name, p in self.tensors.items()),
            *((f"rule.{name}", p) for name, p in self.rule.named_parameters()),
        ]
        for role, objective in self.objectives.items():
            if isinstance(objective.loss, nn.Module):
                known = {id(p) for _, p in named}
                own = objective.loss.named_parameters()
                named += [(f"{role}.{name}", p) for name, p in own if id(p) not in known]
        self.parameters: Tensors = {name: p for name, p in named if p.requires_grad}
        self.rule = _relaxed(self.rule)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw from `SEED` on, on the devices of the parameters; the generators are left as found."""
        with kept_draws(devices_of(self.parameters)):
            torch.manual_seed(SEED)
            yield

    def order(self, progress: Progress) -> tuple[bool, ...]:
        """For each step, whether the learner's order differentiates through it."""
        learner = self.learner
        return tuple(learner.order(k, learner.steps, progress) for k in range(learner.steps))

    def loss(
        self,
        through: Sequence[bool],
        progress: Progress,
        tape: Tape | None = None,
        *,
        graph: bool = False,
    ) -> Tensor:
        """L. Steps not differentiated through take what `tape` holds of them, and add it if new."""
        weights = self.learner.step_loss(self.learner.steps, progress)
        losses = []
        with self.seeded(), torch.set_grad_enabled(graph):
            for index in range(len(self.tasks)):
                loss = self._task(index, self.tasks[index], through, weights, tape, graph)
                losses.append(loss)
        each = torch.stack(losses)
        if self.tasks.weight is None:
            return each.mean()
        weight = torch.as_tensor(self.tasks.weight).to(each)
        return (weight * each).sum() / weight.sum()

    def gradient(self, through: Sequence[bool], progress: Progress) -> Tensors:
        """∂L/∂(every meta-parameter), zero if L does not depend on one."""
        loss = self.loss(through, progress, graph=True)
        return gradient(loss, self.parameters)

    def _task(
        self,
        number: int,
        task: Task,
        through: Sequence[bool],
        weights: Tensor,
        tape: Tape | None,
        graph: bool,
    ) -> Tensor:
        steps = self.learner.steps
        fast, buffers = self.start()
        state = self.rule.init(fast)
        generators = generators_of(self.parameters)
        total: list[Tensor] = []
        last = max(k for k in range(steps + 1) if weights[k] > 0)
        for k in range(last + 1):
            if weights[k] > 0:
                value, _ = self.forward("loss", fast, buffers, task.query, k)
                total.append(weights[k].to(value) * value)
            if k < last:
                held = tape if not through[k] else None
                if held is not None and (number, k) in held.passes:
                    gradients, buffers = held.passes[number, k]
                    set_states(held.draws[number, k])
                else:
                    gradients, buffers = self.support(
                        fast, buffers, task.support, k, through[k] and graph
                    )
                if held is not None:
                    held.passes[number, k] = gradients, buffers
                    held.draws[number, k] = get_states(generators)
                fast, state = self.move(gradients, state, fast, k)
        return torch.stack(total).sum()

    def start(self) -> tuple[Tensors, Tensors]:
        """θ_0, of what adapts, and the buffers of a task."""
        return {name: self.tensors[name] for name in self.learner.adapted}, dict(self.buffers)

    def support(
        self, fast: Tensors, buffers: Tensors, batch: Batch, index: int, through: bool
    ) -> tuple[Tensors, Tensors]:
        """g_k, and the buffers after the pass."""
        with torch.enable_grad():
            if not through:
                fast = {name: tensor.detach().requires_grad_() for name, tensor in fast.items()}
            with twice_differentiable(through):
                loss, buffers = self.forward("support_loss", fast, buffers, batch, index)
            gradients = gradient(loss, fast, graph=through)
        return (gradients, buffers) if through else (detach(gradients), detach(buffers))

    def move(
        self, gradients: Tensors, state: Any, fast: Tensors, index: int
    ) -> tuple[Tensors, Any]:
        """θ_{k+1}, and the rule's state."""
        info = StepInfo(index, self.learner.steps, fast)
        updates, state = self.rule(gradients, state, info)
        return {name: tensor + updates[name] for name, tensor in fast.items()}, state

    def forward(
        self, role: LossRole, fast: Tensors, buffers: Tensors, batch: Batch, carry: int
    ) -> tuple[Tensor, Tensors]:
        """The loss of a batch at a carry, and the buffers after the pass."""
        objective = self.objectives[role]
        for module in step_aware_modules(self.model).values():
            module.inner_step = max(carry - 1, 0) if role == "loss" else carry
        params = self.tensors | fast
        tensors = params | {name: buffer.clone() for name, buffer in buffers.items()}

        def model(*args: Any, **kwargs: Any) -> Any:
            own = params | {name: buffer.clone() for name, buffer in buffers.items()}
            return functional_call(self.model, own, args, kwargs)

        places = []
        if objective.predicts:
            args, kwargs = module_arguments(batch[0])
            places = [functional_call(self.model, tensors, args, kwargs), batch[1]]
        offered = {
            "inputs": batch[0],
            "target": batch[1],
            "params": params,
            "model": model,
            "step": StepInfo(carry, self.learner.steps, fast),
        }
        value = objective.loss(*places, **{name: offered[name] for name in objective.asks})
        return value, {name: tensors[name] for name in buffers}


class _Relaxed(UpdateRule):
    """`MTMask` whose straight-through gradient is the derivative of a function: M_0 + s(ζ) − s(ζ_0).

    M_0 and s(ζ_0) are those of the logits ζ_0 that the mask has when this is made.
    """

    def __init__(self, mask: MTMask) -> None:
        super().__init__()
        assert mask.logit is not None
        self.mask = mask
        self.logits = mask.logit
        self.centres = {name: p.detach().clone() for name, p in mask.logit.named_parameters()}

    def init(self, params: Tensors) -> Tensors:
        masks = {}
        for name, centre in self.centres.items():
            least = torch.finfo(centre.dtype).eps / 2
            uniform = torch.rand_like(centre).clamp(least, 1 - least)
            noise = uniform.log() - (1 - uniform).log()
            now, then = (
                torch.sigmoid((logit + noise) / self.mask.temperature)
                for logit in (self.logits[name], centre)
            )
            masks[name] = (centre + noise > 0).to(now) + (now - then)
        return masks

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        return self.mask(updates, state, step)  # type: ignore[no-any-return]


def _relaxed(rule: UpdateRule) -> UpdateRule:
    if isinstance(rule, MTMask):
        return _Relaxed(rule)
    if isinstance(rule, Chain):
        return Chain(*[_relaxed(one) for one in rule.rules if isinstance(one, UpdateRule)])
    return rule


def gradient(loss: Tensor, tensors: Tensors, *, graph: bool = False, keep: bool = False) -> Tensors:
    """∂loss/∂(each tensor) by autograd, zero if there is no dependence."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    grads = torch.autograd.grad(
        loss,
        list(tensors.values()),
        create_graph=graph,
        retain_graph=graph or keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(tensors, grads, strict=True))
