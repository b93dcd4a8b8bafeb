"""A learner's objective as a hand-written loop in plain autograd, the reference of its gradient.

    g_k = ∇L_s(θ_k),    θ_{k+1} = θ_k + rule(g_k),    L = mean over tasks of Σ_k v_k L_q(θ_k)

Nothing of `inner`, of the estimators or the executors is used: modules are called by
`torch.func.functional_call`, derivatives are `torch.autograd.grad`'s. A step that the order does not
differentiate through holds its g_k constant, never the parameters or the rates: that is the stated
first-order definition, and the loss with these g_k held at recorded values is a function whose
finite differences are its gradient, to any order.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from metablocks.batches import drawn_for
from metablocks.functional import detach, module_arguments
from metablocks.generators import (
    Draws,
    States,
    devices_of,
    drawn_seed,
    generators_of,
    get_states,
    kept_draws,
    set_states,
)
from metablocks.kernels import twice_differentiable
from metablocks.learner import MetaLearner
from metablocks.norm_statistics import norm_buffers, tracking_norms
from metablocks.objective import LossRole, Objective
from metablocks.per_step import step_aware_modules
from metablocks.rules import Chain, MTMask, StepInfo, UpdateRule
from metablocks.types import Batch, Progress, Task, TaskBatch, Tasks, Tensors

_Result = TypeVar("_Result")

SEED = 0
"""Of the draws of every evaluation: dropout, masks, batches."""

Tape: TypeAlias = dict[tuple[int, int], tuple[Tensors, Tensors, States]]
"""Of steps that are not differentiated through, by task and step: gradients and buffers as they were
first, and the generators' states after them."""


