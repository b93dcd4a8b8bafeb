"""The model at the end of a task, as a plain module that predicts by itself."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from metablocks.functional import module_arguments, step_aware_modules, tracking_norms
from metablocks.inner import Carry
from metablocks.surgery import replace_modules
from metablocks.types import Batch


@torch.no_grad()
def adapted_model(model: nn.Module, carries: Sequence[Carry], support: Batch) -> nn.Module:
    """A copy of `model` at the last of carry 0 … K, in `eval()` mode.

    Step-aware modules stay at the last inner step; those that know what they are there (a method
    `at_step(index)`) are replaced by it. Batch norms carry the statistics of the support pass of that
    step, but for those that predict by statistics they have stored (`keeps_statistics`).
    """
    last = max(len(carries) - 2, 0)
    adapted, before = (_at(model, carry, last) for carry in (carries[-1], carries[last]))
    stored = {n for n, m in model.named_modules() if getattr(m, "keeps_statistics", False)}
    norms = {name: n for name, n in tracking_norms(before).items() if name not in stored}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.train()
        norm.momentum = 1.0
    args, kwargs = module_arguments(support[0])
    if norms:
        before(*args, **kwargs)
    for name, norm in norms.items():
        for buffer, value in norm.named_buffers():
            adapted.get_buffer(f"{name}.{buffer}" if name else buffer).copy_(value)
    return adapted


def _at(model: nn.Module, carry: Carry, index: int) -> nn.Module:
    """A copy of the model at a carry, in `eval()` mode, fixed at inner step `index`."""
    model = copy.deepcopy(model).eval()
    model.zero_grad(set_to_none=True)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in {**carry.params, **carry.buffers}.items():
        own[name].copy_(tensor)
    for module in step_aware_modules(model):
        module.inner_step = index  # type: ignore[assignment]
    return fixed_at_step(model, index)


def fixed_at_step(model: nn.Module, index: int) -> nn.Module:
    """The model, in place, with plain modules for those that know what they are at an inner step.

    >>> fixed_at_step(nn.Tanh(), 0)
    Tanh()
    """

    def plain(_: str, module: nn.Module) -> nn.Module | None:
        at_step: Callable[[int], nn.Module] | None = getattr(module, "at_step", None)
        return at_step(index) if at_step else None

    return replace_modules(model, plain)
