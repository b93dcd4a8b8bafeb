"""Update rules: the base class, composition, and tensors by dotted names.

    updates, state = rule(gradients, state, step)          θ_{k+1} = θ_k + updates

A rule maps named gradients to named updates and may carry a per-task state from step to step. The
output of the last rule is **added** to the parameters, so one rule of a chain must negate: a learning
rate does.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from metablocks.checks import CountFrom0, checked, name_of, wrong_answer
from metablocks.errors import RuleError, suggest_then
from metablocks.per_step import Position, tell
from metablocks.types import Tensors


@dataclass(frozen=True)
class StepInfo:
    """Position in the inner loop: step `index` of `steps`, at fast weights `params`.

    >>> import torch
    >>> import metablocks as mb
    >>> step = mb.StepInfo(index=0, steps=5, params={"w": torch.zeros(2)})
    >>> step.index, step.steps, list(step.params)
    (0, 5, ['w'])
    """

    index: int
    steps: int
    params: Tensors

    @property
    def at(self) -> int | Tensor:
        """The index for reckoning; where a trace is made that is to serve all steps, a scalar of floats.

        A rule that reads `index` or `steps` is compiled for each of them apart, one that reads `at` once.
        """
        return self.index


@dataclass(frozen=True)
class TracedStep(StepInfo):
    """The same while a trace is made."""

    position: Position

    @property
    def at(self) -> Tensor:
        return self.position.tensor

    def __getattribute__(self, name: str) -> Any:
        if name in ("index", "steps"):
            tell(name)
        return super().__getattribute__(name)


class UpdateRule(nn.Module):
    """Turns the gradients of one inner step into updates. Subclass it to write a rule.

    Parameters registered in `setup` are meta-parameters: the outer loop learns them. Everything a
    rule remembers *within* a task belongs into the state that `init` makes and `forward` returns,
    never into an attribute.

    Laws: `forward` returns updates with the names, shapes and dtypes of the gradients it got, is
    differentiable in them, in the meta-parameters and in the state, and changes none of its
    arguments. `metablocks verify my_pkg.my_module:MyRule` holds a rule to them all.

    >>> import torch
    >>> import metablocks as mb
    >>> class Sign(mb.UpdateRule):
    ...     negates = False                              # a learning rate is to stand behind it
    ...     def forward(self, updates, state, step):
    ...         return {name: u.sign() for name, u in updates.items()}, state
    >>> updates, _ = Sign()({"w": torch.tensor([-2.0, 3.0])}, (), mb.StepInfo(0, 1, {}))
    >>> updates["w"]
    tensor([-1.,  1.])

    A learned rate of its own for every parameter, under the parameters' names (reports draw what
    stands as `rate`):

    >>> class LearnedRate(mb.UpdateRule):
    ...     negates = True
    ...     def __init__(self, init):
    ...         super().__init__()
    ...         self.initial = init
    ...     def setup(self, params, steps):
    ...         rates = {name: torch.full_like(p, self.initial) for name, p in params.items()}
    ...         self.rate = mb.NamedTensors(rates, learn=True)
    ...         return self
    ...     def forward(self, updates, state, step):
    ...         return {name: -self.rate[name] * u for name, u in updates.items()}, state
    >>> loss = torch.nn.functional.mse_loss
    >>> learner = mb.MetaLearner(torch.nn.Linear(1, 1), loss=loss, steps=2, rule=LearnedRate(0.1))
    >>> [name for name, _ in learner.named_parameters()]
    ['model.weight', 'model.bias', 'rule.rate.weight', 'rule.rate.bias']
    """

    max_steps: int | None = None
    """Inner steps the rule is set up for; `None` where any number will do."""
    draws_each_step: bool = False
    """True if `forward` draws random numbers; else they are drawn in `init`, once a task."""
    negates: bool | None = None
    """True if its updates go against the gradient, as a learning rate's do; False if they are still a
    gradient, to stand in front of one. A learner refuses rules that are known not to descend."""
    straight_through: bool = False
    """True if the gradient of its own parameters is a stated estimate, and not the loss's slope."""

    def setup(self, params: Tensors, steps: int) -> Self:
        """Allocate the meta-parameters for these adapted parameters and this many steps, once."""
        return self

    def init(self, params: Tensors) -> Any:
        """Initial state for a new task: a pytree; `()` if the rule is stateless."""
        return ()

    def forward(self, updates: Tensors, state: Any, step: StepInfo) -> tuple[Tensors, Any]:
        """Updates `{name: tensor}` from gradients `{name: tensor}` of equal shapes, and the new state."""
        raise NotImplementedError

    def _check_new(self, tensors: object) -> None:
        """Raise `RuleError` if what `setup` makes is there already."""
        if tensors is not None:
            raise RuleError(
                f"this {name_of(self)} is set up already; make a new one for each learner"
            )

    def _ready(self, tensors: "NamedTensors | None") -> "NamedTensors":
        """The tensors that `setup` has made; raises `RuleError` before it."""
        if tensors is None:
            raise RuleError(
                f"{name_of(self)} is not set up; call .setup(params, steps) first, or hand the rule "
                "to MetaLearner, which does"
            )
        return tensors


