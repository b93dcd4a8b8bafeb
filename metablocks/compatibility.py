"""Combinations of blocks that make no sense, refused by one table.

A block knows nothing of the learner that holds it. What a learner is made of is an `Assembly`; every
row of `REFUSALS` looks at it when the learner is built, and raises a `BlockError` that names the blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from metablocks.batches import Batches, Stream
from metablocks.checks import name_of
from metablocks.errors import BlockError
from metablocks.estimators import Estimator, Implicit, Reptile
from metablocks.objective import Objective
from metablocks.order import FirstOrder, Order, SecondOrder, TruncatedOrder, steps_through
from metablocks.per_step import step_aware_modules
from metablocks.rules import (
    KFO,
    LearningRate,
    MetaCurvature,
    MTMask,
    Proximal,
    UpdateRule,
    WeightDecay,
)
from metablocks.rules.base import members
from metablocks.start import Prototypes, Start
from metablocks.step_loss import FinalStepLoss, StepLoss
from metablocks.types import Progress, Tensors

_EPOCHS = 1000  # epochs of which an order is asked whether it is ever first-order


@dataclass(frozen=True)
class Assembly:
    """The choices that a learner is made of."""

    model: nn.Module
    loss: Objective
    support_loss: Objective
    steps: int
    start: Start
    batches: Batches
    rule: UpdateRule
    order: Order
    step_loss: StepLoss
    estimator: Estimator
    adapted: tuple[str, ...]
    """The names of the parameters that move inside a task, by the model."""
    parameters: dict[str, nn.Parameter]
    """All parameters, under the learner's names, `model.…`, `rule.…`, `loss.…` and `support_loss.…`."""
    norm_statistics: str
    allow_unused: tuple[str, ...]

    @property
    def learned(self) -> Tensors:
        """The meta-parameters: those that are trainable, and that a task begins with."""
        return learned(self.parameters, self.start, self.model)

    @property
    def rules(self) -> list[UpdateRule]:
        """The rule, or the members of a chain."""
        return members(self.rule)


def learned(parameters: Mapping[str, Tensor], start: Start, model: nn.Module) -> Tensors:
    """The parameters of a learner that are trainable, and not replaced where a task begins."""
    replaced = {f"model.{name}" for name in start.replaced(model)}
    return {n: p for n, p in parameters.items() if p.requires_grad and n not in replaced}


def check_compatible(assembly: Assembly) -> None:
    """Raise `BlockError` for the first combination of blocks that makes no sense."""
    for refuse in REFUSALS:
        refuse(assembly)


def check_losses(assembly: Assembly) -> None:
    """Raise `BlockError` for losses that do not go with the rest; they may be replaced between calls."""
    for refuse in (_support_loss, _losses):
        refuse(assembly)


def _truncated_order(assembly: Assembly) -> None:
    order, steps = assembly.order, assembly.steps
    if isinstance(order, TruncatedOrder) and order.last > steps:
        raise _refusal(
            f"TruncatedOrder last is {order.last}, but the learner takes {steps} inner steps; last can "
            f"be 0 to {steps}",
            field="order.last",
        )


def _norm_statistics(assembly: Assembly) -> None:
    if assembly.norm_statistics == "batch":
        return
    for name, module in step_aware_modules(assembly.model).items():
        if module.collects_buffers:
            raise _refusal(
                f'norm_statistics is "{assembly.norm_statistics}", but {name or "the model"} is a '
                f"{type(module).__name__}, which has statistics of its own; say what it normalises by "
                "where it is made, as per_step_batch_norm(statistics=...)",
                field="norm_statistics",
            )


def _mask(assembly: Assembly) -> None:
    if not any(isinstance(rule, MTMask) for rule in assembly.rules):
        return
    for name in assembly.adapted:
        owner = assembly.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, _ConvTransposeNd):
            raise _refusal(
                f"MTMask: {name} belongs to a {type(owner).__name__}, whose output units are not its "
                f'first dimension; leave it out of the inner loop: adapt=["*", "!{name}"]',
                field="adapt",
            )


