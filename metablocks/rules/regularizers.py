"""Rules that bound a gradient, or pull the fast weights towards zero or back to where they started.

All give what is still a gradient; a learning rate behind them negates it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from metablocks.checks import NonNegative, Positive, checked
from metablocks.errors import RuleError
from metablocks.rules.base import StepInfo, UpdateRule, inner_product, scaled
from metablocks.rules.learned import LearnedRule, Number, like, positive
from metablocks.types import Tensors


@checked(RuleError)
class ClipNorm(UpdateRule):
    """Scale the gradient down to a norm: g · min(1, max_norm / ‖g‖), ‖g‖² = Σ |g|² over all that adapts.

    The norm is of one task's gradient at one inner step. What is shorter than `max_norm` goes
    through unchanged, bit for bit; the derivative is finite everywhere, at zero gradients too.

    - `max_norm`: the longest gradient that goes through unchanged.

    Law: a `max_norm` that no gradient reaches is the identity.

    Source: Pascanu, Mikolov, Bengio 2013 (torch.nn.utils.clip_grad_norm_, but for the 1e-6 that it
    adds to the norm).

    >>> import torch
    >>> import metablocks as mb
    >>> rule = mb.ClipNorm(1.0)
    >>> updates, _ = rule({"w": torch.tensor([3.0, 4.0])}, (), mb.StepInfo(0, 1, {}))
    >>> updates["w"]
    tensor([0.6000, 0.8000])

    Raises `RuleError` for a `max_norm` that is not above 0.
    """

    negates = False

    def __init__(self, max_norm: Positive) -> None:
        super().__init__()
        self.max_norm = max_norm

    def extra_repr(self) -> str:
        return f"{self.max_norm}"

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        scale = self._scale(updates)
        return {name: scaled(scale, g) for name, g in updates.items()}, state

    def _scale(self, updates: Tensors) -> Tensor:
        square = inner_product(updates, updates)
        longer = square > self.max_norm**2
        # The root is taken of what is not zero only, so that no branch has a nan for a derivative.
        norm = torch.where(longer, square, torch.ones_like(square)).sqrt()
        return torch.where(longer, self.max_norm / norm, torch.ones_like(square))


@checked(RuleError)
class WeightDecay(LearnedRule):
    """Add the gradient of an L2 penalty on the fast weights: g + decay · θ_k.

    With a learning rate behind it, the inner loss is L_s(θ) + (decay / 2) ‖θ‖². Behind `Adam` it is
    AdamW's decoupled decay: `Chain(Adam(), WeightDecay(0.01), LearningRate(0.001))`.

    - `decay`: the factor of the penalty, 0 or more.
    - `learn`: True if the decay is a meta-parameter, stored as its logarithm.

    Law: `Chain(WeightDecay(d), LearningRate(α))` takes the steps of `torch.optim.SGD(lr=α,
    weight_decay=d)`; `WeightDecay(0.0)` is the identity.

    Source: Krogh, Hertz 1991 (torch.optim.SGD).

    >>> import torch
    >>> import metablocks as mb
    >>> rule = mb.WeightDecay(0.1)
    >>> where = mb.StepInfo(0, 1, {"w": torch.tensor([5.0])})
    >>> rule({"w": torch.tensor([1.0])}, (), where)[0]["w"]
    tensor([1.5000])

    Raises `RuleError` for a negative `decay`, and for 0 with `learn`.
    """

    negates = False
    store = staticmethod(math.log)
    decay: Number

    def __init__(self, decay: NonNegative, *, learn: bool = False) -> None:
        super().__init__(learn, decay=decay)

    def extra_repr(self) -> str:
        return f"{self._shown('decay')}{self._learns}"

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        decay = positive(self.decay)
        made = {name: g + like(g, decay) * step.params[name] for name, g in updates.items()}
        return made, state


@checked(RuleError)
class Proximal(UpdateRule):
    """Pull the fast weights back to where the task started: g + λ (θ_k − θ_0), λ being `strength`.

    First in a chain, with a learning rate behind it, it makes the inner loss
    L_s(θ) + (λ/2) ‖θ − θ_0‖², which is what iMAML minimises (see `Implicit`); any estimator may use
    it. The meta-gradient looks through θ_0 too.

    - `strength`: λ, 0 or more.

    Law: the first update is that without; `Proximal(0.0)` is the identity.

    Source: Rajeswaran, Finn, Kakade, Levine 2019.

    >>> import torch
    >>> import metablocks as mb
    >>> rule = mb.Proximal(2.0)
    >>> state = rule.init({"w": torch.tensor([1.0])})
    >>> where = mb.StepInfo(1, 2, {"w": torch.tensor([4.0])})
    >>> rule({"w": torch.tensor([0.5])}, state, where)[0]["w"]
    tensor([6.5000])

    Raises `RuleError` for a negative `strength`.
    """

    negates = False

    def __init__(self, strength: NonNegative) -> None:
        super().__init__()
        self.strength = strength

    def extra_repr(self) -> str:
        return f"{self.strength}"

    def init(self, params: Tensors) -> Tensors:
        """θ_0 of a new task."""
        return dict(params)

    def forward(self, updates: Tensors, state: Tensors, step: StepInfo) -> tuple[Tensors, Tensors]:
        pulled = {
            name: g + self.strength * (step.params[name] - state[name])
            for name, g in updates.items()
        }
        return pulled, state
