"""Surgery that gives every batch norm of a model a row for each inner step (see `per_step_norm`)."""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from metablocks.checks import Count, checked
from metablocks.errors import BlockError
from metablocks.models.per_step_norm import (
    AFFINE,
    RESERVED,
    STATISTICS,
    Affine,
    PerStepBatchNorm,
    Statistics,
)
from metablocks.models.surgery import outer_loop_patterns, replace_modules
from metablocks.per_step import Beyond


@checked()
def per_step_batch_norm(
    model: nn.Module,
    steps: Count,
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
    1. tasks combine by a mean and not one after another; 2. evaluation writes nothing, while the
    reference's backup of the statistics aliases them.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    >>> [list(p.shape) for p in mb.per_step_batch_norm(model, steps=5).parameters()]
    [[4, 3], [4], [5, 4], [5, 4], [2, 4], [2]]

    Raises `BlockError` for `steps` below 1, an unknown option, a model without batch norm, and one
    with a batch norm that is lazy and has not seen data yet, whose γ, β or statistics are computed
    from other tensors (a parametrization), or which has a tensor or module of a name that a per-step
    norm needs.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        problem = _obstacle(norm)
        if problem:
            module = f"{name or 'the model'} is a {type(norm).__name__}"
            raise BlockError(f"per_step_batch_norm: {module} {problem}")
    if not norms:
        raise BlockError(
            f"per_step_batch_norm: {type(model).__name__} has no batch norm to convert; leave it out"
        )

    tied: dict[nn.Parameter, nn.Parameter] = {}

    def convert(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _BatchNorm):
            return None
        new = PerStepBatchNorm(module, steps, statistics=statistics, affine=affine, beyond=beyond)
        for name in AFFINE:
            parameter = module._parameters[name]
            if parameter is not None:
                setattr(new, name, tied.setdefault(parameter, new.get_parameter(name)))
        return new

    return replace_modules(copy.deepcopy(model), convert)


def _obstacle(norm: _BatchNorm) -> str:
    """The reason that a batch norm cannot have rows; empty if it can."""
    if isinstance(norm, LazyModuleMixin):
        return "that has not seen data yet; run the model on one batch first"
    registered = [*norm._parameters, *norm._buffers]
    for name in (*AFFINE, *STATISTICS):
        if name not in registered:
            return (
                f"whose {name} is computed from other tensors, and rows of it would be lost at the next "
                "pass; take that away first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for name in (*registered, *norm._modules):
        if name in RESERVED:
            return (
                f"that has a tensor or module called {name}, which a per-step norm needs; rename it"
            )
    return ""


@checked()
def norm_patterns(model: nn.Module) -> list[str]:
    """Patterns for `adapt` that leave γ and β of per-step batch norms to the outer loop.

    >>> import torch
    >>> import metablocks as mb
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    >>> mb.norm_patterns(mb.per_step_batch_norm(model, steps=5))
    ['*', '!1.weight', '!1.bias']
    """

    def affine(module: nn.Module) -> list[str]:
        norm = isinstance(module, PerStepBatchNorm)
        parameters = module.named_parameters(recurse=False) if norm else ()
        return [name for name, p in parameters if name in AFFINE and p.requires_grad]

    return outer_loop_patterns(model, affine)