@checked(RuleError)
class Chain(UpdateRule):
    """Rules applied from left to right: `Chain(a, b)(g) = b(a(g))`.

    Law: a chain is its hand-written loop; `Chain(rule)` is `rule`; chains nest.

    >>> import torch
    >>> import metablocks as mb
    >>> params = {"w": torch.ones(2)}
    >>> rule = mb.Chain(mb.LearningRate(0.5), mb.LearningRate(0.5)).setup(params, steps=1)
    >>> rule({"w": torch.ones(2)}, rule.init(params), mb.StepInfo(0, 1, params))[0]["w"]
    tensor([0.2500, 0.2500])

    Raises `RuleError` for an empty chain and for a member that is no `UpdateRule`.
    """

    def __init__(self, *rules: UpdateRule) -> None:
        super().__init__()
        if not rules:
            raise RuleError(
                "Chain() has no rule; give at least one, such as LearningRate(0.1)",
                block="Chain",
                field="rules",
            )
        self.rules = nn.ModuleList(rules)

    @property
    def _members(self) -> list[UpdateRule]:
        return [rule for rule in self.rules if isinstance(rule, UpdateRule)]

    @property
    def max_steps(self) -> int | None:  # type: ignore[override]
        """The fewest steps that a member is set up for."""
        return min((r.max_steps for r in self._members if r.max_steps is not None), default=None)

    @property
    def negates(self) -> bool | None:  # type: ignore[override]
        """True if an odd number of members negates; None if one of them does not say."""
        known = [rule.negates for rule in self._members]
        return None if None in known else sum(map(bool, known)) % 2 == 1

    @property
    def draws_each_step(self) -> bool:  # type: ignore[override]
        return any(rule.draws_each_step for rule in self._members)

    @checked(RuleError)
    def setup(self, params: Tensors, steps: CountFrom0) -> Self:
        for rule in self._members:
            rule.setup(params, steps)
        return self

    def init(self, params: Tensors) -> tuple[Any, ...]:
        return tuple(rule.init(params) for rule in self._members)

    def forward(
        self, updates: Tensors, state: tuple[Any, ...], step: StepInfo
    ) -> tuple[Tensors, tuple[Any, ...]]:
        states = []
        for rule, own in zip(self._members, state, strict=True):
            updates, own = answer_of(rule, rule(updates, own, step))
            states.append(own)
        return updates, tuple(states)


def members(rule: UpdateRule) -> list[UpdateRule]:
    """The rules of a chain, those of nested ones too, in order; of another rule, itself.

    >>> from metablocks.rules import LearningRate
    >>> [one.value for one in members(Chain(LearningRate(1.0), Chain(LearningRate(2.0))))]
    [1.0, 2.0]
    """
    if not isinstance(rule, Chain):
        return [rule]
    return [one for member in rule._members for one in members(member)]


