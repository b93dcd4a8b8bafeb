"""The smallest wrong copies of right blocks, by protocol, and the right ones that do not ship."""

from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from metablocks import (
    KFO,
    Batches,
    FinalStepLoss,
    LearningRate,
    Loop,
    MTMask,
    Start,
    TaskBatch,
    TruncatedOrder,
    UniformStepLoss,
    Unrolled,
    UpdateRule,
    Vmap,
    per_step_batch_norm,
)
from metablocks.estimators.base import TaskGradient
from metablocks.estimators.unrolled import weighted_query_loss
from metablocks.functional import detach
from metablocks.inner_loop import InnerLoop
from metablocks.models.per_step_norm import PerStepBatchNorm
from metablocks.tasks import Linear, Strokes, Text
from metablocks.tasks.base import SPLITS
from metablocks.types import Task

OUTSIDE: dict[str, Any] = {"calls": 0, "size": torch.ones(()), "rules": [], "norms": []}
"""What wrong blocks keep where no pass can keep it from them."""

# ---- wrong rules


class Rate(UpdateRule):
    """The right one: u = −0.1 α g, α learned."""

    def setup(self, params, steps):
        like = next(iter(params.values()))
        self.gain = nn.Parameter(torch.ones((), dtype=like.dtype, device=like.device))
        return self

    def scale(self, updates, step):
        return -0.1 * self.gain

    def forward(self, updates, state, step):
        scale = self.scale(updates, step)
        return {name: scale * u for name, u in updates.items()}, state


class SignForgotten(Rate):
    def scale(self, updates, step):
        return 0.1 * self.gain


class InPlace(Rate):
    """Scales the gradients that it was given."""

    def forward(self, updates, state, step):
        return {name: u.mul_(-0.1) for name, u in updates.items()}, state


class Remembers(Rate):
    """Keeps its velocity in an attribute."""

    velocity = 0.0

    def scale(self, updates, step):
        self.velocity = 0.9 * self.velocity + 1
        return super().scale(updates, step) * self.velocity


class MaskPerStep(MTMask):
    """Draws its mask at every step."""

    def forward(self, updates, state, step):
        masked, _ = super().forward(updates, super().init(step.params), step)
        return masked, state


class FirstRate(LearningRate):
    """A rate for each step, of which every step takes the first."""

    def forward(self, updates, state, step):
        return super().forward(updates, state, replace(step, index=0))


class ConstantRate(Rate):
    """Half of its rate has no gradient where the gradient of the step has none, in first order."""

    def scale(self, updates, step):
        differentiated = any(u.requires_grad for u in updates.values())
        constant = self.gain if differentiated else self.gain.detach()
        return -0.05 * (self.gain + constant)


class GainCutOff(Rate):
    """The gain of later steps is cut off from its gradient."""

    def scale(self, updates, step):
        return -0.1 * (self.gain.detach() if step.index > 0 else self.gain)


class MaskTwice(MTMask):
    """Its straight-through gradient is twice the soft mask's."""

    def _draw(self, logit):
        mask = super()._draw(logit)
        return mask + (mask - mask.detach())


class CountsItsCalls(Rate):
    """Grows with the calls of the process, which one vmap makes fewer of."""

    def scale(self, updates, step):
        OUTSIDE["calls"] += 1
        return super().scale(updates, step) * (1 + 0.01 * OUTSIDE["calls"])


class ScalesByTheLastTask(Rate):
    """Scales every gradient by the size of the one before it, of whatever task."""

    def scale(self, updates, step):
        before = OUTSIDE["size"]
        OUTSIDE["size"] = 1 + next(iter(updates.values())).detach().norm()
        return super().scale(updates, step) * before


class ScalesConvolutions(UpdateRule):
    """Starts as the identity of matrices and vectors alone."""

    negates = False

    def forward(self, updates, state, step):
        return {name: u / 2 if u.ndim > 2 else 1 * u for name, u in updates.items()}, state


class Identity(ScalesConvolutions):
    def forward(self, updates, state, step):
        return {name: 1 * u for name, u in updates.items()}, state


