"""Losses: what the inner steps descend, what judges them, and what they may ask for by name.

    inner step:  g_k = ∇ support_loss(θ_k),        query losses:  loss(θ_0), …, loss(θ_K)

A loss is a function or module `(prediction, target) -> scalar`. Keyword-only parameters of these names
are filled:

- `target`, `inputs`: the two halves of the batch.
- `params`: all the model's parameters by name, fast where adapted.
- `step`: a `StepInfo`, its index that of the carry, 0 … K, inside and in the query pass alike.
- `model`: the model at this pass's weights, mode and norm statistics, to be called on anything. Buffers
  that it writes are dropped.

A loss without positional parameters gets only what it names, and no prediction is made for it. A module
with trainable parameters is learned.

What a module writes into its buffers and attributes ends with the pass, as a model's does: a mean teacher
that it holds does not move. A function or another object keeps what it writes, and so does a module that
it closes over (batch norm in training moves its statistics). It is called more often than in a loop by
hand: once more for a task of the first call, and wherever a pass is made again.

    def penalised(prediction, target, *, params):
        return F.mse_loss(prediction, target) + 0.1 * params["head.weight"].square().sum()
"""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from metablocks.checks import name_of
from metablocks.errors import BlockError, suggest_then
from metablocks.functional import FunctionalModule, ModuleState, ModuleView
from metablocks.generators import Watch, Written, storage
from metablocks.per_step import Position, StepAware, step_aware_modules
from metablocks.rules.base import StepInfo
from metablocks.types import Tensors, tensors_of

LossRole: TypeAlias = Literal["loss", "support_loss"]

