"""Batch norms that leave the statistics of one batch, and norms that predict by them, differentiably.

    m = mean(x),  v = var(x) n/(n − 1)   of a support batch;    y = γ (x − m)/√(v + ε) + β   of a query

PyTorch's own kernels take running statistics for constants: nothing flows to the pass that they come
from. Both functions here wrap a norm's `forward`, whatever it does beside normalising.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

NormStatistics: TypeAlias = Literal["batch", "running", "support"]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def leaving_statistics(norm: _NormBase) -> Callable[[Tensor], Any]:
    """A training norm's `forward`, which leaves the batch's statistics in its buffers, as new tensors.

    They are what `norm` itself would leave with a momentum of 1.

    >>> norm = torch.nn.BatchNorm1d(2)
    >>> output = leaving_statistics(norm)(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    >>> norm.running_mean, norm.running_var
    (tensor([2., 5.]), tensor([ 2., 18.]))
    """
    forward, buffers = norm.forward, norm._buffers

    def run(inputs: Tensor) -> Any:
        held = {name: buffers[name] for name in _BUFFERS if name in buffers}
        buffers.update(dict.fromkeys(held))
        try:
            output = forward(inputs)
        finally:
            buffers.update(held)
        like = held["running_mean"]
        assert like is not None
        examples = inputs.to(like.dtype)[None if _channels(norm, inputs) == 0 else ...]
        within = [*range(2, examples.ndim), *([] if isinstance(norm, _InstanceNorm) else [0])]
        both = torch.var_mean(examples, within, keepdim=True)
        variance, mean = (each.mean(0).flatten() for each in both)
        buffers.update(running_mean=mean, running_var=variance)
        return output

    return run


def by_statistics(norm: _NormBase) -> Callable[[Tensor], Any]:
    """An evaluating norm's `forward`, through whose statistics derivatives flow if they ask for it.

    >>> norm = torch.nn.BatchNorm1d(1).eval()
    >>> norm.running_mean = mean = torch.tensor([0.5], requires_grad=True)
    >>> by_statistics(norm)(torch.ones(3, 1)).sum().backward()
    >>> mean.grad
    tensor([-3.0000])
    """
    forward, buffers = norm.forward, norm._buffers

    def run(inputs: Tensor) -> Any:
        mean, variance = buffers["running_mean"], buffers["running_var"]
        assert mean is not None
        assert variance is not None
        if not (mean.requires_grad or variance.requires_grad):
            return forward(inputs)
        shape = [-1] + [1] * (inputs.ndim - 1 - _channels(norm, inputs))
        centred = inputs.to(mean.dtype) - mean.reshape(shape)
        scaled = centred * (variance + norm.eps).rsqrt().reshape(shape)
        # What is left of `forward` finds statistics by which it changes nothing.
        unit = torch.full_like(variance, 1 - norm.eps)
        buffers.update(running_mean=torch.zeros_like(mean), running_var=unit)
        try:
            return forward(scaled.to(inputs.dtype))
        finally:
            buffers.update(running_mean=mean, running_var=variance)

    return run


def tracking_norms(module: nn.Module) -> dict[str, _NormBase]:
    """The batch and instance norms that keep running statistics, by name."""
    return {
        name: member
        for name, member in module.named_modules()
        if isinstance(member, _NormBase) and tracks(member)
    }


def norm_buffers(module: nn.Module) -> frozenset[str]:
    """The names of the buffers of the norms that keep running statistics."""
    norms = tracking_norms(module).items()
    return frozenset(
        f"{name}.{leaf}" if name else leaf
        for name, norm in norms
        for leaf, _ in norm.named_buffers(recurse=False)
    )


def tracks(module: nn.Module) -> bool:
    """True for a batch or instance norm that keeps running statistics."""
    return isinstance(module, _NormBase) and getattr(module, "running_mean", None) is not None


def _channels(norm: _NormBase, inputs: Tensor) -> int:
    """The dimension of the channels: the second, or the first of an instance norm's single example."""
    kind: Any = norm
    single = isinstance(norm, _InstanceNorm) and inputs.ndim == kind._get_no_batch_dim()
    return 0 if single else 1
