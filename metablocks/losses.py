"""Losses that inner steps may descend, as recipes name them: fixed ones, and two that are learned.

Each takes predictions `[examples, ..., outputs]` and targets: numbers of the same shape, or the indices
of classes `[examples, ...]`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError
from metablocks.models.layers import Activation
from metablocks.models.mlp import MLP
from metablocks.tasks.base import Kind


@checked()
def cross_entropy(*, kind: Kind = "classification") -> Callable[[Tensor, Tensor], Tensor]:
    """The mean cross-entropy of classes.

    >>> cross_entropy()(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor(0.6931)

    Raises `BlockError` for tasks of regression.
    """
    if kind == "regression":
        raise BlockError("cross_entropy takes classes for targets; tasks of regression need mse")
    return _cross_entropy


@checked()
def mse(*, kind: Kind = "regression") -> Callable[[Tensor, Tensor], Tensor]:
    """The mean squared error.

    >>> mse()(torch.zeros(3, 2), torch.ones(3, 2))
    tensor(1.)

    Raises `BlockError` for tasks whose targets are classes.
    """
    if kind != "regression":
        raise BlockError(f"mse takes numbers for targets; tasks of {kind} need cross_entropy")
    return F.mse_loss


@checked()
class LearnedLoss(nn.Module):
    """A loss that is a small net M over the prediction and the target of each example.

        L = 1/n Σ_i softplus M(ŷ_i, y_i)

    M is an MLP; the class of a target enters as its indicator vector. It begins
    as drawn, and knows nothing of the task until the outer loop has taught it.

    - `hidden`: widths of its hidden layers.
    - `activation`: what stands between its layers.

    Source: Bechtle, Molchanov, Chebotar, Grefenstette, Righetti, Sukhatme, Meier 2021 (ML³): two hidden
    layers of 40, softplus at the end; their code for sinusoids has two of 50, and no biases. Deviation:
    1. The model's initialisation is learned along with the loss. With `adapt` and frozen parameters as
       a recipe has them, either can be left out.

    >>> import torch
    >>> import metablocks as mb
    >>> loss = mb.LearnedLoss(outputs=2, hidden=(4,))
    >>> loss(torch.zeros(3, 2), torch.tensor([0, 1, 1])).shape
    torch.Size([])

    Raises `BlockError` for a width below 1.
    """

    def __init__(
        self,
        *,
        outputs: Count,
        hidden: tuple[Count, ...] = (40, 40),
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.net = MLP(
            input_shape=(2 * outputs,),
            outputs=1,
            hidden=hidden,
            activation=activation,
            init="fan_in",
        )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions `[examples, ..., outputs]`."""
        if not target.is_floating_point():
            classes = torch.arange(self.outputs, device=target.device)
            target = (target.unsqueeze(-1) == classes).to(prediction.dtype)
        pairs = [part.reshape(-1, self.outputs) for part in (prediction, target)]
        return F.softplus(self.net(torch.cat(pairs, 1))).mean()


@checked()
class WeightedLoss(nn.Module):
    """The loss of each example by a learned weight, which a small net V makes of that loss.

        L = 1/n Σ_i V(ℓ_i) ℓ_i        and in the inner step        ∇L = 1/n Σ_i V(ℓ_i) ∇ℓ_i

    ℓ_i is the cross-entropy of an example whose target is a class, and else its squared error. V has one
    hidden layer, and ends in a sigmoid. The inner step holds the weights constant; the meta-gradient
    looks through all of that step, V(ℓ_i) as a function of the fast weights included.

    - `hidden`: width of its hidden layer.
    - `activation`: what stands between its layers.

    Source: Shu, Xie, Yi, Zhao, Zhou, Xu, Meng 2019 (Meta-Weight-Net): 1–100–1, ReLU. As in their code,
    the ℓ_i that V is given is detached and the sum divided by the number of examples; their code for
    wide nets divides by the sum of the weights instead. Deviation:
    1. They look through one step, from fast weights that depend on no meta-parameter; here there are
       several, so that the weights of a step also depend on the steps before, and are not detached there.

    >>> import torch
    >>> import metablocks as mb
    >>> mb.WeightedLoss()(torch.zeros(3, 2), torch.tensor([0, 1, 1])).shape
    torch.Size([])

    Raises `BlockError` for a width below 1.
    """

    def __init__(self, *, hidden: Count = 100, activation: Activation = "relu") -> None:
        super().__init__()
        self.net = MLP(
            input_shape=(1,), outputs=1, hidden=(hidden,), activation=activation, init="fan_in"
        )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions `[examples, ..., outputs]`."""
        losses = example_losses(prediction, target)
        held = losses.detach()
        # From `held` to `losses` the integral of V, by the trapezoidal rule: nothing long, its first
        # derivative V(ℓ), its second V′(ℓ).
        weights = self.weights(held)
        moved = (self.weights(losses) + weights) / 2 * (losses - held)
        mean: Tensor = (weights * held + moved).mean()
        return mean

    def weights(self, losses: Tensor) -> Tensor:
        """V of losses `[examples]`, each between 0 and 1."""
        weights: Tensor = self.net(losses.unsqueeze(1)).squeeze(1).sigmoid()
        return weights


def example_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of each example `[examples]`: the mean over what an example consists of.

    >>> example_losses(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor([0.6931, 0.6931, 0.6931])
    """
    if target.is_floating_point():
        losses = (prediction - target).square()
    else:
        losses = F.cross_entropy(prediction.movedim(-1, 1), target, reduction="none")
    each: Tensor = losses.reshape(len(prediction), -1).mean(1)
    return each


LOSSES: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "learned_loss": LearnedLoss,
    "weighted": WeightedLoss,
}
"""The blocks of the slot `support_loss` of recipes."""


def _cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.movedim(-1, 1), target)
