"""Cases: whole problems that one line of Python says, for laws that are run on many of them.

A `Case` is a value. Its `repr` names what differs from the smallest case, and is the line of Python
that makes it again: a law that breaks on `Case(norm="batch", steps=2)` breaks on a one-layer net
with batch norm in two inner steps. `laws.strategies.cases` draws them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks.laws.problem import Problem, normal_draws, quadratic, seeded
from metablocks.models.layers import ACTIVATIONS
from metablocks.types import TaskBatch

Kind: TypeAlias = Literal["dense", "conv", "quadratic"]
Smooth: TypeAlias = Literal["tanh", "softplus", "gelu"]
Norm: TypeAlias = Literal["none", "batch", "layer"]
Adapt: TypeAlias = Literal["*", "head.*", "!head.*"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """A net, tasks, and how many inner steps.

    - `kind`: regression `[tasks, 4, 3]` → `[tasks, 4, 2]` by linear layers, or 2-way 2-shot
      classification of images `[tasks, 4, 1, 5, 5]` by convolutions; or `laws.problem.quadratic` of
      size `width`, for closed forms.
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
        told = [f"{name}={value!r}" for name, value, default in fields if value != default]
        return f"Case({', '.join(told)})"

    @property
    def says(self) -> str:
        """The case in words.

        >>> Case(norm="batch", steps=2).says
        'a dense net, one hidden layer of 2, batch norm; 1 task, 2 inner steps, seed 0'
        """
        layers = "one hidden layer" if self.depth == 1 else f"{self.depth} hidden layers"
        net = [f"a {self.kind} net", f"{layers} of {self.width}"]
        net += [f"{self.norm} norm"] if self.norm != "none" else []
        net += ["each layer used twice"] if self.tied else []
        net += ["its first layer frozen"] if self.frozen else []
        net += [f'"{self.adapt}" adapts'] if self.adapt != "*" else []
        if self.kind == "quadratic":
            net = [f"a quadratic loss in {self.width} dimensions"]
        numbers = [
            f"{count} {noun}{'s' * (count != 1)}"
            for count, noun in ((self.tasks, "task"), (self.steps, "inner step"))
        ]
        return f"{', '.join(net)}; {', '.join(numbers)}, seed {self.seed}"

    def problem(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Problem:
        """The case as a problem: the same numbers whenever it is asked for."""
        if self.kind == "quadratic":
            sizes = {"size": self.width, "tasks": self.tasks, "steps": self.steps}
            return quadratic(seed=self.seed, device=device, dtype=dtype, **sizes)
        draw = normal_draws(self.seed, device, dtype)
        images = self.kind == "conv"
        shape = (1, 5, 5) if images else (3,)
        classes = torch.tensor([0, 1, 0, 1], device=device).expand(self.tasks, 4)

        def batch() -> tuple[Tensor, Tensor]:
            inputs = draw(self.tasks, 4, *shape)
            return inputs, classes if images else draw(self.tasks, 4, 2)

        return Problem(
            seeded(lambda: _Net(self), self.seed, device, dtype),
            F.cross_entropy if images else F.mse_loss,
            TaskBatch(support=batch(), query=batch()),
            self.steps,
            self.adapt,
        )


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
