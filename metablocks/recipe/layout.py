"""The structure of a recipe: sections, their fields, and the fields that hold blocks.

The dataclasses are read as signatures, as blocks are: `schema.entry` makes pydantic types of them. A
section's fields are all required, except for those with a default.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le

from metablocks.checks import Blocks, Count, CountFrom0
from metablocks.fit import Nonfinite
from metablocks.functional import NormStatistics


@dataclass(frozen=True)
class InnerSection:
    """The inner loop: what happens inside a task, and by what batch norms normalise in it.

    `norm_statistics`: of the batch at hand, of the net as it came (`running`), or, when it is judged,
    of the support set: see `MetaLearner`.
    """

    steps: CountFrom0
    adapt: str | list[str]
    rule: Annotated[Any, Blocks("rule", at_least=1)]
    order: Annotated[Any, Blocks("order")]
    norm_statistics: NormStatistics = "batch"
    support_loss: Annotated[Any, Blocks("support_loss")] = None
    """What the inner steps descend; null for the loss of the tasks."""


@dataclass(frozen=True, kw_only=True)
class OuterSection:
    """The outer loop: the training of the meta-parameters."""

    step_loss: Annotated[Any, Blocks("step_loss")]
    estimator: Annotated[Any, Blocks("estimator")]
    clip: Annotated[Any, Blocks("clip")] = None
    optimizer: Annotated[Any, Blocks("optimizer")]
    schedule: Annotated[Any, Blocks("schedule")]
    tasks_per_step: Count
    steps_per_epoch: Count
    epochs: Count
    nonfinite: Nonfinite = "stop"
    """What a loss or meta-gradient that is not finite does: end the run, or skip the meta-step."""


@dataclass(frozen=True)
class EvaluationSection:
    """The number of tasks of an evaluation, the epochs between two, and its inner steps.

    `ensemble`: the number of the best checkpoints by validation are tested together, too.
    """

    tasks: Count
    every: Count
    inner_steps: CountFrom0
    ensemble: Count = 1


@dataclass(frozen=True)
class HardwareSection:
    """Device, executor and precision."""

    device: str
    executor: Annotated[Any, Blocks("executor")]
    precision: Literal["float32", "float64", "bfloat16"]
    """Of parameters and data. bfloat16: these in float32, passes under autocast.

    (Passes of an evaluation under `vmap` stay in float32: PyTorch's vmap takes no notice of autocast
    if nothing is differentiated.)
    """


@dataclass(frozen=True, kw_only=True)
class RecipeLayout:
    """The whole recipe."""

    name: str
    cite: str = ""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)]
    tasks: Annotated[Any, Blocks("tasks")]
    model: Annotated[Any, Blocks("model")]
    surgery: Annotated[Any, Blocks("surgery", at_least=0)] = ()
    inner: InnerSection
    outer: OuterSection
    evaluation: EvaluationSection
    hardware: HardwareSection


def slot_of(annotation: Any) -> Blocks | None:
    """The mark of a field that holds blocks, or None."""
    marks = (mark for mark in get_args(annotation) if isinstance(mark, Blocks))
    return next(marks, None)


def slot_paths(layout: type = RecipeLayout, prefix: str = "") -> dict[str, Blocks]:
    """Every field that holds blocks, by its path.

    >>> {path: mark.slot for path, mark in slot_paths().items() if path.startswith("inner")}
    {'inner.rule': 'rule', 'inner.order': 'order', 'inner.support_loss': 'support_loss'}
    """
    marks: dict[str, Blocks] = {}
    hints = get_type_hints(layout, include_extras=True)
    for field in fields(layout):
        annotation = hints[field.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            marks |= slot_paths(annotation, f"{prefix}{field.name}.")
        elif mark := slot_of(annotation):
            marks[prefix + field.name] = mark
    return marks
