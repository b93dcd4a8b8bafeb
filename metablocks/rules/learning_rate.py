"""Inner learning rates, from one fixed scalar to a learned one per parameter and step.

    u = −α ∘ g                                              (ALGORITHMS: MAML, LSLR, Meta-SGD)

One class with two axes, how finely the rate is shared and whether each inner step has its own, and
a switch, whether the outer loop learns it. Rates begin as one number, as one for each step, or as one
for each group of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from metablocks.checks import CountFrom0, checked
from metablocks.errors import BlockError, RuleError, SelectionError
from metablocks.functional import trainable
from metablocks.per_step import Beyond, row, take_row
from metablocks.rules.base import NamedTensors, StepInfo, UpdateRule, real_full, scaled
from metablocks.selection import select
from metablocks.types import Tensors

Granularity: TypeAlias = Literal["scalar", "layer", "tensor", "parameter"]
Rates: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""One rate; one for each inner step; or one for each group of parameters, `{pattern: rate}`."""


@checked(RuleError)
class LearningRate(UpdateRule):
    """Scale a gradient by a negative rate: u = −α ∘ g.

    Rates have shape `[]`, or `[*parameter.shape]` for `"parameter"`, behind a `[steps]` dimension
    when `per_step`; on the parameters' device. They are real, those of complex parameters too, in
    the precision of what they serve, the highest one if it is mixed; updates have the dtypes of the
    gradients. They are named after what they serve: `rate.conv1.weight` (tensor, parameter),
    `rate.conv1.*` (layer), `rate.*` (scalar), `rate.0`, `rate.1`, … (the scalars of groups, by the
    position of their pattern).

    - `init`: the rate, or the rates that learning begins with. A list has one for each inner step,
      as many as the learner takes (`per_step` then). A mapping `{pattern: rate}` has groups of
      parameters, whose patterns are read as those of `adapt`: the first that fits a name counts,
      and a name that none fits is refused. A "scalar" then is one rate for each group.
    - `granularity`: what shares a rate: "scalar" everything, "layer" the parameters of one module,
      "tensor" the entries of one parameter tensor, "parameter" nothing.
    - `per_step`: True if every inner step has a rate of its own.
    - `learn`: True if the rates are meta-parameters, unconstrained in sign; otherwise they are
      buffers.
    - `beyond`: at steps past those set up: "error" refuses, "last" uses the last step's rate.

    Law: filled with one value, every granularity × per-step × list or groups gives the scalar's
    trajectory, and the gradients of the rates sum to the gradient of the scalar.

    Source: Finn, Abbeel, Levine 2017 (scalar); Antoniou, Edwards, Storkey 2018 (tensor × per step);
    Li et al. 2017 (parameter).

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.zeros(2)}
    >>> rule = mb.LearningRate(0.1).setup(params, steps=1)
    >>> rule({"w": torch.ones(2)}, (), mb.StepInfo(0, 1, params))[0]["w"]
    tensor([-0.1000, -0.1000])
    >>> params = {"body.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    >>> rule = mb.LearningRate({"head.*": 0.5, "*": 0.1}).setup(params, steps=2)
    >>> rule.rate["0"], rule.rate["1"]
    (tensor(0.5000), tensor(0.1000))

    Raises `RuleError` for a field out of range, a rule used before `setup` or set up twice, and a step
    past those set up; `BlockError` for what does not fit the learner: a list of another length than
    its steps, a pattern without a parameter, a parameter without a pattern, and parameters of one rate
    in groups of several.
    """

    negates = True

    def __init__(
        self,
        init: Rates,
        *,
        granularity: Granularity = "scalar",
        per_step: bool = False,
        learn: bool = False,
        beyond: Beyond = "error",
    ) -> None:
        super().__init__()
        self.value: float | list[float] | dict[str, float] = _plain(init)
        self.granularity = granularity
        self.per_step = per_step or isinstance(self.value, list)
        self.learn = learn
        self.beyond: Beyond = beyond
        self.steps = 0
        self.rate: NamedTensors | None = None
        self._groups: dict[str, int] | None = None

    @property
    def values(self) -> list[float]:
        """All rates that it begins with."""
        if isinstance(self.value, dict):
            return list(self.value.values())
        return self.value if isinstance(self.value, list) else [self.value]

    def extra_repr(self) -> str:
        beyond = f", beyond={self.beyond!r}" if self.per_step else ""
        return (
            f"{self.value}, granularity={self.granularity!r}, "
            f"per_step={self.per_step}, learn={self.learn}" + beyond
        )

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        self._check_new(self.rate)
        if isinstance(self.value, list) and len(self.value) != steps:
            raise _refusal(
                f"has {len(self.value)} rates, and the inner loop {steps} steps; give one for each"
            )
        served: dict[str, list[str]] = {}
        learned = trainable(params)
        if isinstance(self.value, dict):
            self._groups = _grouped(self.value, list(learned))
        for name in learned:
            served.setdefault(self._key(name), []).append(name)
        rates = {
            key: self._begin([learned[name] for name in names], self._values_of(key, names, steps))
            for key, names in served.items()
        }
        self.rate = NamedTensors(rates, learn=self.learn)
        self.steps = steps
        self.max_steps = steps if self.per_step and self.beyond == "error" else None
        return self

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        factors: Tensors = {}
        made: Tensors = {}
        for name, gradient in updates.items():
            key = self._key(name)
            if key not in factors:
                factors[key] = -self._at(key, step.at)
            made[name] = scaled(factors[key], gradient)
        return made, state

    def _values_of(self, key: str, names: list[str], steps: int) -> list[float]:
        """The numbers that the rate of these names begins with, one for each row."""
        if isinstance(self.value, list):
            return self.value
        groups = self._groups or {}
        values = {self.values[groups.get(name, 0)] for name in names}
        if len(values) > 1:
            raise _refusal(
                f"gives {', '.join(names)} {len(values)} rates, but they share one ({key}); take "
                'granularity="tensor"'
            )
        return [*values] * (steps if self.per_step else 1)

    def _begin(self, served: list[Tensor], values: list[float]) -> Tensor:
        """The rate of parameters at first."""
        shape = tuple(served[0].shape) if self.granularity == "parameter" else ()
        if not self.per_step:
            return real_full(served, shape, values[0])
        rows = [real_full(served, shape, value) for value in values]
        return torch.stack(rows) if rows else real_full(served, (0, *shape), 0.0)

    def _at(self, key: str, index: int | Tensor) -> Tensor:
        rates = self._ready(self.rate)
        try:
            rate = rates[key]
        except RuleError as error:
            raise RuleError(
                f"LearningRate was set up without a rate for {key}; if it was unfrozen since, make a new "
                "rule and learner"
            ) from error
        if not self.per_step:
            return rate
        return take_row(rate, row("LearningRate", index, self.steps, self.beyond, RuleError))

    def _key(self, name: str) -> str:
        if self.granularity == "scalar":
            return "*" if self._groups is None else str(self._groups.get(name, name))
        if self.granularity == "layer":
            layer = name.rpartition(".")[0]
            return f"{layer}.*" if layer else "*"
        return name


