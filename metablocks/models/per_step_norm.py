"""Per-step batch norm: statistics, and γ and β, of their own for every inner step.

    y = γ_i (x − μ) / √(σ² + eps) + β_i          i: the inner step that the pass belongs to

Step i covers the support pass before update i and the query pass after it. Fast weights move far
within a task, and so do the distributions of activations: one set of running statistics, and one γ
and β, fit no step well (Antoniou, Edwards, Storkey 2018: BNRS and BNWB).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metablocks.checks import Count, checked
from metablocks.errors import BlockError
from metablocks.per_step import Beyond, StepAware, put_row, row, take_row

Statistics: TypeAlias = Literal["batch", "running"]
Affine: TypeAlias = Literal["per_step", "shared"]

AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
RESERVED = (
    *("steps", "statistics", "affine", "beyond", "inner_step", "max_steps"),
    *("keeps_statistics", "collects_buffers", "at_step"),
)
"""The names that a per-step norm has for itself."""
_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}


@checked()
class PerStepBatchNorm(StepAware):
    """A batch norm with a row for every inner step. `per_step_batch_norm` makes them, and says how.

    Parameters: `weight`, `bias` (γ, β) `[steps, channels]`, or `[channels]` with `affine="shared"`;
    none if the norm had none. Buffers: `running_mean`, `running_var` `[steps, channels]`,
    `num_batches_tracked` `[steps]`, int64. Rows start as what the norm had. What a subclass adds,
    parameters, buffers, modules and attributes, stays as it is, one for all steps; they become this
    module's, under their names.

    A training pass moves the statistics of its step, running ← (1 − momentum) running + momentum ·
    (batch mean, unbiased batch variance); a `momentum` of None is the cumulative mean. A subclass
    runs its own `forward` and moves them itself, with the row of its step in their places. (There a
    `momentum` of None is counted in Python, which `torch.func.vmap` refuses.)

    >>> import torch
    >>> import metablocks as mb
    >>> norm = mb.PerStepBatchNorm(torch.nn.BatchNorm2d(4), steps=3)
    >>> norm.weight.shape, norm.running_mean.shape
    (torch.Size([3, 4]), torch.Size([3, 4]))
    """

    collects_buffers = True

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        norm: _BatchNorm,
        steps: Count,
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
        # A norm of its class and attributes with nothing registered, in a tuple, so that it is not a
        # submodule: `_as_norm` lends it what is registered here.
        self._norm = (copy.copy(norm),)
        self._empty()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach().expand(steps, *tensor.shape).clone()

        for name, parameter in norm._parameters.items():
            if name in AFFINE and parameter is not None:
                values = rows(parameter) if affine == "per_step" else parameter.detach().clone()
                parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
            self.register_parameter(name, parameter)
        # A norm that keeps no statistics starts from those of a new one.
        like = next((t for t in (norm.running_mean, norm.weight) if t is not None), torch.zeros(0))
        fresh = nn.BatchNorm1d(
            norm.num_features, affine=False, device=like.device, dtype=like.dtype
        )
        for name, buffer in norm._buffers.items():
            if name in STATISTICS:
                buffer = rows(fresh.get_buffer(name) if buffer is None else buffer)
            kept = name not in norm._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        for name, module in norm._modules.items():
            self.add_module(name, module)
        self.training = norm.training

    @property
    def max_steps(self) -> int | None:  # type: ignore[override]
        """The most inner steps it can serve; None if any number will do."""
        return self.steps if self.beyond == "error" else None

    @property
    def keeps_statistics(self) -> bool:  # type: ignore[override]
        """True if predictions rest on the statistics it has stored."""
        return self.statistics == "running"

    def __getattr__(self, name: str) -> Any:
        """A registered tensor or module, or an attribute of the norm, such as `eps`."""
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
        index, (norm,) = self._row(self._at), self._norm
        if type(norm) in _DIMENSIONS and not (norm._forward_hooks or norm._forward_pre_hooks):
            return self._normalise(index, *args, **kwargs)
        reads = self.training or self.keeps_statistics
        statistics = self._statistics(index) if reads else dict.fromkeys(STATISTICS)
        with self._as_norm(self._affine(index), statistics) as norm:
            norm.track_running_stats = reads
            output = norm(*args, **kwargs)
            if self.training:
                for name in STATISTICS:
                    put_row(self.get_buffer(name), index, norm.get_buffer(name).detach())
        return output

    def at_step(self, index: int) -> nn.Module:
        """The ordinary batch norm that this one is at inner step `index`: of the class it was."""
        step, twin = self._row(index), copy.deepcopy(self)
        parameters = {
            name: None
            if tensor is None
            else nn.Parameter(tensor.detach().clone(), self.get_parameter(name).requires_grad)
            for name, tensor in self._affine(step).items()
        }
        norm = twin._lend(parameters, self._statistics(step))
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

    def _row(self, index: int | Tensor) -> int | Tensor:
        return row("per_step_batch_norm", index, self.steps, self.beyond)

    def _affine(self, index: int | Tensor) -> dict[str, Tensor | None]:
        both = {name: self._parameters[name] for name in AFFINE}
        if self.affine == "shared":
            return dict(both)
        return {
            name: None if tensor is None else take_row(tensor, index)
            for name, tensor in both.items()
        }

    def _statistics(self, index: int | Tensor) -> dict[str, Tensor]:
        """Copies of a row, as constants: kernels write them in place, and do not differentiate them.

        Without gaps in memory, or what is written under `vmap` is lost.
        """
        rows = {name: take_row(self.get_buffer(name), index).detach() for name in STATISTICS}
        return {n: t.clone(memory_format=torch.contiguous_format) for n, t in rows.items()}

    def _normalise(self, index: int | Tensor, input: Tensor) -> Tensor:  # noqa: A002 (as torch has it)
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
            mean, var = take_row(self.running_mean, index), take_row(self.running_var, index)
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        if self.training:
            self._track(input.detach(), index)
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)

    def _track(self, inputs: Tensor, index: int | Tensor) -> None:
        var, mean = torch.var_mean(inputs, [0, *range(2, inputs.ndim)])
        count = take_row(self.num_batches_tracked, index) + 1
        put_row(self.num_batches_tracked, index, count)
        if self.momentum is None:
            share: Tensor | float = 1 / count.to(mean)
        else:
            share = self.momentum
        for running, seen in ((self.running_mean, mean), (self.running_var, var)):
            before = take_row(running, index)
            put_row(running, index, before + share * (seen.to(running) - before))