class LeavesHooks(Rate):
    """Leaves a hook on itself at every call."""

    def setup(self, params, steps):
        OUTSIDE["rules"].append(self)
        return super().setup(params, steps)

    def scale(self, updates, step):
        for rule in OUTSIDE["rules"]:
            rule.register_forward_hook(lambda *_: None)
        return super().scale(updates, step)


class TransposedFactor(KFO):
    """Lᵀ G R + B."""

    def _transform(self, factors, gradients):
        turned = {name: f.mT if name.startswith("left") else f for name, f in factors.items()}
        return super()._transform(turned, gradients)


class TooFar(KFO):
    """With `adapt_transform`, its factors go down the slope at twice the rate."""

    def _slope(self, factors, before, gradients):
        slope = super()._slope(factors, before, gradients)
        return {key: 2 * s for key, s in slope.items()}


# ---- wrong policies


class Alternates:
    """Counts its calls, and is first order at every other."""

    calls = 0

    def __call__(self, step, steps, progress):
        type(self).calls += 1
        return self.calls % 2 == 0


class CountsInSilence:
    """Right, until it has been asked often enough."""

    calls = 0

    def __call__(self, step, steps, progress):
        self.calls += 1
        return self.calls < 10_000


class OneTooFew(TruncatedOrder):
    """Looks through one step less than it says."""

    def __call__(self, step, steps, progress):
        return step > steps - self.last


def one_percent_too_much(steps, progress):
    return UniformStepLoss()(steps, progress) * 1.01


def single_precision(steps, progress):
    return UniformStepLoss()(steps, progress).float()


def counts_in_silence(steps, progress):
    """Right, and keeps a list of what it was asked."""
    ASKED.append(steps)
    return UniformStepLoss()(steps, progress)


ASKED: list[int] = []


def changes(steps, progress):
    """The final step loss and the uniform one, in turn."""
    TURNS.append(steps)
    return (FinalStepLoss() if len(TURNS) % 2 else UniformStepLoss())(steps, progress)


TURNS: list[int] = []


# ---- wrong starts and batches


class Drifts(Start):
    """Begins elsewhere at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, support, features):
        self.calls += 1
        return {name: tensor + 0.01 * self.calls for name, tensor in params.items()}


class HalfCutOff(Start):
    """Doubles the parameters, and cuts off the gradient through one half."""

    def __call__(self, params, support, features):
        return {name: tensor + tensor.detach() for name, tensor in params.items()}


class Doubled(Start):
    """The same, right."""

    def __call__(self, params, support, features):
        return {name: 2 * tensor for name, tensor in params.items()}


class WritesParameters(Start):
    """Moves the learned parameters themselves."""

    def __call__(self, params, support, features):
        for tensor in params.values():
            tensor.data.add_(0.01)
        return params


class Wanders(Batches):
    """Takes the batch by the number of its calls."""

    def __init__(self):
        self.calls = 0

    def select(self, support, state, index):
        self.calls += 1
        inputs, target = support
        return inputs * (1 + 0.01 * self.calls), target


# ---- wrong estimators


class DetachedParameters(Unrolled):
    """A first-order step makes a constant of the parameters, and not of the gradient."""

    def __call__(self, inner, meta, buffers, task):
        result = super().__call__(_Detaching(**_fields(inner)), meta, buffers, task)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in meta.items()}
        return result._replace(grads=zeros | result.grads)  # else the learner itself finds it out


class _Detaching(InnerLoop):
    def update(self, meta, carry, support, index):
        if not self.through[index]:
            carry = carry._replace(params=detach(carry.params))
        return super().update(meta, carry, support, index)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


class AlwaysFirstOrder(Unrolled):
    def __call__(self, inner, meta, buffers, task):
        through = (False,) * inner.steps
        return super().__call__(replace(inner, through=through), meta, buffers, task)


class Half(Unrolled):
    """Half the gradient of what the rule learns."""

    def __call__(self, inner, meta, buffers, task):
        result = super().__call__(inner, meta, buffers, task)
        halves = {n: g / 2 if n.startswith("rule.") else g for n, g in result.grads.items()}
        return result._replace(grads=halves)


class CallsMatter(Unrolled):
    """Scales a task's gradient by the number of calls so far, which one vmap makes fewer of."""

    calls = 0

    def __call__(self, inner, meta, buffers, task):
        type(self).calls += 1
        result = super().__call__(inner, meta, buffers, task)
        return result._replace(grads={n: g * self.calls for n, g in result.grads.items()})


