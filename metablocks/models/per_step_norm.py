"""Per-step batch norm: statistics, and γ and β, of their own for every inner step.

    y = γ_i (x − μ) / √(σ² + eps) + β_i          i: the inner step that the pass belongs to

Step i covers the support pass before update i and the query pass after it. Fast weights move far
within a task, and so do the distributions of activations: one set of running statistics, and one γ
and β, fit no step well (Antoniou, Edwards, Storkey 2018: BNRS and BNWB).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from typing_extensions import Self

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
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RESERVED = (
    *("steps", "statistics", "affine", "beyond", "inner_step", "max_steps"),
    *("keeps_statistics", "collects_buffers", "at_step"),
)


def per_step_batch_norm(
    model: nn.Module,
    steps: int,
    statistics: Statistics = "batch",
    affine: Affine = "per_step",
    beyond: Beyond = "error",
) -> nn.Module:
    """A copy of `model` in which every batch norm has a row for each of `steps` inner steps.

    The model's modules take no step argument: a learner tells the step to the norms while they run.
    Batch norms of a class of its own (one with an activation behind it, say) go on as that class:
    its `forward` runs with the row of the step for γ, β and statistics.

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

    Raises `BlockError` for `steps` below 1, an unknown option, a model without batch norm, and one
    with a batch norm that is lazy and has not seen data yet, whose γ, β or statistics are computed
    from other tensors (a parametrization), or which has a tensor or module of a name that a per-step
    norm needs.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BlockError(f"per_step_batch_norm steps is {steps!r}; it takes 1 or more")
    check_choice("statistics", statistics, get_args(Statistics))
    check_choice("affine", affine, get_args(Affine))
    check_beyond("per_step_batch_norm", beyond)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        problem = _obstacle(norm)
        if problem:
            where = f"{name or 'the model'} is a {type(norm).__name__}"
            raise BlockError(f"per_step_batch_norm: {where} {problem}")
    if not norms:
        raise BlockError(
            f"per_step_batch_norm: {type(model).__name__} has no batch norm to convert; leave it out"
        )

    tied: dict[nn.Parameter, nn.Parameter] = {}

    def convert(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _BatchNorm):
            return None
        new = PerStepBatchNorm(module, steps, statistics=statistics, affine=affine, beyond=beyond)
        for name in _AFFINE:
            own = module._parameters[name]
            if own is not None:
                setattr(new, name, tied.setdefault(own, new.get_parameter(name)))
        return new

    return replace_modules(copy.deepcopy(model), convert)


def _obstacle(norm: _BatchNorm) -> str:
    """Why a batch norm cannot have rows; empty if it can."""
    if isinstance(norm, LazyModuleMixin):
        return "that has not seen data yet; run the model on one batch first"
    registered = [*norm._parameters, *norm._buffers]
    for name in (*_AFFINE, *_STATISTICS):
        if name not in registered:
            return (
                f"whose {name} is computed from other tensors, and rows of it would be lost at the next "
                "pass; take that away first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for name in (*registered, *norm._modules):
        if name in _RESERVED:
            return (
                f"that has a tensor or module called {name}, which a per-step norm needs; rename it"
            )
    return ""


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
        for own, parameter in module.named_parameters(recurse=False)
        if own in _AFFINE and parameter.requires_grad
    ]
    return ["*", *(f"!{name}" for name in names)]


