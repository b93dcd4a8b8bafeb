"""Meta-Curvature: a learned curvature of the gradient, one matrix for each of its axes.

    MC(G) = M_out G M_in,        MC(G) = G ×₁ M_out ×₂ M_in ×₃ M_f

Source: Park, Oliva 2019.
"""

from typing import Any, Self

import torch
from einops import einsum
from torch import Tensor

from metablocks.checks import CountFrom0, checked
from metablocks.errors import RuleError
from metablocks.functional import trainable
from metablocks.rules.base import NamedTensors, StepInfo, UpdateRule
from metablocks.rules.factors import find, identity, sizes
from metablocks.types import Tensors

_AXES = {1: (), 2: ("out", "in"), 3: ("out", "in", "filter")}


@checked(RuleError)
class MetaCurvature(UpdateRule):
    """Transform a gradient by a learned matrix for each of its axes: MC(G) = M_out G M_in.

    Every adapted parameter has its own, and the result is still a gradient: a learning rate behind
    it negates, `Chain(MetaCurvature(), LearningRate(0.1))`. By the shape of the parameter:

    - linear `[out, in]`: M_out `[out, out]`, M_in `[in, in]`, MC(G) = M_out G M_in;
    - convolution `[C_out, C_in, *kernel]`, of 1 to 3 dimensions, k kernel positions: M_out
      `[C_out, C_out]`, M_in `[C_in, C_in]`, M_f `[k, k]`, the mode products
      MC(G)_{oif} = Σ_{pjs} M_out_{op} M_in_{ij} M_f_{fs} G_{pjs};
    - vector `[n]` (biases, norms) or a single number: one number per entry, multiplied.

    So many numbers: out² + in², C_out² + C_in² + k², n. They are unconstrained, of the dtype of the
    parameter that they serve (complex for a complex one), and named after it:
    `factors.out.conv.weight`, `factors.in.conv.weight`, `factors.filter.conv.weight`,
    `factors.scale.conv.bias`.

    Law: identities and ones at first, so that `Chain(MetaCurvature(), r)` starts as `r`, to the last
    bit in its first update.

    Source: Park, Oliva 2019 (α fixed; one step).

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    >>> rule = mb.MetaCurvature().setup(params, steps=1)
    >>> {name: list(p.shape) for name, p in rule.named_parameters()}
    {'factors.out.w': [2, 2], 'factors.in.w': [3, 3], 'factors.scale.b': [2]}
    >>> gradients = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    >>> rule(gradients, rule.init(params), mb.StepInfo(0, 1, params))[0]["b"].detach()
    tensor([1., 1.])

    Raises `RuleError` for parameters of more than 5 dimensions, and for a rule used before `setup`
    or set up twice.
    """

    negates = False

    def __init__(self) -> None:
        super().__init__()
        self.factors: NamedTensors | None = None

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        self._check_new(self.factors)
        factors: Tensors = {}
        for name, parameter in trainable(params).items():
            axes = sizes("MetaCurvature", name, parameter.shape)
            if len(axes) == 1:
                factors[f"scale.{name}"] = torch.ones_like(parameter, requires_grad=False)
            for axis, size in zip(_AXES[len(axes)], axes, strict=False):
                factors[f"{axis}.{name}"] = identity(size, parameter)
        self.factors = NamedTensors(factors, learn=True)
        return self

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        factors: Tensors = dict(self._ready(self.factors).named_parameters(remove_duplicate=False))
        return {name: _curved(factors, name, g) for name, g in updates.items()}, state


def _curved(factors: Tensors, name: str, gradient: Tensor) -> Tensor:
    def factor(axis: str) -> Tensor:
        return find("MetaCurvature", factors, f"{axis}.{name}", name)

    axes = sizes("MetaCurvature", name, gradient.shape)
    flow = gradient.reshape(axes)
    with torch.autocast(gradient.device.type, enabled=False):  # updates keep the full precision
        if len(axes) == 1:
            flow = einsum(factor("scale").reshape(axes), flow, "n, n -> n")
        elif len(axes) == 2:
            flow = einsum(factor("out"), flow, factor("in"), "o p, p j, j i -> o i")
        else:
            flow = einsum(
                factor("out"), flow, factor("in"), factor("filter"), "o p, p j s, i j, f s -> o i f"
            )
    return flow.reshape(gradient.shape)
