"""MT-net's mask: which units of each layer move inside a task, by learned chance.

    u = M ∘ g        M ∈ {0, 1}, one entry for each output unit, drawn once a task

P(M_j = 1) = σ(ζ_j), with a learned logit ζ: the inner loop moves in a subspace that the outer loop
learns (Lee, Choi 2018).
"""

from typing import Self

import torch
from torch import Tensor

from metablocks.checks import CountFrom0, Positive, checked
from metablocks.errors import RuleError
from metablocks.functional import trainable
from metablocks.rules.base import NamedTensors, StepInfo, UpdateRule, real_full, scaled
from metablocks.types import Tensors


@checked(RuleError)
class MTMask(UpdateRule):
    """Let through the gradients of units drawn by learned chance: u = M ∘ g.

    M has one entry for each output unit of a layer, shared by its weight and its bias: the rows of a
    linear weight, the output channels of a convolution, the channels of a norm. It is drawn when a
    task starts and kept to its end, by the straight-through hard Gumbel-softmax of (ζ, 0):

        M = 1[s > ½],  ∂M/∂ζ := ∂s/∂ζ = s (1 − s) / temperature,
        s = σ((ζ + log u − log(1 − u)) / temperature),  u ~ U(0, 1)

    so that P(M = 1) = σ(ζ), whatever the temperature. ζ starts as `init` and is meta-learned; it is
    real, for complex layers too, and as precise as the layer's most precise tensor. It is named
    after what it serves: `logit.conv1.*` for `conv1.weight` and `conv1.bias`. A mask goes with
    a rate, which negates: `Chain(MTMask(), LearningRate(0.4))`; with `insert_tnet`, it is MT-net.

    Draws follow from torch's global generator, are independent between tasks under every executor,
    and `Vmap`'s are not those of `Loop`, as its `RandomDrawsWarning` says.

    - `temperature`: of the Gumbel-softmax.
    - `init`: ζ at first.

    Laws: with all masks on it is the identity; an `init` of 50 is that for certain in float32 and
    float64, since |log u − log(1 − u)| is below 37 there. Whoever wants to know that a learner with
    `MTMask(init=50.0)` is the learner without can run `laws.rules.same_as_without`.

    Source: Lee, Choi 2018, and its released code. Notes and deviations:
    1. At evaluation a mask is drawn just as in training: one graph serves both in the released code.
    2. Norms that adapt get a mask over their channels; in the released code norms do not adapt. To
       leave them out of the inner loop, select so: `adapt=["*", "!*.norm.*"]`.
    3. A tensor of no such form gets a mask over its first dimension (a scalar: one entry), and where
       weight and bias have one shape (a norm over several dimensions), entry by entry.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    >>> rule = mb.MTMask(init=50.0).setup(params, steps=1)
    >>> [(name, tuple(p.shape)) for name, p in rule.named_parameters()]
    [('logit.fc.*', (3,))]
    >>> ones = {name: torch.ones_like(p) for name, p in params.items()}
    >>> updates, state = rule(ones, rule.init(params), mb.StepInfo(0, 1, params))
    >>> updates["fc.bias"].tolist()
    [1.0, 1.0, 1.0]

    Raises `RuleError` for a `temperature` that is not above 0, an `init` that is not finite, a rule
    used before `setup` or set up twice, and a weight and bias that disagree on the units;
    `BlockError` for a transposed convolution among what adapts, whose units are no first dimension.
    """

    negates = False
    straight_through = True

    def __init__(self, *, temperature: Positive = 1.0, init: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.value = init
        self.logit: NamedTensors | None = None
        self._units: dict[str, tuple[int, ...]] = {}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, init={self.value}"

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        self._check_new(self.logit)
        layers: dict[str, Tensors] = {}
        for name, parameter in trainable(params).items():
            layers.setdefault(_key(name), {})[name] = parameter
        self._units = {key: _units(layer) for key, layer in layers.items()}
        logits = {
            key: real_full(list(layers[key].values()), units, self.value)
            for key, units in self._units.items()
        }
        self.logit = NamedTensors(logits, learn=True)
        return self

    def init(self, params: Tensors) -> Tensors:
        """The masks of a new task, `{"conv1.*": [units]}`: the one place where they are drawn."""
        logits = self._ready(self.logit)
        return {key: self._draw(logits[key]) for key in self._units}

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        masked = {}
        for name, update in updates.items():
            if _key(name) not in state:
                raise RuleError(f"MTMask was set up without a mask for {name}")
            mask = state[_key(name)]
            mask = mask.reshape(mask.shape + (1,) * (update.ndim - mask.ndim))
            masked[name] = scaled(mask, update)
        return masked, state

    def _draw(self, logit: Tensor) -> Tensor:
        precise = torch.promote_types(logit.dtype, torch.float32)
        smallest = torch.finfo(precise).eps / 2
        uniform = torch.rand_like(logit, dtype=precise).clamp(smallest, 1 - smallest)
        noisy = logit + uniform.log() - (-uniform).log1p()
        soft = torch.sigmoid(noisy / self.temperature)
        # The difference is exactly 0, and so the mask exactly 0 or 1.
        mask = (noisy > 0).to(soft) + (soft - soft.detach())
        return mask.to(logit.dtype)


def _key(name: str) -> str:
    """The name that shares a mask: weight and bias are `conv1.*`; in an RNN `weight_ih_l0` alike."""
    module, _, own = name.rpartition(".")
    shared = own.replace("weight", "*").replace("bias", "*")
    return f"{module}.{shared}" if module else shared


def _units(layer: Tensors) -> tuple[int, ...]:
    """The shape of a layer's mask: that of its smallest tensor, if it leads all the others'."""
    shapes = {name: tuple(p.shape) for name, p in layer.items()}
    units = min(shapes.values(), key=len) if len(shapes) > 1 else next(iter(shapes.values()))[:1]
    for name, shape in shapes.items():
        if shape[: len(units)] != units:
            shown = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
            raise RuleError(
                f"MTMask: {shown} share a mask, but disagree on the number of output units, the "
                f"first dimension; leave {name} out of the inner loop"
            )
    return units