def _plain(init: Rates) -> float | list[float] | dict[str, float]:
    if isinstance(init, Mapping):
        return {pattern: float(rate) for pattern, rate in init.items()}
    return [float(rate) for rate in init] if isinstance(init, Sequence) else init


def _grouped(rates: dict[str, float], names: list[str]) -> dict[str, int]:
    """The position of the first pattern that fits, by name."""
    groups: dict[str, int] = {}
    for position, pattern in enumerate(rates):
        try:
            groups = dict.fromkeys(select(pattern, names), position) | groups
        except SelectionError as error:
            raise _refusal(f"does not fit: {error}") from None
    rest = [name for name in names if name not in groups]
    if rest:
        raise _refusal(f'has no pattern that fits {rest[0]}; add one for it, or for the rest, "*"')
    return groups


def _refusal(message: str) -> BlockError:
    return BlockError(f"LearningRate init {message}", block="LearningRate", field="init")


@checked(RuleError)
def meta_sgd(init: Rates) -> LearningRate:
    """Meta-SGD: one learned rate for every single parameter, θ' = θ − α ∘ g.

    - `init`: the rate that learning begins with (see `LearningRate`).

    Source: Li, Zhou, Chen, Li 2017.

    >>> import metablocks as mb
    >>> mb.meta_sgd(0.01)
    LearningRate(0.01, granularity='parameter', per_step=False, learn=True)
    """
    return LearningRate(init, granularity="parameter", learn=True)


@checked(RuleError)
def lslr(init: Rates, *, beyond: Beyond = "error") -> LearningRate:
    """LSLR: one learned rate for every parameter tensor and inner step.

    - `init`: the rate that learning begins with (see `LearningRate`).
    - `beyond`: at steps past those set up: "error" refuses, "last" uses the last step's rates.

    Source: Antoniou, Edwards, Storkey 2018 (per-layer per-step learning rates, where the reference
    code's "layer" is one parameter tensor).

    >>> import metablocks as mb
    >>> mb.lslr(0.1)
    LearningRate(0.1, granularity='tensor', per_step=True, learn=True, beyond='error')
    """
    return LearningRate(init, granularity="tensor", per_step=True, learn=True, beyond=beyond)
