"""Small problems to hold blocks against, and how results are compared.

A law is a plain function: it takes blocks and a problem, and raises `LawError` where the law breaks.
A problem is a model, a loss and tasks; models come from a factory, so that every learner starts from
the same numbers and no law sees what another did. Nets are smooth (no ReLU, no max-pool), as finite
differences need; numbers are float64 unless asked otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.errors import LawError
from metablocks.learner import MetaLearner
from metablocks.models import MLP, Conv4
from metablocks.rules import LearningRate, UpdateRule
from metablocks.rules.base import NamedTensors
from metablocks.selection import select_parameters
from metablocks.types import TaskBatch, Tensors

MakeRule = Callable[[], UpdateRule]


@dataclass(frozen=True)
class Problem:
    """A model factory, a loss `(prediction, target) -> scalar`, tasks, inner steps, what adapts."""

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    tasks: TaskBatch
    steps: int = 3
    adapt: str | Sequence[str] = "*"

    def learner(self, rule: UpdateRule | None = None, **blocks: Any) -> MetaLearner:
        """A learner of a fresh model; blocks not given are MAML's, with the rate 0.1."""
        blocks = {"steps": self.steps, "loss": self.loss, "adapt": self.adapt, **blocks}
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
    draw = normal_draws(seed, device, dtype)
    batch = TaskBatch(
        support=(draw(tasks, 5, 3), draw(tasks, 5, 2)), query=(draw(tasks, 4, 3), draw(tasks, 4, 2))
    )

    def model() -> nn.Module:
        return MLP(input_shape=(3,), outputs=2, hidden=hidden, activation="tanh")

    return Problem(seeded(model, seed, device, dtype), F.mse_loss, batch, steps)


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
    draw = normal_draws(seed, device, dtype)
    target = torch.arange(3, device=device).repeat(2).expand(tasks, 6)
    images = (draw(tasks, 6, 1, 8, 8), target), (draw(tasks, 6, 1, 8, 8), target)

    def model() -> nn.Module:
        return Conv4(
            input_shape=(1, 8, 8), outputs=3, filters=filters, layers=layers, activation="softplus"
        )

    return Problem(seeded(model, seed, device, dtype), F.cross_entropy, TaskBatch(*images), steps)


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
    draw = normal_draws(seed, device, dtype)

    def batch() -> tuple[Tensor, Tensor]:
        factor = draw(tasks, size, size)
        return factor @ factor.mT / size, draw(tasks, size)

    def loss(prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        product, theta = prediction
        return theta @ product / 2 - target @ theta

    model = seeded(lambda: _Quadratic(size), seed, device, dtype)
    return Problem(model, loss, TaskBatch(batch(), batch()), steps)


def shapes(
    *,
    seed: int = 0,
    tasks: int = 1,
    steps: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A model with a parameter of every number of dimensions, from a scalar to a 3D convolution.

    >>> [list(p.shape) for p in shapes().model().parameters()][:3]
    [[], [4], [2, 3]]
    """
    draw = normal_draws(seed, device, dtype)
    rows = len(SHAPES)
    batch = TaskBatch(
        support=(draw(tasks, 5, 1), draw(tasks, 5, rows)),
        query=(draw(tasks, 4, 1), draw(tasks, 4, rows)),
    )
    return Problem(seeded(_EveryShape, seed, device, dtype), F.mse_loss, batch, steps)


SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "norm.bias": (4,),
    "head.weight": (2, 3),
    "conv1.weight": (2, 3, 5),
    "conv2.weight": (2, 3, 2, 2),
    "conv3.weight": (2, 3, 1, 2, 2),
}
"""The parameters of the model of `shapes`."""


class _EveryShape(NamedTensors):
    def __init__(self) -> None:
        super().__init__({name: torch.randn(s) for name, s in SHAPES.items()}, learn=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([(p.flatten() * inputs).tanh().mean(1) for p in self.parameters()], 1)


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


@torch.no_grad()
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
    """The tolerance that fits the precision of a problem's model.

    Rounding errors add up over some hundred operations and are then divided by what is left of the
    sums that cancel: a thousand times the precision, 1.2e-7 in float32, is what laws need there.
    """
    parameter = next(problem.model().parameters())
    return float64 if parameter.dtype == torch.float64 else float32


def perturb(learner: MetaLearner, part: str = "rule.", scale: float = 0.2) -> MetaLearner:
    """The same learner, its parameters with `part` in their names moved by fixed noise, in place.

    A learned transform that starts as the identity hides what is wrong with it; a law that is to
    see it moves it away first.
    """
    generator = torch.Generator().manual_seed(1)
    for name, parameter in learner.named_parameters():
        if part in name and parameter.requires_grad:
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            parameter.data.add_(scale * noise.to(parameter))
    return learner


def adapted_parameters(problem: Problem) -> Tensors:
    """What moves inside a task of the problem, as plain tensors by name."""
    model = problem.model()
    own = dict(model.named_parameters())
    return {name: own[name].detach() for name in select_parameters(problem.adapt, model)}


def gradients_like(params: Tensors, seed: int = 0) -> Tensors:
    """Normal draws of the names and shapes of some parameters."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=draw, dtype=torch.float64, device="cpu").to(p)
        for name, p in params.items()
    }


@contextmanager
def fixed_draws() -> Iterator[None]:
    """The same random draws for all who come in; the caller's go on as if nothing had been."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parameters(learner: MetaLearner) -> Tensors:
    """Copies of the learner's parameters by name."""
    return {name: p.detach().clone() for name, p in learner.named_parameters()}


def normal_draws(
    seed: int, device: torch.device | str, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """Normal draws `draw(*shape)` that are the same on every device, and rounded in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(
            device, dtype
        )

    return draw


def seeded(
    model: Callable[[], nn.Module], seed: int, device: torch.device | str, dtype: torch.dtype
) -> Callable[[], nn.Module]:
    """A model factory whose models all start from the same numbers; draws nothing of the caller's."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model().to(device, dtype)

    return build


def named(block: object) -> str:
    """A block as messages name it: its `repr`, but a function's name.

    >>> named(hold), named(LearningRate)
    ('hold', 'LearningRate')
    """
    return getattr(block, "__name__", None) or repr(block)


def _shorten(tensor: Tensor) -> str:
    return str([float(f"{value:.6g}") for value in tensor.flatten()[:4].tolist()])
