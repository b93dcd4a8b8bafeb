"""Per-step batch norm: statistics, and γ and β, of their own for every inner step.

    y = γ_i (x − μ) / √(σ² + eps) + β_i          i: the inner step that the pass belongs to

Step i covers the support pass before update i and the query pass after it. Fast weights move far
within a task, and so do the distributions of activations: one set of running statistics, and one γ
and β, fit no step well (Antoniou, Edwards, Storkey 2018: BNRS and BNWB).
"""

import copy
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from metablocks.errors import BlockError
from metablocks.models.layers import check_choice
from metablocks.per_step import Beyond, check_beyond, limit, row
from metablocks.surgery import replace_modules

Statistics: TypeAlias = Literal["batch", "running"]
Affine: TypeAlias = Literal["per_step", "shared"]

_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}


def per_step_batch_norm(
    model: nn.Module,
    steps: int,
    statistics: Statistics = "batch",
    affine: Affine = "per_step",
    beyond: Beyond = "error",
) -> nn.Module:
    """A copy of `model` in which every batch norm has a row for each of `steps` inner steps.

    The model's modules take no step argument: a learner tells the step to the norms while they run.

    - `statistics`: what evaluation normalises by: `"batch"`, the input at hand, or `"running"`, the
      statistics collected in training for that step. Training normalises by batch statistics and
      collects, in both cases.
    - `affine`: γ and β `"per_step"` or `"shared"`. To leave them to the outer loop, as the paper
      does, select the other parameters: `adapt=norm_patterns(model)`, or in a recipe
      `adapt: ["*", "!*.norm.*"]`.
    - `beyond`: at evaluation steps past the last row: `"error"`, or `"last"` to use the last row.

    How tasks combine: in `MetaLearner.backward` every task starts from the stored statistics, and
    each of its training passes moves those of its step as an ordinary batch norm would. What is
    stored moves by the mean over tasks of the sum of these changes. A mean does not depend on the
    order of tasks, so every executor, chunk and process gives the same statistics. Evaluation leaves
    them bit-identical.

    Law: the copy is the model: with equal rows, each step's function is the original's. With
    `affine="shared"` and `statistics="batch"`, a learner of the copy is a learner of the original.

    Source: Antoniou, Edwards, Storkey 2018 (BNRS, BNWB). Deviations from the reference code:
    1. tasks combine by a mean and not one after another; 2. evaluation writes nothing, where the
    reference's backup of the statistics aliases them.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> [list(p.shape) for p in per_step_batch_norm(model, steps=5).parameters()]
    [[4, 3], [4], [5, 4], [5, 4], [2, 4], [2]]

    Raises `BlockError` for `steps` below 1, an unknown option, a model without batch norm, one with
    a batch norm of a class of its own, and a lazy one that has not seen data yet.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BlockError(f"per_step_batch_norm steps is {steps!r}; it takes 1 or more")
    check_choice("statistics", statistics, get_args(Statistics))
    check_choice("affine", affine, get_args(Affine))
    check_beyond("per_step_batch_norm", beyond)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in _DIMENSIONS:
            known = ", ".join(kind.__name__ for kind in _DIMENSIONS)
            lazy = isinstance(norm, LazyModuleMixin)
            raise BlockError(
                f"per_step_batch_norm: {name or 'the model'} is a {type(norm).__name__}; it converts "
                f"{known}" + "; run the model on one batch first" * lazy
            )
    if not norms:
        raise BlockError(
            f"per_step_batch_norm: {type(model).__name__} has no batch norm to convert; leave it out"
        )

    tied: dict[nn.Parameter, nn.Parameter] = {}

    def convert(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _BatchNorm):
            return None
        new = PerStepBatchNorm(module, steps, statistics=statistics, affine=affine, beyond=beyond)
        for name, own in module.named_parameters():
            setattr(new, name, tied.setdefault(own, new.get_parameter(name)))
        return new.train(module.training)

    return replace_modules(copy.deepcopy(model), convert)


def norm_patterns(model: nn.Module) -> list[str]:
    """Patterns for `adapt` that leave γ and β of per-step batch norms to the outer loop.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> norm_patterns(per_step_batch_norm(model, steps=5))
    ['*', '!1.weight', '!1.bias']
    """
    names = [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PerStepBatchNorm)
        for own, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    return ["*", *(f"!{name}" for name in names)]


class PerStepBatchNorm(nn.Module):
    """A batch norm with a row for every inner step. `per_step_batch_norm` makes them, and says how.

    Parameters: `weight`, `bias` (γ, β) `[steps, channels]`, or `[channels]` with `affine="shared"`;
    none where the norm had none. Buffers: `running_mean`, `running_var` `[steps, channels]`,
    `num_batches_tracked` `[steps]`, int64. Rows start as what the norm had.

    A training pass moves the statistics of its step, running ← (1 − momentum) running + momentum ·
    (batch mean, unbiased batch variance); a `momentum` of None is the cumulative mean.

    `inner_step` is the step at hand; a learner sets it, and so may a user.
    """

    collects_buffers = True
    """A learner's `backward` brings the buffers up to date (see `MetaLearner`)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        norm: _BatchNorm,
        steps: int,
        *,
        statistics: Statistics = "batch",
        affine: Affine = "per_step",
        beyond: Beyond = "error",
    ) -> None:
        super().__init__()
        self.kind = type(norm)
        self.num_features = norm.num_features
        self.eps = norm.eps
        self.momentum = norm.momentum
        self.steps = steps
        self.statistics = statistics
        self.affine = affine
        self.beyond: Beyond = beyond
        self.inner_step = 0

        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach().expand(steps, *tensor.shape).clone()

        for name, own in (("weight", norm.weight), ("bias", norm.bias)):
            if own is None:
                self.register_parameter(name, None)
                continue
            values = rows(own) if affine == "per_step" else own.detach().clone()
            self.register_parameter(name, nn.Parameter(values, requires_grad=own.requires_grad))
        # A norm that keeps no statistics starts from those of a new one.
        kept = dict(norm.named_buffers())
        like = next((t for t in (norm.running_mean, norm.weight) if t is not None), torch.zeros(0))
        fresh = nn.BatchNorm1d(
            norm.num_features, affine=False, device=like.device, dtype=like.dtype
        )
        for name, buffer in fresh.named_buffers():
            self.register_buffer(name, rows(kept.get(name, buffer)))

    @property
    def max_steps(self) -> int | None:
        """The most inner steps it can serve; None where any number will do."""
        return limit(self.steps, self.beyond)

    @property
    def keeps_statistics(self) -> bool:
        """Whether predictions rest on the statistics it has stored."""
        return self.statistics == "running"

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, steps={self.steps}, statistics={self.statistics!r}, "
            f"affine={self.affine!r}, beyond={self.beyond!r}"
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim not in _DIMENSIONS[self.kind]:
            takes = " or ".join(f"{n}D" for n in _DIMENSIONS[self.kind])
            raise BlockError(
                f"per-step {self.kind.__name__} takes {takes} input, given {inputs.ndim}D "
                f"{list(inputs.shape)}"
            )
        index = self._row(self.inner_step)
        weight, bias = self._affine(index)
        if self.keeps_statistics and not self.training:
            mean, var = self.running_mean[index], self.running_var[index]
            return F.batch_norm(inputs, mean, var, weight, bias, False, 0.0, self.eps)
        if self.training:
            self._track(inputs.detach(), index)
        return F.batch_norm(inputs, None, None, weight, bias, True, 0.0, self.eps)

    def at_step(self, index: int) -> nn.Module:
        """The ordinary batch norm that this one is at inner step `index`: of the class it was."""
        own = self._row(index)
        norm = self.kind(self.num_features, eps=self.eps, momentum=self.momentum)
        for name, tensor in zip(("weight", "bias"), self._affine(own), strict=True):
            if tensor is None:
                norm.register_parameter(name, None)
                continue
            learned = self.get_parameter(name).requires_grad
            norm.register_parameter(name, nn.Parameter(tensor.detach().clone(), learned))
        for name, buffer in self.named_buffers():
            norm.register_buffer(name, buffer[own].clone())
        return norm.train(self.training)

    def _row(self, index: int) -> int:
        return row("per_step_batch_norm", index, self.steps, self.beyond)

    def _affine(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        if self.affine == "shared":
            return self.weight, self.bias
        weight, bias = (None if own is None else own[index] for own in (self.weight, self.bias))
        return weight, bias

    def _track(self, inputs: Tensor, index: int) -> None:
        var, mean = torch.var_mean(inputs, [0, *range(2, inputs.ndim)])
        self.num_batches_tracked[index] += 1
        if self.momentum is None:
            share: Tensor | float = 1 / self.num_batches_tracked[index].to(mean)
        else:
            share = self.momentum
        for running, seen in ((self.running_mean, mean), (self.running_var, var)):
            running[index] = running[index] + share * (seen.to(running) - running[index])
