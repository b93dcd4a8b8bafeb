"""Small problems to hold blocks against, and how results are compared.

A law is a plain function: it takes blocks and a problem, and raises `LawError` where the law breaks.
A problem is a model, a loss and tasks; models come from a factory, so that every learner starts from
the same numbers and no law sees what another did. Nets are smooth (no ReLU, no max-pool), as finite
differences need; numbers are float64 unless asked otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.errors import LawError
from metablocks.learner import MetaLearner
from metablocks.models import MLP, Conv4
from metablocks.rules import LearningRate, UpdateRule
from metablocks.types import TaskBatch, Tensors

MakeRule = Callable[[], UpdateRule]


@dataclass(frozen=True)
class Problem:
    """A model factory, a loss `(prediction, target) -> scalar`, tasks, and how many inner steps."""

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    tasks: TaskBatch
    steps: int = 3

    def learner(self, rule: UpdateRule | None = None, **blocks: Any) -> MetaLearner:
        """A learner of a fresh model; blocks not given are MAML's, with the rate 0.1."""
        blocks = {"steps": self.steps, "loss": self.loss, **blocks}
        return MetaLearner(self.model(), rule=rule or LearningRate(0.1), **blocks)

    def with_steps(self, steps: int) -> "Problem":
        """The same problem with another number of inner steps."""
        return replace(self, steps=steps)


def regression(
    *,
    seed: int = 0,
    tasks: int = 3,
    steps: int = 3,
    hidden: tuple[int, ...] = (4, 3),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Regression of random targets `[tasks, 5, 2]` on inputs `[tasks, 5, 3]` by a tanh MLP.

    >>> regression().tasks.support[0].shape
    torch.Size([3, 5, 3])
    """
    draw = _normal(seed, device, dtype)
    batch = TaskBatch(
        support=(draw(tasks, 5, 3), draw(tasks, 5, 2)), query=(draw(tasks, 4, 3), draw(tasks, 4, 2))
    )

    def model() -> nn.Module:
        return MLP(input_shape=(3,), outputs=2, hidden=hidden, activation="tanh")

    return Problem(_seeded(model, seed, device, dtype), F.mse_loss, batch, steps)


def classification(
    *,
    seed: int = 0,
    tasks: int = 3,
    steps: int = 3,
    layers: int = 2,
    filters: int = 3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """3-way 2-shot classification of random 8×8 images by a smooth conv net with batch norm.

    >>> classification().tasks.query[1].shape
    torch.Size([3, 6])
    """
    draw = _normal(seed, device, dtype)
    target = torch.arange(3, device=device).repeat(2).expand(tasks, 6)
    images = (draw(tasks, 6, 1, 8, 8), target), (draw(tasks, 6, 1, 8, 8), target)

    def model() -> nn.Module:
        return Conv4(
            input_shape=(1, 8, 8), outputs=3, filters=filters, layers=layers, activation="softplus"
        )

    return Problem(_seeded(model, seed, device, dtype), F.cross_entropy, TaskBatch(*images), steps)


def quadratic(
    *,
    seed: int = 0,
    tasks: int = 3,
    steps: int = 3,
    size: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """L(θ) = ½ θᵀAθ − bᵀθ, support and query each with its own positive definite A and b.

    The batch is `(A, b)`: inputs `A [tasks, size, size]`, targets `b [tasks, size]`; the model gives
    `(Aθ, θ)`, so that the loss is ½ ⟨θ, Aθ⟩ − ⟨b, θ⟩ and its gradient Aθ − b.

    >>> quadratic(size=2).tasks.support[0].shape
    torch.Size([3, 2, 2])
    """
    draw = _normal(seed, device, dtype)

    def batch() -> tuple[Tensor, Tensor]:
        factor = draw(tasks, size, size)
        return factor @ factor.mT / size, draw(tasks, size)

    def loss(prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        product, theta = prediction
        return theta @ product / 2 - target @ theta

    model = _seeded(lambda: _Quadratic(size), seed, device, dtype)
    return Problem(model, loss, TaskBatch(batch(), batch()), steps)


class _Quadratic(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size))

    def forward(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix @ self.theta, self.theta


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all tensors together; inf where names or numbers fail.

    Together, since a bias in front of a batch norm has a gradient of zero and no scale of its own.

    >>> relative_error({"a": torch.tensor([1.0, 1.1])}, {"a": torch.tensor([1.0, 1.0])}) < 0.08
    True
    """
    if set(got) != set(expected):
        return float("inf")
    with torch.no_grad():
        difference = sum(float((got[k] - expected[k]).double().square().sum()) for k in expected)
        scale = sum(float(expected[k].double().square().sum()) for k in expected)
    error = (difference / scale) ** 0.5 if scale else difference**0.5
    return error if error == error else float("inf")


def hold(
    law: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float
) -> None:
    """Raise `LawError` where two sets of named tensors differ by more than `within`, relatively.

    >>> hold("one is one", {"x": torch.ones(1)}, {"x": torch.ones(1)}, within=0)
    """
    error = relative_error(got, expected)
    if error <= within:
        return
    if set(got) != set(expected):
        raise LawError(f"{law}: the names differ: {sorted(set(got) ^ set(expected))}")
    worst = max(expected, key=lambda k: float((got[k] - expected[k]).abs().max()))
    raise LawError(
        f"{law}: relative error {error:.2e}, at most {within:.0e} allowed; furthest apart is "
        f"{worst}: {_shorten(got[worst])} where {_shorten(expected[worst])} is due"
    )


def tolerance(problem: Problem, *, float64: float, float32: float = 1e-4) -> float:
    """The tolerance that fits the precision of a problem's model."""
    parameter = next(problem.model().parameters())
    return float64 if parameter.dtype == torch.float64 else float32


def parameters(learner: MetaLearner) -> Tensors:
    """Copies of the learner's parameters by name."""
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


def _normal(seed: int, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Normal draws that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def _seeded(
    model: Callable[[], nn.Module], seed: int, device: torch.device | str, dtype: torch.dtype
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model().to(device, dtype)

    return build


def _shorten(tensor: Tensor) -> str:
    return str([float(f"{value:.6g}") for value in tensor.flatten()[:4].tolist()])
