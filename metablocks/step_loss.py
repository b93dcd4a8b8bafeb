"""Step losses: which inner steps' query losses count, and how much.

    L = Σ_k v_k L_q(θ_k),   k = 0 (before adaptation) … steps,   v_k ≥ 0,   Σ_k v_k = 1

The policy returns v as a tensor `[steps + 1]`. A query loss of weight zero is not computed.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from metablocks.checks import Count, checked, name_of, wrong_answer
from metablocks.types import Progress


@runtime_checkable
class StepLoss(Protocol):
    """The weights of the query losses.

    Laws: a function of its arguments alone; float64 `[steps + 1]`, each weight ≥ 0, the sum 1.
    Every built-in block gives entry 0 no weight, but for `steps = 0`, where it is the only one.

    >>> import torch
    >>> import metablocks as mb
    >>> def last_two(steps, progress):                   # a step loss of one's own
    ...     weights = torch.zeros(steps + 1, dtype=torch.float64)
    ...     weights[-2:] = 1.0                           # of one alone without steps
    ...     return weights / weights.sum()
    >>> last_two(3, mb.Progress())
    tensor([0.0000, 0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __call__(self, steps: int, progress: Progress) -> Tensor:
        """Weights `[steps + 1]`: before adaptation, then after each step."""


@checked()
@dataclass(frozen=True)
class FinalStepLoss:
    """MAML: the query loss after the last step alone, of weights `[steps + 1]`.

    Source: Finn, Abbeel, Levine 2017.

    >>> import metablocks as mb
    >>> mb.FinalStepLoss()(3, mb.Progress())
    tensor([0., 0., 0., 1.], dtype=torch.float64)
    """

    def __call__(self, steps: int, progress: Progress) -> Tensor:
        return _weights([0.0] * steps + [1.0])


@checked()
@dataclass(frozen=True, kw_only=True)
class UniformStepLoss:
    """The mean of the query losses after each step, v_k = 1/N; with `initial` also before the first.

        v_k = 1/(N + 1)  for k = 0 … N          with `initial`

    The weights are `[steps + 1]`, that before the first step in front.

    - `initial`: True if the query loss before the first step counts, too.

    Source: Antoniou, Edwards, Storkey 2018 (MSL before any annealing); `initial`: Tandon et al. 2025,
    whose streams are judged by θ_0 too.

    >>> import metablocks as mb
    >>> mb.UniformStepLoss()(4, mb.Progress())
    tensor([0.0000, 0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    >>> mb.UniformStepLoss(initial=True)(3, mb.Progress())
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    initial: bool = False

    def __call__(self, steps: int, progress: Progress) -> Tensor:
        if self.initial or not steps:
            return _weights([1 / (steps + 1)] * (steps + 1))
        return _weights([0.0] + [1 / steps] * steps)


@checked()
@dataclass(frozen=True, kw_only=True)
class AnnealedStepLoss:
    """MSL: uniform at epoch 0, annealed to the last step alone at epoch E = `epochs`.

        v_k = max(1/N − e/(N·E), 0.03/N)  for k < N,    v_N = 1 − Σ_{k<N} v_k

    with e the whole epoch; from e = E on the last step alone. The annealing is per epoch: a
    fractional `Progress.epoch` counts as the epoch it lies in. The weights are `[steps + 1]`, that
    before the first step, 0, in front.

    - `epochs`: the epoch E from which the last step alone counts.

    Source: Antoniou, Edwards, Storkey 2018, and its reference code (the floor 0.03/N).

    >>> import metablocks as mb
    >>> mb.AnnealedStepLoss(epochs=10)(2, mb.Progress(epoch=5))
    tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)

    Raises `BlockError` unless `epochs` is at least 1.
    """

    epochs: Count

    def __call__(self, steps: int, progress: Progress) -> Tensor:
        epoch = math.floor(progress.epoch)
        if steps < 2 or epoch >= self.epochs:
            return FinalStepLoss()(steps, progress)
        early = max(1 / steps - epoch / (steps * self.epochs), 0.03 / steps)
        return _weights([0.0] + [early] * (steps - 1) + [1 - (steps - 1) * early])


def step_weights(block: StepLoss, steps: int, progress: Progress) -> tuple[float, ...]:
    """The weights that a step loss gives, as numbers.

    >>> step_weights(UniformStepLoss(), 2, Progress())
    (0.0, 0.5, 0.5)

    Raises `BlockError` if there are not `steps` + 1 of them, ≥ 0, with the sum 1.
    """
    weights = block(steps, progress)
    takes = (
        f"weights [steps + 1] = [{steps + 1}], a tensor of floats; they must be ≥ 0 and sum to 1"
    )
    fits = isinstance(weights, Tensor) and weights.is_floating_point()
    if not fits or weights.shape != (steps + 1,):
        raise wrong_answer("step_loss", name_of(block), weights, takes)
    values = tuple(weights.tolist())
    if not all(value >= 0 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise wrong_answer("step_loss", name_of(block), list(values), takes)
    return values


def _weights(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