class ZerosForIdle(Unrolled):
    def __call__(self, inner, meta, buffers, task):
        result = super().__call__(inner, meta, buffers, task)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in meta.items()}
        return result._replace(grads=zeros | result.grads)


class MovesParameters(Unrolled):
    """Moves the parameters themselves, a little."""

    def __call__(self, inner, meta, buffers, task):
        result = super().__call__(inner, meta, buffers, task)
        for name, tensor in meta.items():
            tensor.sub_(1e-6 * result.grads[name].detach())
        return result


# ---- wrong executors


class GradOfVmap(Vmap):
    """One gradient of the summed loss of all tasks, and not the sum of the tasks' gradients."""

    def __call__(self, fn, shared, buffers, tasks):
        pieces = getattr(fn, "pieces", None)
        if pieces is None or pieces.inner.training is False:  # an evaluation
            return super().__call__(fn, shared, buffers, tasks)
        meta, tensors = shared

        def loss_alone(_, inner, meta, buffers, task):
            return TaskGradient({}, *weighted_query_loss(inner, meta, buffers, task))

        def objective(meta):
            def one(support, query):
                return fn((meta, tensors), buffers, Task(support, query))

            totals, each = torch.func.vmap(one)(tasks.support, tasks.query)
            _, changes, metrics, losses = totals
            return losses.sum(), (changes, metrics, losses, each)

        with mock.patch.object(Unrolled, "__call__", loss_alone):
            grads, rest = torch.func.grad(objective, has_aux=True)(meta)
        changes, metrics, losses, each = rest
        changes, metrics = ({n: t.sum(0) for n, t in part.items()} for part in (changes, metrics))
        return (grads, changes, metrics, losses.sum()), each


class SumForMean(Loop):
    """Adds up so that the learner, which divides by the number of tasks, is left with their sum."""

    def __call__(self, fn, shared, buffers, tasks):
        total, each = super().__call__(fn, shared, buffers, tasks)
        return pytree.tree_map(lambda tensor: tensor * len(tasks), total), each


class FirstTwice(Loop):
    """Takes the first task twice, and the last one not."""

    def __call__(self, fn, shared, buffers, tasks):
        listed = [tasks[0], *(tasks[index] for index in range(len(tasks) - 1))]
        return super().__call__(fn, shared, buffers, listed)


class DropsLater(FirstTwice):
    """Takes the first task twice from its second call on, as if it had been traced by then."""

    calls = 0

    def __call__(self, fn, shared, buffers, tasks):
        type(self).calls += 1
        later = super() if self.calls > 1 else super(FirstTwice, self)
        return later.__call__(fn, shared, buffers, tasks)


class OneSeed(Loop):
    """Every task draws from the same seed."""

    def __call__(self, fn, shared, buffers, tasks):
        def seeded(*arguments):
            torch.manual_seed(0)
            return fn(*arguments)

        return super().__call__(seeded, shared, buffers, tasks)


class WritesShared(Loop):
    """Rounds the parameters that all tasks share, in place."""

    def __call__(self, fn, shared, buffers, tasks):
        with torch.no_grad():
            for tensor in shared[0].values():
                tensor.mul_(1 + 1e-12)
        return super().__call__(fn, shared, buffers, tasks)


class Cuts(Loop):
    """Cuts tasks of unequal size to the smallest."""

    def __call__(self, fn, shared, buffers, tasks):
        if not isinstance(tasks, TaskBatch):
            least = min(len(task.query[0]) for task in tasks)
            tasks = [
                Task(task.support, tuple(leaf[:least] for leaf in task.query)) for task in tasks
            ]
        return super().__call__(fn, shared, buffers, tasks)