class NamedTensors(nn.Module):
    """Tensors of any shape under a model's dotted names, as parameters (learned) or buffers (fixed).

    A `nn.ParameterDict` refuses dots; this mirrors the model's own tree of modules instead, so that
    the tensor for `conv1.weight` is called `conv1.weight` here too.

    >>> import torch
    >>> import metablocks as mb
    >>> tensors = mb.NamedTensors({"conv1.weight": torch.zeros(2)}, learn=True)
    >>> [name for name, _ in tensors.named_parameters()]
    ['conv1.weight']
    >>> tensors["conv1.weight"].shape
    torch.Size([2])
    >>> tensors["conv1.bias"]
    Traceback (most recent call last):
    metablocks.errors.RuleError: no tensor is called "conv1.bias"; did you mean "conv1.weight"? There
    are: conv1.weight
    """

    def __init__(self, tensors: Tensors, *, learn: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if learn:
                owner.register_parameter(leaf, nn.Parameter(tensor))
            else:
                owner.register_buffer(leaf, tensor)

    def __getitem__(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        try:
            tensor = getattr(self.get_submodule(path), leaf)
        except AttributeError:
            names = [*self.state_dict()]
            there_are = f"there are: {', '.join(names)}"
            raise RuleError(
                f'no tensor is called "{name}"{suggest_then(name, names, there_are)}'
            ) from None
        assert isinstance(tensor, Tensor)
        return tensor


def answer_of(rule: object, answer: Any) -> tuple[Tensors, Any]:
    """A rule's updates and new state. Raises `RuleError` if the answer is no such pair."""
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], dict)
    if pair and all(isinstance(update, Tensor) for update in answer[0].values()):
        return answer  # type: ignore[no-any-return]
    takes = "a pair: updates {name: tensor}, and the new state"
    raise wrong_answer("rule", name_of(rule), answer, takes, RuleError)


def check_updates(updates: Tensors, params: Tensors) -> None:
    """Raise `RuleError` where updates do not fit the parameters they will be added to."""
    if updates.keys() != params.keys():
        missing = [key for key in params if key not in updates]
        unknown = [key for key in updates if key not in params]
        problem = f"no update for {missing}" if missing else f"updates for unknown {unknown}"
        message = f"the rule returned {problem}; it must return every name it was given"
        raise RuleError(message, block="MetaLearner", field="rule")
    for key, parameter in params.items():
        update = updates[key]
        if update.shape != parameter.shape or update.dtype != parameter.dtype:
            raise RuleError(
                f"the rule returned an update of {list(update.shape)} {update.dtype} for {key}, which "
                f"is {list(parameter.shape)} {parameter.dtype}",
                block="MetaLearner",
                field="rule",
            )


def real_full(served: Sequence[Tensor], shape: tuple[int, ...], value: float) -> Tensor:
    """A real tensor of one value, as precise as any tensor that it serves, on their device.

    >>> real_full([torch.zeros(2), torch.zeros(3, dtype=torch.complex128)], (), 0.5).dtype
    torch.float64

    Raises `RuleError` if the value is out of range for the dtype of one of them.
    """
    for tensor in served:
        if not tensor.is_floating_point() and not tensor.is_complex():
            raise RuleError(f"a parameter is {tensor.dtype}; what adapts is of floats")
        largest = torch.finfo(tensor.dtype).max
        if abs(value) > largest:
            raise RuleError(f"{value:g} is out of range; {tensor.dtype} goes up to {largest:.2g}")
    dtype = functools.reduce(torch.promote_types, [tensor.dtype.to_real() for tensor in served])
    return torch.full(shape, value, dtype=dtype, device=served[0].device)


def scaled(factor: Tensor, tensor: Tensor) -> Tensor:
    """A real factor times a real or complex tensor, in the dtype of the tensor.

    >>> scaled(torch.tensor(0.5, dtype=torch.float64), torch.tensor(2j))
    tensor(0.+1.j)
    """
    if factor.dtype != tensor.dtype:
        factor = factor.to(tensor.dtype.to_real())
    return factor * tensor


def inner_product(one: Tensors, other: Tensors) -> Tensor:
    """The real inner product Re Σ ⟨a, b⟩ over tensors of the same names, in float32 or better.

    Of complex tensors too, as pairs of real numbers: Re (ā b) = Re a Re b + Im a Im b.

    >>> inner_product({"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([3 - 4j])})
    tensor(-5.)
    """

    def precise(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    products = [(precise(one[name]).conj() * precise(other[name])).real for name in one]
    return torch.stack([product.sum() for product in products]).sum()