def _adapted_transform(assembly: Assembly) -> None:
    kfo = next((r for r in assembly.rules if isinstance(r, KFO) and r.rate is not None), None)
    if kfo is None:
        return
    first, *after = assembly.rules
    if first is not kfo or len(after) != 1 or not _is_fixed(after[0], kfo.rate):
        raise _refusal(
            f"KFO with adapt_transform differentiates the update −{kfo.rate} U(G), so the rule must be "
            f"Chain(KFO(adapt_transform=True, rate={kfo.rate}), LearningRate({kfo.rate})) and nothing "
            f"else; given {', '.join(type(rule).__name__ for rule in assembly.rules)}, or another rate",
            field="rule",
        )
    order, steps = assembly.order, assembly.steps
    for epoch in range(_EPOCHS):
        for index, through in enumerate(steps_through(order, steps, Progress(epoch=epoch))):
            if not through:
                raise _refusal(
                    f"KFO with adapt_transform takes second-order steps only, and the order {order!r} "
                    f"is first-order at step {index} of epoch {epoch}; use SecondOrder(), or "
                    "adapt_transform=False",
                    field="order",
                )


def _end_alone(assembly: Assembly) -> None:
    """`Reptile` and `Implicit` go by the last carry alone.

    Of orders, `FirstOrder` and `SecondOrder` (the default) say nothing of single steps, and stand for
    "not asked"; any other would be passed over in silence.
    """
    if not isinstance(assembly.estimator, Reptile | Implicit):
        return
    block = type(assembly.estimator).__name__
    if not assembly.steps:
        raise _refusal(
            f"{block} goes by where the inner loop ends; give it steps: 1 or more, not 0",
            field="steps",
        )
    if not isinstance(assembly.step_loss, FinalStepLoss):
        raise _refusal(
            f"{assembly.step_loss!r} has no effect with {block}, which knows the end of the inner loop "
            "alone; use FinalStepLoss()",
            field="step_loss",
        )
    if not isinstance(assembly.order, FirstOrder | SecondOrder):
        raise _refusal(
            f"{assembly.order!r} has no effect with {block}, which differentiates through no inner "
            "step; use FirstOrder()",
            field="order",
        )
    if isinstance(assembly.batches, Stream):
        raise _refusal(
            f"{block} has one support set for all inner steps, and {assembly.batches} another for each; "
            "use FullBatch() or Minibatches(size), or the estimator Unrolled() or Adjoint()",
            field="batches",
        )
    if isinstance(assembly.start, Prototypes):
        raise _refusal(
            f"{block} has no gradient through what a task begins with, and {assembly.start} is learned "
            "through it alone; use ZeroHead(), or the estimator Unrolled()",
            field="start",
        )


def _start(assembly: Assembly) -> None:
    start, block = assembly.start, type(assembly.start).__name__
    for name in start.replaced(assembly.model):
        if name not in assembly.adapted:
            raise _refusal(
                f"{block}: {name} does not adapt, so that a task would never leave what it begins with; "
                "add it to adapt, or leave it out of the start",
                field="start",
            )
    if not assembly.parameters:
        raise _refusal(
            f"{type(assembly.model).__name__} has no parameter, and the rule learns nothing; give a "
            "model with trainable parameters",
            field="model",
        )
    if not assembly.learned:
        raise _refusal(
            f"{block} leaves nothing to learn: every trainable parameter begins with another value; "
            "leave some out of the start, or learn a rate",
            field="start",
        )
    if isinstance(start, Prototypes) and isinstance(assembly.batches, Stream):
        raise _refusal(
            f"{start} begins with the whole support set, and {assembly.batches} has another one for each "
            "step; use FullBatch() or Minibatches(size), or the start ZeroHead()",
            field="start",
        )


def _reptile(assembly: Assembly) -> None:
    if not isinstance(assembly.estimator, Reptile):
        return
    adapted = {f"model.{name}" for name in assembly.adapted}
    for name in assembly.learned:
        if name not in adapted:
            remedies = {
                "rule": "use a rule that learns nothing, such as LearningRate(0.1)",
                "model": 'let it adapt (adapt="*"), or freeze it with requires_grad_(False)',
            }
            part = name.partition(".")[0]
            remedy = remedies.get(part, "use Unrolled(), or freeze it with requires_grad_(False)")
            raise _refusal(
                f"Reptile has a gradient for what adapts inside a task alone, and {name} does not; "
                f"{remedy}",
                field="adapt" if part == "model" else name,
            )