class PlainLoop:
    """The objective of a learner on tasks, on copies of its model, rule and losses.

    `parameters` are the copies' meta-parameters under the learner's names; move them to move the
    objective. Random draws are those of `Loop` and `Unrolled` from `SEED` on.

    Law: `gradient` is the learner's meta-gradient, if estimator and executor are exact.
    """

    def __init__(self, learner: MetaLearner, tasks: TaskBatch) -> None:
        self.learner = learner
        self.tasks = tasks
        copied = copy.deepcopy(learner, {id(learner.executor): learner.executor})
        self.model, self.rule = copied.model, _relaxed(copied.rule)
        self.objectives: dict[LossRole, Objective] = {
            "loss": Objective.of(copied.loss, "loss"),
            "support_loss": Objective.of(copied.support_loss or copied.loss, "support_loss"),
        }
        for norm in tracking_norms(self.model).values():
            if learner.norm_statistics == "running":
                norm.eval()
            elif learner.norm_statistics == "support":
                norm.forward = partial(self.normalised, norm)
            else:
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        self.judging = False  # True in query passes
        # As they are now: of a module used twice, `functional_call` leaves its arguments in it.
        self.tensors: Tensors = dict(self.model.named_parameters())
        self.buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        self.parameters = copied.learned

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw from `SEED` on, on the devices of the parameters; the generators are left as found."""
        with kept_draws(devices_of(self.parameters)):
            torch.manual_seed(SEED)
            yield

    def each(
        self, one: Callable[[int, Task], _Result], tasks: Tasks | None = None
    ) -> list[_Result]:
        """`one(number, task)` of every task, with the draws that `Loop` makes from `SEED` on."""
        learner, generators = self.learner, generators_of(self.parameters)
        with self.seeded():
            batches = learner.batches if learner.batches.draws else None
            tasks = drawn_for(tasks or self.tasks, batches, learner.steps, drawn_seed())
            results = []
            for index in range(len(tasks)):
                task = tasks[index]
                with Draws(generators).seeded(task.seed):
                    results.append(one(index, task))
            return results

    def support_of(self, task: Task, index: int) -> Batch:
        """The batch of inner step `index`."""
        state = None if task.drawn is None else task.drawn.state
        return self.learner.batches.select(task.support, state, index)

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
        with torch.set_grad_enabled(graph):
            losses = self.each(lambda i, task: self._task(i, task, through, weights, tape, graph))
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
        fast, buffers = self.start(task)
        state = self.rule.init(fast)
        generators = generators_of(self.parameters)
        total: list[Tensor] = []
        last = max(k for k in range(steps + 1) if weights[k] > 0)
        for k in range(last + 1):
            if weights[k] > 0:
                query = self.learner.batches.query(task.query, k)
                value, _ = self.forward("loss", fast, buffers, query, k)
                total.append(weights[k].to(value) * value)
            if k < last:
                held = {} if tape is None or through[k] else tape
                if (number, k) in held:
                    gradients, buffers, states = held[number, k]
                    set_states(states)
                else:
                    batch = self.support_of(task, k)
                    gradients, buffers = self.support(fast, buffers, batch, k, through[k] and graph)
                    held[number, k] = gradients, buffers, get_states(generators)
                fast, state = self.move(gradients, state, fast, k)
        return torch.stack(total).sum()

    def start(self, task: Task) -> tuple[Tensors, Tensors]:
        """θ_0, of what adapts, and the buffers of a task."""
        block, buffers, self.judging = self.learner.start, dict(self.buffers), False
        params = block.shaped(
            {name: self.tensors[name] for name in self.learner.adapted}, task.support
        )

        def features(name: str) -> Tensor:
            entered: list[Tensor] = []
            module = self.model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
            try:
                self.predict({}, buffers, task.support, 0)
            finally:
                hook.remove()
            return entered[0]

        begin = block(params, task.support, features)
        # Nodes of their own: the first gradient is by θ_0, not by what it came from.
        nodes = {
            name: t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for name, t in begin.items()
        }
        if self.learner.norm_statistics == "support":
            first = self.learner.batches.select(task.support, None, 0)
            _, after = self.predict(nodes, buffers, first, 0)
            buffers |= {name: after[name] for name in norm_buffers(self.model)}
        return nodes, buffers

    def normalised(self, norm: _NormBase, inputs: Tensor) -> Tensor:
        """A batch norm by its input, whose statistics it keeps; by those kept in query passes."""
        within = [*range(2, inputs.ndim), *([] if isinstance(norm, _InstanceNorm) else [0])]
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        if self.judging:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, scatter = norm.running_mean.reshape(shape), norm.running_var.reshape(shape)
        else:
            mean = inputs.mean(within, keepdim=True)
            scatter = inputs.var(within, correction=0, keepdim=True)
            count = inputs.numel() // mean.numel()
            norm.running_mean = mean.mean(0).flatten()
            norm.running_var = (scatter * count / (count - 1)).mean(0).flatten()
        output = (inputs - mean) / (scatter + norm.eps).sqrt()
        if norm.weight is not None:
            output = output * norm.weight.reshape(shape) + norm.bias.reshape(shape)
        return output

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
        objective, before = self.objectives[role], buffers
        self.judging = role == "loss"
        index = max(carry - 1, 0) if role == "loss" else carry
        places = []
        if objective.predicts:
            prediction, buffers = self.predict(fast, buffers, batch, index)
            places = [prediction, batch[1]]

        offered = {
            "inputs": batch[0],
            "target": batch[1],
            "params": self.tensors | fast,
            "model": lambda *args, **named: self.call(fast, before, index, args, named)[0],
            "step": StepInfo(carry, self.learner.steps, fast),
        }
        value = objective.loss(*places, **{name: offered[name] for name in objective.asks})
        return value, buffers

    def predict(
        self, fast: Tensors, buffers: Tensors, batch: Batch, index: int
    ) -> tuple[Any, Tensors]:
        """The prediction of a batch at fast weights, and the buffers after the pass."""
        return self.call(fast, buffers, index, *module_arguments(batch[0]))

    def call(
        self, fast: Tensors, buffers: Tensors, index: int, args: Any, kwargs: Any
    ) -> tuple[Any, Tensors]:
        """The model's output on arguments of one's own, and the buffers after the pass."""
        for module in step_aware_modules(self.model).values():
            module.inner_step = index
        tensors = self.tensors | fast | {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(self.model, tensors, args, kwargs)
        return output, {name: tensors[name] for name in buffers}


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
