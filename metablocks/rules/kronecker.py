"""KFO: a learned Kronecker-factored transform of the gradient.

    U(G) = L G R + B,        vec U(G) = (Rᵀ ⊗ L) vec G + vec B

Source: Arnold, Iqbal, Sha 2021, "When MAML can adapt fast and how to assist when it cannot".
"""

from typing import Any, NamedTuple, Self

import torch
from einops import einsum
from torch import Tensor

from metablocks.checks import CountFrom0, checked
from metablocks.errors import RuleError
from metablocks.functional import trainable
from metablocks.models.layers import ACTIVATIONS, Activation
from metablocks.rules.base import NamedTensors, StepInfo, UpdateRule, inner_product
from metablocks.rules.factors import find, identity, sizes
from metablocks.types import Tensors


@checked(RuleError)
class KFO(UpdateRule):
    """Transform a gradient by learned Kronecker factors: U(G) = L G R + B.

    Every adapted parameter has its own, and the result is still a gradient: a learning rate behind
    it negates, `Chain(KFO(), LearningRate(0.1))`. By the shape of the parameter:

    - linear `[out, in]`: left `[out, out]`, right `[in, in]`, B `[out, in]`;
    - convolution `[C_out, C_in, *kernel]`, of 1 to 3 dimensions, k kernel positions: left
      `[C_in, C_in]`, right `[k, k]`, B `[C_in, k]`, shared by the C_out filters;
    - vector `[n]` (biases, norms) or a single number: left `[n, n]`, B `[n]`; with
      `vector_right_factor` it is a matrix `[n, 1]`: right `[1, 1]`, B `[n, 1]`.

    So many numbers, without B: out² + in², C_in² + k², n² (or n² + 1); all of it (2 · `hidden` + 1)
    times.

    They have the dtype of their parameter, complex for a complex one.

    - `hidden`: layers in front of the last transform, which make a network of it (the paper:
      typically 2), each two transforms and σ: h ← K₋(h) + σ(K₊(h)) − σ(K₋(h)).
    - `activation`: σ, of the hidden layers.
    - `psd`: True puts LᵀL for L and RᵀR for R (LᴴL and RᴴR if they are complex): a positive
      semi-definite transform.
    - `bias`: False leaves B out.
    - `vector_right_factor`: True takes a vector for a matrix `[n, 1]`, with a right factor.
    - `adapt_transform`: True if the transform's own factors φ adapt inside a task too, from the
      second step on.
    - `rate`: α of θ and φ alike, with `adapt_transform`.

    With `adapt_transform`:

        φ_k = φ_{k−1} − α ∂L_s(θ_k)/∂φ_{k−1},    θ_k = θ_{k−1} − α U(g_{k−1}; φ_{k−1})

    The whole rule is then `Chain(KFO(adapt_transform=True, rate=α), LearningRate(α))`. What is
    meta-learned is φ_0; a task's own φ_k live in the rule's state.

    Factors are named after what they serve: `factors.left.conv.weight`, `factors.right.conv.weight`,
    `factors.bias.conv.weight`, and `factors.hidden0.on.left.conv.weight` (K₊; `off` is K₋).

    Law: L = R = I and B = 0 at first, so that `Chain(KFO(), r)` starts as `r`, to the last bit in
    its first update, and every factor has a gradient from the first meta-step on. (With
    `adapt_transform` the factors leave the identity within the task: it is `r` for one step.)

    Source: Arnold, Iqbal, Sha 2021.

    Deviations:

    1. The paper's network σ(K(h)) cannot be the identity. A hidden layer here is: where
       K₊ = K₋ = I, it is h + σ(h) − σ(h). With ReLU it takes the positive part of K₊(h) and the
       negative part of K₋(h) (Balduzzi et al. 2017, "looks linear"), and with K₋ = 0, σ(0) = 0 it
       is the paper's layer. With `adapt_transform` it is so at the first step; K₋ then adapts as
       well and leaves 0, unless `bias=False` and L and R are both zero, of which each is the
       other's slope: a vector has both with `vector_right_factor` alone.
    2. The release gives a vector a right factor `[1, 1]` too. L and L · R reach the same functions of
       the gradient, so that it is left out here. What is learned by gradient descent is another
       trajectory, though, as two factors scale at once: in the outer loop, and with
       `adapt_transform` within a task too. `vector_right_factor=True` is the release's.
    3. The release takes LᵀL, RᵀR and no B by default; here L G R + B is, and both are options.
    4. `adapt_transform` takes second-order steps only: the release differentiates some of its
       first-order steps all the same.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2, 3)}
    >>> rule = mb.KFO().setup(params, steps=1)
    >>> {name: list(p.shape) for name, p in rule.named_parameters()}
    {'factors.left.w': [2, 2], 'factors.right.w': [3, 3], 'factors.bias.w': [2, 3]}
    >>> rule({"w": torch.ones(2, 3)}, rule.init(params), mb.StepInfo(0, 1, params))[0]["w"].detach()
    tensor([[1., 1., 1.],
            [1., 1., 1.]])

    Raises `RuleError` for a field out of range, for `rate` without `adapt_transform` and the reverse,
    for parameters of more than 5 dimensions, for complex ones with `hidden` layers, and for a rule
    used before `setup` or set up twice; `BlockError`, with `adapt_transform`, in a learner whose rule
    is not the chain above or whose order is first-order at any step.
    """

    negates = False

    def __init__(
        self,
        *,
        hidden: CountFrom0 = 0,
        activation: Activation = "relu",
        psd: bool = False,
        bias: bool = True,
        vector_right_factor: bool = False,
        adapt_transform: bool = False,
        rate: float | None = None,
    ) -> None:
        super().__init__()
        if adapt_transform != (rate is not None):
            problem = (
                "None; with adapt_transform it takes the inner learning rate, a finite number"
                if adapt_transform
                else f"{rate!r}, which only adapt_transform=True reads; leave it out, and put the "
                "learning rate behind: Chain(KFO(), LearningRate(0.1))"
            )
            raise RuleError(f"KFO rate is {problem}", block="KFO", field="rate")
        self.hidden = hidden
        self.psd = psd
        self.bias = bias
        self.vector_right_factor = vector_right_factor
        self.rate = rate
        self.factors: NamedTensors | None = None
        self.activation = ACTIVATIONS[activation]()

    def extra_repr(self) -> str:
        adapts = "" if self.rate is None else f", adapt_transform=True, rate={self.rate}"
        right = ", vector_right_factor=True" if self.vector_right_factor else ""
        return f"hidden={self.hidden}, psd={self.psd}, bias={self.bias}" + right + adapts

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        self._check_new(self.factors)
        layers = [f"hidden{n}.{side}." for n in range(self.hidden) for side in ("on", "off")]
        factors: Tensors = {}
        for layer in [*layers, ""]:
            for name, parameter in trainable(params).items():
                if self.hidden and parameter.is_complex():
                    raise RuleError(
                        f"KFO hidden is {self.hidden}, but {name} is {parameter.dtype}, and the "
                        "activation of a hidden layer is for real numbers; use hidden=0, or leave "
                        f"{name} out of `adapt`"
                    )
                axes = self._sizes(name, parameter.shape)
                sides = axes[1:] if len(axes) == 3 else axes
                for side, size in zip(("left", "right"), sides, strict=False):
                    factors[f"{layer}{side}.{name}"] = identity(size, parameter)
                if self.bias:
                    factors[f"{layer}bias.{name}"] = parameter.new_zeros(sides)
        self.factors = NamedTensors(factors, learn=True)
        return self

    def init(self, params: Tensors) -> Any:
        if self.rate is None:
            return ()
        zeros = {name: torch.zeros_like(parameter) for name, parameter in params.items()}
        return _Adapted(self._named_factors, zeros)

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        if self.rate is None:
            return self._transform(self._named_factors, updates), state
        factors = state.factors
        if step.index > 0:
            slope = self._slope(factors, state.gradients, updates)
            factors = {key: factor - self.rate * slope[key] for key, factor in factors.items()}
        return self._transform(factors, updates), _Adapted(factors, updates)

    @property
    def _named_factors(self) -> Tensors:
        return dict(self._ready(self.factors).named_parameters(remove_duplicate=False))

    def _slope(self, factors: Tensors, before: Tensors, gradients: Tensors) -> Tensors:
        """∂L_s(θ_k)/∂φ = ∂⟨g_k, θ_k⟩/∂φ at θ_k = θ_{k−1} − α U(g_{k−1}; φ), g_k being a constant."""
        assert self.rate is not None
        rate = self.rate

        def moved(factors: Tensors) -> Tensor:
            return -rate * inner_product(gradients, self._transform(factors, before))

        slope: Tensors = torch.func.grad(moved)(factors)
        return slope

    def _sizes(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        axes = sizes("KFO", name, shape)
        return (*axes, 1) if len(axes) == 1 and self.vector_right_factor else axes

    def _transform(self, factors: Tensors, gradients: Tensors) -> Tensors:
        return {name: self._network(factors, name, g) for name, g in gradients.items()}

    def _network(self, factors: Tensors, name: str, gradient: Tensor) -> Tensor:
        flow = gradient.reshape(self._sizes(name, gradient.shape))
        with torch.autocast(gradient.device.type, enabled=False):  # updates keep the full precision
            for layer in range(self.hidden):
                on = self._kronecker(factors, f"hidden{layer}.on.", name, flow)
                off = self._kronecker(factors, f"hidden{layer}.off.", name, flow)
                flow = off + (self.activation(on) - self.activation(off))
            return self._kronecker(factors, "", name, flow).reshape(gradient.shape)

    def _kronecker(self, factors: Tensors, layer: str, name: str, flow: Tensor) -> Tensor:
        """L G R + B of one layer, for a gradient `[n]`, `[out, in]` or `[C_out, C_in, k]`."""

        def factor(side: str) -> Tensor:
            given = find("KFO", factors, f"{layer}{side}.{name}", name)
            if not self.psd:
                return given
            return einsum(given.conj(), given, "inner row, inner column -> row column")

        if flow.ndim == 1:
            flow = einsum(factor("left"), flow, "row r, r -> row")
        else:
            sides = "row r, ... r c, c column -> ... row column"
            flow = einsum(factor("left"), flow, factor("right"), sides)
        return flow + factors[f"{layer}bias.{name}"] if self.bias else flow


class _Adapted(NamedTuple):
    """A task's own transform, and the gradients of the step before."""

    factors: Tensors
    gradients: Tensors