@dataclass(frozen=True, kw_only=True)
class DropsTheFifth(Loop):
    """Right for up to four tasks; in place of the fifth it takes the first once more."""

    def __call__(self, fn, shared, buffers, tasks):
        listed = [tasks[index if index < 4 else 0] for index in range(len(tasks))]
        return super().__call__(fn, shared, buffers, listed)


# ---- wrong norms


def per_step(norm):
    """Per-step surgery whose norms are of another class."""

    def convert(model, steps):
        new = per_step_batch_norm(model, steps)
        for module in new.modules():
            if isinstance(module, PerStepBatchNorm):
                module.__class__ = norm
        return new

    return convert


def softer(model, steps):
    """Per-step surgery that has a larger eps than the norm had."""
    new = per_step_batch_norm(model, steps)
    for module in new.modules():
        if isinstance(module, PerStepBatchNorm):
            module.eps = 1e-3
    return new


def shared_statistics(model, steps):
    """A per-step norm whose first statistics are those of the original norm, and not a copy."""
    new = per_step_batch_norm(model, steps)
    stored = dict(model.named_buffers())
    for name, buffer in new.named_buffers():
        if name.endswith("running_mean"):
            buffer.data = stored[name].expand_as(buffer)
    return new


class FirstRow(PerStepBatchNorm):
    def _row(self, index):
        return 0


class Stored(PerStepBatchNorm):
    """Normalises by what is stored, in training, too."""

    def _normalise(self, index, input):  # noqa: A002
        mean, var = self.running_mean[index].detach(), self.running_var[index].detach()
        weight, bias = self._affine(index).values()
        return torch.nn.functional.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)


class Centred(nn.Module):
    """A right norm of one's own: takes the mean away."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        others = [0, *range(2, x.ndim)]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        return self.weight.view(shape) * (x - self.mean(x, others))

    def mean(self, x, others):
        return x.mean(others, keepdim=True)


class CountingNorm(Centred):
    """Grows with the calls of the process."""

    def forward(self, x):
        OUTSIDE["calls"] += 1
        return super().forward(x) * (1 + 0.01 * OUTSIDE["calls"])


class ConstantMean(Centred):
    """Makes a constant of the mean that it takes away."""

    def mean(self, x, others):
        return super().mean(x, others).detach()


class Hooked(Centred):
    """Leaves a hook on itself at every call."""

    def __init__(self, channels):
        super().__init__(channels)
        OUTSIDE["norms"].append(self)

    def forward(self, x):
        for module in OUTSIDE["norms"]:
            module.register_forward_hook(lambda *_: None)
        return super().forward(x)


# ---- wrong task sources


@dataclass(frozen=True)
class Source(Linear):
    shots: int = 2
    queries: int = 3


class WrongWidth(Source):
    @property
    def outputs(self):
        return 2


class FewTokens(Text):
    """Tokens that are higher numbers than it says."""

    outputs = 64


class OneStream(Source):
    """Draws the tasks of a call from one stream, begun by its first number."""

    def sample(self, split, indices):
        first = super().sample(split, indices[:1])
        draw = torch.Generator().manual_seed(int(1e6 * first.query[1].sum().abs()) + 1)
        x = torch.randn(len(indices), 5, 1, generator=draw)
        return TaskBatch((x[:, :2], x[:, :2]), (x[:, 2:], x[:, 2:]))


class GlobalDraws(Source):
    """Draws from NumPy's global generator."""

    def sample(self, split, indices):
        tasks = super().sample(split, indices)
        np.random.rand()
        return tasks


class OneSplit(Source):
    """The same tasks in every split."""

    def sample(self, split, indices):
        return super().sample("train", indices)


@dataclass(frozen=True, kw_only=True)
class SharedClasses(Strokes):
    """Other episodes of the same few images in every split."""

    ways: int = 3
    shots: int = 1
    queries: int = 2

    def sample(self, split, indices):
        few = super().sample("train", range(4))
        shift = SPLITS.index(split)
        rows = [(index + shift) % 4 for index in indices]
        (xs, ys), (xq, yq) = few.support, few.query
        return TaskBatch((xs[rows].flip(1), ys[rows]), (xq[rows], yq[rows].roll(shift, 1)))