def _implicit(assembly: Assembly) -> None:
    estimator = assembly.estimator
    if not isinstance(estimator, Implicit):
        return
    pull = Proximal(estimator.proximal)
    first, *others = assembly.rules  # the first is Proximal, by `inner_rule`
    if first.strength != estimator.proximal:
        raise _refusal(
            f"Implicit proximal is {estimator.proximal}, but the rule starts with {first}; they are one "
            f"number: Chain({pull}, …), or leave it out, for it is put in front",
            field="estimator.proximal",
        )
    for other in others:
        if isinstance(other, Proximal | WeightDecay):
            raise _refusal(
                f"Implicit: {other} adds to the inner loss, and the Hessian would not know of it; "
                f"{pull} at the head of the rule is the one term that it may have",
                field="rule",
            )
    for name in assembly.learned:
        if name.startswith("rule."):
            raise _refusal(
                f"Implicit has no gradient for {name}, since where the inner loop converges to does "
                "not depend on it; use a rule that learns nothing, such as LearningRate(0.1)",
                field=name,
            )
    for module in step_aware_modules(assembly.model).values():
        raise _refusal(
            f"Implicit needs one inner loss for all steps, and a {type(module).__name__} of the model "
            "differs from step to step; use Unrolled()",
            field="estimator",
        )


def _support_loss(assembly: Assembly) -> None:
    """The gradient of a support loss's own parameters comes through the inner steps alone."""
    own = [name for name in assembly.learned if name.startswith("support_loss.")]
    if not own or isinstance(assembly.estimator, Reptile | Implicit):
        return
    order, steps = assembly.order, assembly.steps
    if not steps:
        raise _refusal(
            f"{own[0]} is learned through the inner steps; give it steps: 1 or more, not 0",
            field="steps",
        )
    for epoch in range(_EPOCHS):
        if not any(steps_through(order, steps, Progress(epoch=epoch))):
            raise _refusal(
                f"{own[0]} is learned through the inner steps, and {order!r} takes the gradient of each "
                f"of them for a constant in epoch {epoch}; use SecondOrder(), or freeze it with "
                "requires_grad_(False)",
                field="order",
            )


def _losses(assembly: Assembly) -> None:
    for objective in dict.fromkeys((assembly.loss.role, assembly.support_loss.role)):
        loss = getattr(assembly, objective)
        if isinstance(assembly.estimator, Implicit) and loss.is_stepwise:
            raise _refusal(
                f"Implicit needs one inner loss for all steps, and {objective} {name_of(loss.loss)} "
                "asks for the step; use Unrolled()",
                field=objective,
            )
    loss = assembly.support_loss
    if assembly.norm_statistics == "support" and not loss.predicts:
        raise _refusal(
            'norm_statistics is "support", but no prediction is made of support sets, whose statistics '
            f'these are: {loss.role} {name_of(loss.loss)} takes none; use "batch" or "running"',
            field="norm_statistics",
        )


def _ascent(assembly: Assembly) -> None:
    """A rule's updates are added to the parameters, so they must go against the gradient.

    Rules of one's own that do not say whether they negate are let through.
    """
    for name, rule in assembly.rule.named_modules():
        if not isinstance(rule, LearningRate) or rule not in assembly.rules:
            continue
        least = min(rule.values, default=0.0)
        if least < 0:
            raise _refusal(
                f"LearningRate init is {least:g}: a negative rate goes up the slope; give 0 or more",
                field=".".join(filter(None, ["rule", name, "init"])),
            )
    if assembly.rule.negates is not False:
        return
    names = [type(rule).__name__ for rule in assembly.rules]
    rates = [type(rule).__name__ for rule in assembly.rules if rule.negates]
    how = (
        f"{' and '.join(rates)} each negate it, which goes up the slope again; leave one of them out"
        if rates
        else f"{', '.join(names)} does not negate it, and updates are added: the loss would go up; put a "
        f"learning rate behind it, Chain({', '.join(f'{name}(…)' for name in names)}, LearningRate(0.1))"
    )
    raise _refusal(f"the rule does not go against the gradient: {how}", field="rule")


REFUSALS: tuple[Callable[[Assembly], None], ...] = (
    _norm_statistics,
    _truncated_order,
    _mask,
    _adapted_transform,
    _end_alone,
    _start,
    _reptile,
    _implicit,
    check_losses,
    _ascent,
)


def shapes_held(rule: UpdateRule) -> str | None:
    """The member of a rule that is made for the shapes of the parameters; None if there is none."""
    for member in members(rule):
        by_entry = isinstance(member, LearningRate) and member.granularity == "parameter"
        if by_entry or isinstance(member, KFO | MetaCurvature | MTMask):
            return type(member).__name__
    return None


def _refusal(message: str, field: str) -> BlockError:
    return BlockError(message, block="MetaLearner", field=field)


def _is_fixed(rule: UpdateRule, rate: float | None) -> bool:
    """True for a `LearningRate` that is the one number `rate` and does not learn."""
    return isinstance(rule, LearningRate) and not rule.learn and rule.value == rate
