"""Small problems that laws are run on: a net, a loss, tasks, and how many inner steps.

A `Case` is a value. Its `repr` names what differs from the smallest case, and is the line of Python
that makes it again: a law that fails on `Case(norm="batch", steps=2)` fails on a one-layer net with
batch norm in two inner steps. `laws.strategies.cases` draws them; `Case.problem` builds the `Problem`
that laws take. Nets are smooth (no ReLU, no max-pool), as finite differences need; numbers are
float64 unless asked otherwise, or the device has none.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.devices import has_float64
from metablocks.generators import kept_draws
from metablocks.learner import MetaLearner
from metablocks.models.layers import ACTIVATIONS
from metablocks.rules import LearningRate, UpdateRule
from metablocks.selection import select_parameters
from metablocks.types import TaskBatch, Tensors

Kind: TypeAlias = Literal["dense", "conv", "quadratic"]
Smooth: TypeAlias = Literal["tanh", "softplus", "gelu"]
Norm: TypeAlias = Literal["none", "batch", "layer"]
Adapt: TypeAlias = Literal["*", "head.*", "!head.*"]
MakeRule: TypeAlias = Callable[[], UpdateRule]


@dataclass(frozen=True)
class Problem:
    """A model factory, a loss `(prediction, target) -> scalar`, tasks, inner steps, what adapts.

    The factory gives the same numbers at every call, so that every learner starts from them and no
    law sees the effects of another.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    tasks: TaskBatch
    steps: int = 3
    adapt: str | Sequence[str] = "*"

    def learner(self, rule: UpdateRule | MakeRule | None = None, **blocks: Any) -> MetaLearner:
        """A learner of a fresh model; blocks not given are MAML's, with the rate 0.1.

        `rule` is a rule that is not set up yet, or a function that makes one.
        """
        if rule is None:
            rule = LearningRate(0.1)
        elif not isinstance(rule, UpdateRule):
            rule = rule()
        blocks = {"steps": self.steps, "loss": self.loss, "adapt": self.adapt, **blocks}
        return MetaLearner(self.model(), rule=rule, **blocks)

    def with_steps(self, steps: int) -> "Problem":
        """The same problem with another number of inner steps."""
        return replace(self, steps=steps)

    def adapted_parameters(self) -> Tensors:
        """The parameters that adapt inside a task, as plain tensors by name."""
        model = self.model()
        params = dict(model.named_parameters())
        return {name: params[name].detach() for name in select_parameters(self.adapt, model)}


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """A net, tasks, and how many inner steps.

    - `kind`: regression `[tasks, 4, 3]` → `[tasks, 4, 2]` by linear layers; or 2-way 2-shot
      classification of images `[tasks, 4, 1, 5, 5]` by convolutions; or a quadratic loss
      ½ θᵀAθ − bᵀθ in `width` dimensions, for closed forms: the support and query sets of each task are
      `(A, b)` of their own, with A `[tasks, width, width]` positive definite and b `[tasks, width]`.
    - `depth` hidden layers of `width` units, each followed by a `norm` and a smooth `activation`; a
      linear `head`. With `tied`, every hidden layer is used twice, under two names; with `frozen`,
      the first layer does not learn.
    - `adapt`: what moves inside a task; `steps` inner steps on each of `tasks` tasks.
    - `seed`: of the parameters and the tasks.

    >>> Case(norm="batch", steps=2)
    Case(norm='batch', steps=2)
    >>> Case(kind="conv").problem().tasks.query[0].shape
    torch.Size([1, 4, 1, 5, 5])
    >>> list(Case().problem().model().state_dict())[:3]
    ['inputs.weight', 'inputs.bias', 'body.0.layer.weight']
    """

    kind: Kind = "dense"
    depth: int = 1
    width: int = 2
    activation: Smooth = "tanh"
    norm: Norm = "none"
    tied: bool = False
    frozen: bool = False
    adapt: Adapt = "*"
    tasks: int = 1
    steps: int = 1
    seed: int = 0

    def __repr__(self) -> str:
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        parts = [f"{name}={value!r}" for name, value, default in fields if value != default]
        return f"Case({', '.join(parts)})"

    def problem(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Problem:
        """The case as a problem: the same numbers at every call, on every device.

        In float64 unless given, or in float32 on a device without float64.
        """
        if dtype is None:
            dtype = torch.float64 if has_float64(device) else torch.float32
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            shape = (self.tasks, *shape)
            noise = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
            return noise.to(device, dtype)

        def batch() -> tuple[Tensor, Tensor]:
            if self.kind == "quadratic":
                factor = draw(self.width, self.width)
                return factor @ factor.mT / self.width, draw(self.width)
            if self.kind == "dense":
                return draw(4, 3), draw(4, 2)
            return draw(4, 1, 5, 5), torch.tensor([0, 1] * 2, device=device).expand(self.tasks, 4)

        def model() -> nn.Module:
            with kept_draws():
                torch.manual_seed(self.seed)
                net = _Quadratic(self.width) if self.kind == "quadratic" else _Net(self)
                return net.to(device, dtype)

        tasks = TaskBatch(support=batch(), query=batch())
        return Problem(model, _LOSSES[self.kind], tasks, self.steps, self.adapt)


class _Quadratic(nn.Module):
    """θ, and its product with the matrix that is the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size))

    def forward(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix @ self.theta, self.theta


def _quadratic_loss(prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    product, theta = prediction
    return theta @ product / 2 - target @ theta


class _Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        layer = _LAYERS[case.kind]
        self.inputs = layer(1 if case.kind == "conv" else 3, case.width)
        self.body = nn.Sequential()
        for _ in range(case.depth):
            block = nn.Sequential()
            block.add_module("layer", layer(case.width, case.width))
            if case.norm != "none":
                block.add_module("norm", _NORMS[case.kind, case.norm](case.width))
            block.add_module("activation", ACTIVATIONS[case.activation]())
            for _ in range(2 if case.tied else 1):
                self.body.add_module(str(len(self.body)), block)
        self.head = nn.Linear(case.width, 2)
        self.inputs.requires_grad_(not case.frozen)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(self.inputs(inputs))
        if features.ndim == 4:
            features = features.mean((2, 3))
        output: Tensor = self.head(features)
        return output


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)


_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {"dense": nn.Linear, "conv": _convolution}
_NORMS: dict[tuple[str, str], Callable[[int], nn.Module]] = {
    ("dense", "batch"): nn.BatchNorm1d,
    ("dense", "layer"): nn.LayerNorm,
    ("conv", "batch"): nn.BatchNorm2d,
    ("conv", "layer"): lambda width: nn.GroupNorm(1, width),
}
_LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "dense": F.mse_loss,
    "conv": F.cross_entropy,
    "quadratic": _quadratic_loss,
}
