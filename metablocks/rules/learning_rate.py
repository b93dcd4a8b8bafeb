"""Inner learning rates, from one fixed scalar to a learned one per parameter and step.

    u = −α ∘ g                                              (ALGORITHMS: MAML, LSLR, Meta-SGD)

One class with two axes, how finely the rate is shared and whether each inner step has its own, and
a switch, whether the outer loop learns it.
"""

from typing import Any, Literal, Self, TypeAlias

from torch import Tensor

from metablocks.checks import CountFrom0, checked
from metablocks.errors import RuleError
from metablocks.functional import trainable
from metablocks.per_step import Beyond, limit, row, take_row
from metablocks.rules.base import NamedTensors, StepInfo, UpdateRule, real_full, scaled
from metablocks.types import Tensors

Granularity: TypeAlias = Literal["scalar", "layer", "tensor", "parameter"]


@checked(RuleError)
class LearningRate(UpdateRule):
    """Scale a gradient by a negative rate: u = −α ∘ g.

    `granularity` says what shares a rate: `"scalar"` everything, `"layer"` the parameters of one
    module, `"tensor"` the entries of one parameter tensor, `"parameter"` nothing. With `per_step`
    every inner step has a rate of its own; at steps past those set up, `beyond` refuses (`"error"`)
    or uses the last step's rate (`"last"`). With `learn` the rates are meta-parameters, unconstrained
    in sign; otherwise they are buffers.

    Rates have shape `[]`, or `[*parameter.shape]` for `"parameter"`, behind a `[steps]` dimension
    when `per_step`; on the parameters' device. They are real, those of complex parameters too, in
    the precision of what they serve, the highest one if it is mixed; updates have the dtypes of the
    gradients. They are named after what they serve: `rate.conv1.weight` (tensor, parameter),
    `rate.conv1.*` (layer), `rate.*` (scalar).

    Law: filled with one value, every granularity × per-step gives the scalar's trajectory, and the
    gradients of the rates sum to the gradient of the scalar.

    Source: Finn, Abbeel, Levine 2017 (scalar); Antoniou, Edwards, Storkey 2018 (tensor × per step);
    Li et al. 2017 (parameter).

    >>> import torch
    >>> params = {"w": torch.zeros(2)}
    >>> rule = LearningRate(0.1).setup(params, steps=1)
    >>> rule({"w": torch.ones(2)}, (), StepInfo(0, 1, params))[0]["w"]
    tensor([-0.1000, -0.1000])

    Raises `RuleError` for a field out of range, a rule used before `setup` or set up twice, and a step
    past those set up.
    """

    negates = True

    def __init__(
        self,
        init: float,
        *,
        granularity: Granularity = "scalar",
        per_step: bool = False,
        learn: bool = False,
        beyond: Beyond = "error",
    ) -> None:
        super().__init__()
        self.value = init
        self.granularity = granularity
        self.per_step = per_step
        self.learn = learn
        self.beyond: Beyond = beyond
        self.steps = 0
        self.rate: NamedTensors | None = None

    def extra_repr(self) -> str:
        beyond = f", beyond={self.beyond!r}" if self.per_step else ""
        return (
            f"{self.value}, granularity={self.granularity!r}, "
            f"per_step={self.per_step}, learn={self.learn}" + beyond
        )

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        if self.rate is not None:
            raise RuleError("this LearningRate is set up already; make a new one for each learner")
        leading = (steps,) if self.per_step else ()
        served: dict[str, list[Tensor]] = {}
        for name, parameter in trainable(params).items():
            served.setdefault(self._key(name), []).append(parameter)
        rates: Tensors = {}
        for key, parameters in served.items():
            own = tuple(parameters[0].shape) if self.granularity == "parameter" else ()
            rates[key] = real_full(parameters, leading + own, self.value)
        self.rate = NamedTensors(rates, learn=self.learn)
        self.steps = steps
        self.max_steps = limit(steps, self.beyond) if self.per_step else None
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

    def _at(self, key: str, index: int | Tensor) -> Tensor:
        if self.rate is None:
            raise RuleError(
                "LearningRate is not set up; call .setup(params, steps) first, or hand the rule to "
                "MetaLearner, which does"
            )
        try:
            rate = self.rate[key]
        except AttributeError as error:
            raise RuleError(
                f"LearningRate was set up without a rate for {key}; if it was unfrozen since, make a new "
                "rule and learner"
            ) from error
        if not self.per_step:
            return rate
        return take_row(rate, row("LearningRate", index, self.steps, self.beyond, RuleError))

    def _key(self, name: str) -> str:
        if self.granularity == "scalar":
            return "*"
        if self.granularity == "layer":
            layer = name.rpartition(".")[0]
            return f"{layer}.*" if layer else "*"
        return name


@checked(RuleError)
def meta_sgd(init: float) -> LearningRate:
    """Meta-SGD: one learned rate for every single parameter, θ' = θ − α ∘ g.

    Source: Li, Zhou, Chen, Li 2017.

    >>> meta_sgd(0.01)
    LearningRate(0.01, granularity='parameter', per_step=False, learn=True)
    """
    return LearningRate(init, granularity="parameter", learn=True)


@checked(RuleError)
def lslr(init: float, *, beyond: Beyond = "error") -> LearningRate:
    """LSLR: one learned rate for every parameter tensor and inner step.

    Source: Antoniou, Edwards, Storkey 2018 (per-layer per-step learning rates, where the reference
    code's "layer" is one parameter tensor).

    >>> lslr(0.1)
    LearningRate(0.1, granularity='tensor', per_step=True, learn=True, beyond='error')
    """
    return LearningRate(init, granularity="tensor", per_step=True, learn=True, beyond=beyond)
