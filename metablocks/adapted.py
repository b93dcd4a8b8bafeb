"""The model at the end of a task, as a plain module that predicts by itself."""

import copy
from typing import Any

import torch
from torch import nn

from metablocks.errors import ModuleError, first_line
from metablocks.fingerprint import attributes_of, slots_of
from metablocks.functional import module_arguments
from metablocks.inner_loop import Carry
from metablocks.models.surgery import replace_modules
from metablocks.norm_statistics import tracking_norms
from metablocks.per_step import StepAware, step_aware_modules
from metablocks.twins import Survey, twin
from metablocks.types import Batch


@torch.no_grad()
def adapted_model(
    model: nn.Module, carry: Carry, before: Carry, steps: int, support: Batch, *, replaced: bool
) -> nn.Module:
    """A copy of `model` at the last carry, in `eval()` mode; `before` is the carry one step earlier.

    Frozen parameters that did not adapt are shared with `model`. Step-aware modules stay at the last
    inner step; those that know what they are there (a method `at_step(index)`) are replaced by it. If
    `replaced`, batch norms carry the statistics of the support pass of that step, except for those that
    predict by statistics they have stored (`keeps_statistics`).
    """
    last = max(steps - 1, 0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    adapted = _at(model, carry, last, shared=frozen)
    stored = {name for name, m in step_aware_modules(model).items() if m.keeps_statistics}
    norms = {n: m for n, m in tracking_norms(adapted).items() if n not in stored}
    if not norms or not replaced:
        return adapted
    passing = _at(model, before, last, shared=frozen)
    for name in norms:
        norm = passing.get_submodule(name)
        norm.reset_running_stats()  # type: ignore[operator]
        norm.train()
        norm.momentum = 1.0  # type: ignore[assignment]
    args, kwargs = module_arguments(support[0])
    with torch.enable_grad():  # a model may differentiate by its input
        passing(*args, **kwargs)
    for name, norm in norms.items():
        for leaf, value in passing.get_submodule(name).named_buffers(recurse=False):
            norm.get_buffer(leaf).copy_(value)
    return adapted


def _at(model: nn.Module, carry: Carry, index: int, *, shared: set[str]) -> nn.Module:
    """A copy of the model at a carry, in `eval()` mode, fixed at inner step `index`."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if name in carry.params:
            fast = carry.params[name].detach().clone()
            memo[id(parameter)] = nn.Parameter(fast, parameter.requires_grad)
        elif name in shared:
            memo[id(parameter)] = parameter
    for name, buffer in model.named_buffers():
        if name in carry.buffers:
            memo[id(buffer)] = carry.buffers[name].detach().clone()
    survey = Survey(model)
    for tensor in survey.tensors.values():
        if tensor.grad_fn is not None:  # an activation kept from a pass of the user's
            memo[id(tensor)] = tensor.detach().clone()
    try:
        copied = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise ModuleError(
            f"{type(model).__name__} cannot be copied, which adapt() needs: {first_line(error)}; give "
            "what it holds a __deepcopy__, or take losses and predictions from evaluate()"
        ) from error
    for module, names in zip(survey.modules, survey.special, strict=True):
        made: Any = memo.get(id(module))
        slots = slots_of(type(module)) if made is not None else {}
        for name, value in attributes_of(module).items() if slots else ():
            if name in slots:  # which nn.Module leaves behind
                slots[name].__set__(made, copy.deepcopy(value, memo))
        for name in names if made is not None else ():
            # What deepcopy takes as it is: a function that holds a module, a weak reference to one.
            if name in made.__dict__:
                made.__dict__[name] = twin(made.__dict__[name], memo)
    for module in copied.modules():
        if type(module) is nn.Linear:  # whose rows may be as many as the task has classes
            module.out_features = len(module.weight)
    for module in step_aware_modules(copied).values():
        module.inner_step = index
    return fixed_at_step(copied, index)


def fixed_at_step(model: nn.Module, index: int) -> nn.Module:
    """The model, in place, with plain modules for those that know what they are at an inner step.

    >>> fixed_at_step(nn.Tanh(), 0)
    Tanh()
    """

    def plain(_: str, module: nn.Module) -> nn.Module | None:
        return module.at_step(index) if isinstance(module, StepAware) else None

    return replace_modules(model, plain)