class PerStepBatchNorm(nn.Module):
    """A batch norm with a row for every inner step. `per_step_batch_norm` makes them, and says how.

    Parameters: `weight`, `bias` (γ, β) `[steps, channels]`, or `[channels]` with `affine="shared"`;
    none where the norm had none. Buffers: `running_mean`, `running_var` `[steps, channels]`,
    `num_batches_tracked` `[steps]`, int64. Rows start as what the norm had. What a subclass adds,
    parameters, buffers, modules and attributes, stays as it is, one for all steps; they become this
    module's, under their names.

    A training pass moves the statistics of its step, running ← (1 − momentum) running + momentum ·
    (batch mean, unbiased batch variance); a `momentum` of None is the cumulative mean. A subclass
    runs its own `forward` and moves them itself, with the row of its step in their places. (There a
    `momentum` of None is counted in Python, which `torch.func.vmap` refuses.)

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
        self.steps = steps
        self.statistics = statistics
        self.affine = affine
        self.beyond: Beyond = beyond
        self.inner_step = 0
        # A norm of its class and attributes with nothing registered, in a tuple, so that it is no
        # submodule: `_as_norm` lends it what is registered here.
        self._norm = (copy.copy(norm),)
        self._empty()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach().expand(steps, *tensor.shape).clone()

        for name, own in norm._parameters.items():
            if name in _AFFINE and own is not None:
                values = rows(own) if affine == "per_step" else own.detach().clone()
                own = nn.Parameter(values, requires_grad=own.requires_grad)
            self.register_parameter(name, own)
        # A norm that keeps no statistics starts from those of a new one.
        like = next((t for t in (norm.running_mean, norm.weight) if t is not None), torch.zeros(0))
        fresh = nn.BatchNorm1d(
            norm.num_features, affine=False, device=like.device, dtype=like.dtype
        )
        for name, buffer in norm._buffers.items():
            if name in _STATISTICS:
                buffer = rows(fresh.get_buffer(name) if buffer is None else buffer)
            kept = name not in norm._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        for name, module in norm._modules.items():
            self.add_module(name, module)
        self.training = norm.training

    @property
    def max_steps(self) -> int | None:
        """The most inner steps it can serve; None where any number will do."""
        return limit(self.steps, self.beyond)

    @property
    def keeps_statistics(self) -> bool:
        """Whether predictions rest on the statistics it has stored."""
        return self.statistics == "running"

    def __getattr__(self, name: str) -> Any:
        """What is registered here, or an attribute of the norm, such as `eps`."""
        attributes = vars(self.__dict__["_norm"][0]) if "_norm" in self.__dict__ else {}
        return attributes[name] if name in attributes else super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, steps={self.steps}, statistics={self.statistics!r}, "
            f"affine={self.affine!r}, beyond={self.beyond!r}"
        )

    def train(self, mode: bool = True) -> Self:
        """As the norm does it: one of a class that stays in `eval()` does so here."""
        with self._as_norm({}, {}) as norm:
            norm.train(mode)
        self.training = norm.training
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm at its inner step: of inputs `[batch, channels, …]`, or what its class takes."""
        index, (norm,) = self._row(self.inner_step), self._norm
        if type(norm) in _DIMENSIONS and not (norm._forward_hooks or norm._forward_pre_hooks):
            return self._normalise(index, *args, **kwargs)
        reads = self.training or self.keeps_statistics
        statistics = self._statistics(index) if reads else dict.fromkeys(_STATISTICS)
        with self._as_norm(self._affine(index), statistics) as norm:
            norm.track_running_stats = reads
            output = norm(*args, **kwargs)
            if self.training:
                for name in _STATISTICS:
                    self.get_buffer(name)[index] = norm.get_buffer(name).detach()
        return output

    def at_step(self, index: int) -> nn.Module:
        """The ordinary batch norm that this one is at inner step `index`: of the class it was."""
        own, twin = self._row(index), copy.deepcopy(self)
        parameters = {
            name: None
            if tensor is None
            else nn.Parameter(tensor.detach().clone(), self.get_parameter(name).requires_grad)
            for name, tensor in self._affine(own).items()
        }
        norm = twin._lend(parameters, self._statistics(own))
        norm.track_running_stats = True
        return norm

    @contextmanager
    def _as_norm(
        self, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None]
    ) -> Iterator[_BatchNorm]:
        """The norm with all that is registered here, but these parameters and buffers."""
        try:
            yield self._lend(parameters, buffers)
        finally:
            self._empty()

    def _lend(
        self, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None]
    ) -> _BatchNorm:
        (norm,) = self._norm
        vars(norm).update(
            _parameters=self._parameters | dict(parameters),
            _buffers=self._buffers | dict(buffers),
            _modules=self._modules,
            training=self.training,
            eps=self.eps,
            momentum=self.momentum,
        )
        return norm

    def _empty(self) -> None:
        vars(self._norm[0]).update(_parameters={}, _buffers={}, _modules={})

    def _row(self, index: int) -> int:
        return row("per_step_batch_norm", index, self.steps, self.beyond)

    def _affine(self, index: int) -> dict[str, Tensor | None]:
        both = {name: self._parameters[name] for name in _AFFINE}
        if self.affine == "shared":
            return dict(both)
        return {name: None if own is None else own[index] for name, own in both.items()}

    def _statistics(self, index: int) -> dict[str, Tensor]:
        """Copies of a row, as constants: kernels write them in place, and do not differentiate them.

        Without gaps in memory, or what is written under `vmap` is lost.
        """
        rows = {name: self.get_buffer(name)[index].detach() for name in _STATISTICS}
        return {n: own.clone(memory_format=torch.contiguous_format) for n, own in rows.items()}

    def _normalise(self, index: int, input: Tensor) -> Tensor:  # noqa: A002 (as torch has it)
        """The forward pass of torch's own classes, in operations that every transform takes."""
        kind = type(self._norm[0])
        if input.ndim not in _DIMENSIONS[kind]:
            takes = " or ".join(f"{n}D" for n in _DIMENSIONS[kind])
            raise BlockError(
                f"per-step {kind.__name__} takes {takes} input, given {input.ndim}D "
                f"{list(input.shape)}"
            )
        weight, bias = self._affine(index).values()
        if self.keeps_statistics and not self.training:
            mean, var = self.running_mean[index], self.running_var[index]
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        if self.training:
            self._track(input.detach(), index)
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)

    def _track(self, inputs: Tensor, index: int) -> None:
        var, mean = torch.var_mean(inputs, [0, *range(2, inputs.ndim)])
        self.num_batches_tracked[index] += 1
        if self.momentum is None:
            share: Tensor | float = 1 / self.num_batches_tracked[index].to(mean)
        else:
            share = self.momentum
        for running, seen in ((self.running_mean, mean), (self.running_var, var)):
            running[index] = running[index] + share * (seen.to(running) - running[index])