NAMES = ("target", "inputs", "params", "step", "model")
"""The keyword-only parameters of a loss that are filled."""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Objective:
    """A loss with what it takes, read off its signature once by `Objective.of`.

    >>> def penalised(prediction, target, *, params): ...
    >>> Objective.of(penalised, "loss").asks
    ('params',)
    """

    loss: Callable[..., Tensor]
    role: LossRole
    """The argument of the learner that it is."""
    asks: tuple[str, ...] = ()
    """The names that it is given values by."""
    predicts: bool = True
    """True if it is given prediction and target in the first places."""
    module: FunctionalModule | None = None
    """Wraps a loss that is a module."""
    watched: set[bool | None] = field(default_factory=set, compare=False)
    """The modes in which a call has been seen to leave what it is given as it is."""

    @staticmethod
    def of(loss: Callable[..., Tensor], role: LossRole) -> "Objective":
        """Read a loss; an unreadable signature means `(prediction, target)`.

        Raises `BlockError` for required parameters that no value is known for.
        """
        module = FunctionalModule(loss) if isinstance(loss, nn.Module) else None
        try:
            signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        except (ValueError, TypeError):
            return Objective(loss, role, module=module)
        parameters = signature.parameters.values()
        places = [p for p in parameters if p.kind in _POSITIONAL]
        many = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
        keywords = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
        unknown = [p.name for p in places[2:] if p.default is Parameter.empty]
        unknown += [
            p.name for p in keywords if p.default is Parameter.empty and p.name not in NAMES
        ]
        if unknown:
            raise _unfit(loss, role, unknown[0])
        if len(places) == 1 and not many:
            raise BlockError(
                f"{role} {name_of(loss)} takes {places[0].name} alone in the first places; a loss takes "
                f"two, (prediction, target), or none and what it names: (*, {', '.join(NAMES)})",
                block="MetaLearner",
                field=role,
            )
        asks = tuple(p.name for p in keywords if p.name in NAMES)
        return Objective(loss, role, asks, bool(places) or many, module)

    def now(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> "Loss":
        """The loss as it is now, in a learner with these parameters, each named once.

        Raises `BlockError` if it holds a trainable one of model or rule.
        """
        if self.module is None:
            return Loss(self)
        module = self.module.module
        known = {id(parameter): name for name, parameter in parameters}
        names = tuple((name, known[id(p)]) for name, p in module.named_parameters())
        for (name, full), parameter in zip(names, module.parameters(), strict=True):
            if parameter.requires_grad and full.startswith(("model.", "rule.")):
                raise BlockError(
                    f"{self.role} {type(module).__name__} holds {full} as its {name}, which is not the "
                    "fast weight that a pass means; ask for that by name, as forward(self, prediction, "
                    "target, *, params)",
                    block="MetaLearner",
                    field=self.role,
                )
        return Loss(self, self.module.now(), names)

    def writing(self, what: object) -> BlockError:
        """The error that it writes in place into what it is given."""
        return BlockError(
            f"{self.role} {name_of(self.loss)} writes in place into {what}; it returns a scalar, and "
            "leaves what it is given as it is: write into a clone",
            block="MetaLearner",
            field=self.role,
        )

    @property
    def is_stepwise(self) -> bool:
        """True if it differs from step to step: it asks for `step`, or holds a step-aware module."""
        return "step" in self.asks or bool(self._step_aware)

    @property
    def max_steps(self) -> int | None:
        """The most inner steps that it can serve; None for any number. A query pass is at carry K."""
        limits = [module.max_steps for module in self._step_aware if module.max_steps is not None]
        return min(limits) - (self.role == "loss") if limits else None

    @property
    def _step_aware(self) -> list[StepAware]:
        held = step_aware_modules(self.loss) if isinstance(self.loss, nn.Module) else {}
        return [*held.values()]


@dataclass(frozen=True)
class Pass:
    """The values that a pass offers a loss by name."""

    inputs: Any
    target: Any
    state: ModuleState
    """The model's tensors at the pass."""
    call: Callable[..., Any]
    """The model at the pass."""
    step: StepInfo
    position: int | Position
    """The index of the step."""
    training: bool | None

    def value(self, name: str) -> Any:
        """The value of one of `NAMES`."""
        if name == "params":
            return dict(self.state.params)
        return self.call if name == "model" else getattr(self, name)


@dataclass(frozen=True)
class Loss:
    """A loss as it is now. `Objective.now` makes them."""

    objective: Objective
    view: ModuleView | None = None
    """The module that it is."""
    params: tuple[tuple[str, str], ...] = ()
    """The module's names of its parameters, and those that a learner has them under."""

    @property
    def buffers(self) -> Tensors:
        """The module's buffers, constants, under the learner's names."""
        own = {} if self.view is None else self.view.state().buffers
        return {f"{self.objective.role}.{name}": b.detach() for name, b in own.items()}

    @cached_property
    def predicts(self) -> bool:
        """True if it takes a prediction."""
        return self.objective.predicts

    @cached_property
    def is_plain(self) -> bool:
        """True for a function of prediction and target alone."""
        return self.view is None and self.predicts and not self.objective.asks

    def state(self, tensors: Tensors, buffers: Tensors) -> ModuleState:
        """Its tensors among the learner's."""
        if self.view is None:
            return ModuleState({}, {})
        own = f"{self.objective.role}."
        params = {name: tensors[full] for name, full in self.params}
        return ModuleState(
            params, {n.removeprefix(own): b for n, b in buffers.items() if n.startswith(own)}
        )

    def __call__(self, prediction: Any, at: Pass, state: ModuleState) -> Any:
        """The value at a pass; `state` holds its own tensors.

        Raises `BlockError` for a loss that writes into the model's tensors or the task's.
        """
        objective = self.objective
        places = (prediction, at.target) if objective.predicts else ()
        named = {name: at.value(name) for name in objective.asks}

        def call() -> Any:
            if self.view is None:
                return objective.loss(*places, **named)
            return self.view.call(
                "forward", state, places, named, step=at.position, training=at.training
            )[0]

        watch = nullcontext() if at.training in objective.watched else _guarding(at)
        try:
            try:
                with watch:
                    value = call()
            except RuntimeError as error:
                if "leaf Variable" in str(error):
                    with _guarding(at), torch.no_grad():  # tells which it writes
                        call()
                raise
        except (AttributeError, TypeError) as error:
            of_torch = str(getattr(objective.loss, "__module__", "")).startswith("torch")
            if isinstance(prediction, Tensor) or not (of_torch and objective.predicts):
                raise
            raise BlockError(
                f"{objective.role} {name_of(objective.loss)} does not take what the model returns, a "
                f"{type(prediction).__name__} ({error}); give a loss that takes it apart, such as "
                f"lambda prediction, target: {name_of(objective.loss)}(prediction[0], target)",
                block="MetaLearner",
                field=objective.role,
            ) from error
        except Written as error:
            raise objective.writing(error) from error
        objective.watched.add(at.training)
        return value


def _guarding(at: Pass) -> Watch:
    guarded = {storage(t): "the task's inputs" for t in tensors_of(at.inputs)}
    guarded |= {storage(t): "the task's target" for t in tensors_of(at.target)}
    own = {storage(t): name for tree in at.state for name, t in tree.items()}
    guarded |= {address: f"{name}, which is the model's own" for address, name in own.items()}
    guarded.pop(0, None)
    return Watch(guarded)


def _unfit(loss: Any, role: str, name: str) -> BlockError:
    there_are = f"it gets (prediction, target) and, by name, {', '.join(NAMES)}"
    hint = (
        f"; make it keyword-only, (prediction, target, *, {name})"
        if name in NAMES
        else suggest_then(name, NAMES, there_are)
    )
    return BlockError(
        f"{role} {name_of(loss)} requires {name}, for which a learner has no value in that place{hint}",
        block="MetaLearner",
        field=role,
    )
