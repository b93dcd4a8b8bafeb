"""The structure of a recipe: sections, their fields, and the fields that hold blocks.

The dataclasses are read as signatures, as blocks are: `schema.fields` reads them. A
section's fields are all required, except for those with a default.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le

from metablocks.checks import Blocks, Count, CountFrom0
from metablocks.meta_steps import Nonfinite
from metablocks.norm_statistics import NormStatistics


@dataclass(frozen=True, kw_only=True)
class InnerSection:
    """The inner loop: what happens inside a task.

    - `steps`: inner steps that a task takes in training.
    - `adapt`: which parameters move inside a task, patterns over their names: "*" all, "head.*"
      those of the head (ANIL), "!head.*" all others (BOIL).
    - `rule`: how a gradient becomes an update, one block after another.
    - `order`: through which steps the meta-gradient looks.
    - `batches`: the examples that each inner step sees; may be left out: the whole support set.
    - `start`: where a task begins; may be left out: the parameters as they are learned.
    - `support_loss`: what the inner steps descend; null for the loss of the tasks.
    - `norm_statistics`: by what batch norms normalise inside a task: `batch`, the batch at hand;
      `running`, the net as it came; `support`, in query passes the support set, looked through
      by the meta-gradient (see `MetaLearner`).
    """

    steps: CountFrom0
    batches: Annotated[Any, Blocks("batches")] = field(
        default_factory=lambda: {"block": "full_batch"}
    )
    adapt: str | list[str]
    start: Annotated[Any, Blocks("start")] = field(default_factory=lambda: {"block": "as_learned"})
    support_loss: Annotated[Any, Blocks("support_loss")] = None
    rule: Annotated[Any, Blocks("rule", at_least=1)]
    order: Annotated[Any, Blocks("order")]
    norm_statistics: NormStatistics = "batch"


@dataclass(frozen=True, kw_only=True)
class OuterSection:
    """The outer loop: the training of the meta-parameters.

    - `step_loss`: which steps' query losses count.
    - `estimator`: how the meta-gradient is computed.
    - `clip`: how far the meta-gradient may go; null for no bound.
    - `optimizer`: how the meta-parameters move.
    - `schedule`: how the outer rate changes with the epoch.
    - `tasks_per_step`: tasks of a meta-step, over which the meta-gradient is a mean.
    - `steps_per_epoch`: meta-steps of an epoch; schedules count in epochs.
    - `epochs`: epochs of the training.
    - `nonfinite`: what a loss or meta-gradient that is not finite does: `stop` the run, or `skip`
      the meta-step.
    """

    step_loss: Annotated[Any, Blocks("step_loss")]
    estimator: Annotated[Any, Blocks("estimator")]
    clip: Annotated[Any, Blocks("clip")] = None
    optimizer: Annotated[Any, Blocks("optimizer")]
    schedule: Annotated[Any, Blocks("schedule")]
    tasks_per_step: Count
    steps_per_epoch: Count
    epochs: Count
    nonfinite: Nonfinite = "stop"


@dataclass(frozen=True)
class EvaluationSection:
    """The evaluations of what is learned: validations, and the test at the end.

    - `tasks`: tasks of an evaluation.
    - `every`: epochs from one validation to the next.
    - `inner_steps`: inner steps that a task takes when it is judged.
    - `ensemble`: so many checkpoints, the best by validation, are tested together, too; 1 for the
      best alone.
    """

    tasks: Count
    every: Count
    inner_steps: CountFrom0
    ensemble: Count = 1


@dataclass(frozen=True)
class HardwareSection:
    """Device, executor and precision.

    - `device`: auto, cpu, cuda, cuda:1, ….
    - `executor`: how tasks are spread over the hardware.
    - `precision`: of parameters and data; bfloat16: these in float32, passes under autocast (those
      of an evaluation under `vmap` stay in float32: PyTorch's vmap takes no notice of autocast if
      nothing is differentiated). The meta-gradient is then another one, the more so the more inner
      steps there are.
    """

    device: str
    executor: Annotated[Any, Blocks("executor")]
    precision: Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class RecipeLayout:
    """The whole recipe.

    - `name`: what the experiment is called.
    - `cite`: the paper that it follows.
    - `seed`: of the tasks, of the initial weights and of all other draws.
    - `tasks`: what is learned from.
    - `model`: what is learned.
    - `surgery`: how the model is changed before it is learned, one block after another.
    - `inner`: what happens inside a task.
    - `outer`: the training of the meta-parameters.
    - `evaluation`: how what is learned is judged.
    - `hardware`: device, executor and precision.
    """

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


SECTIONS: dict[str, type] = {
    "recipe": RecipeLayout,
    "inner": InnerSection,
    "outer": OuterSection,
    "evaluation": EvaluationSection,
    "hardware": HardwareSection,
}
"""The recipe as a whole, and its sections by name."""


def is_section(annotation: Any) -> bool:
    """True for the type of a section, as the annotation of a field of the recipe."""
    return annotation in SECTIONS.values()


def slot_of(annotation: Any) -> Blocks | None:
    """The mark of a field that holds blocks, or None."""
    marks = (mark for mark in get_args(annotation) if isinstance(mark, Blocks))
    return next(marks, None)


def slot_paths(layout: type = RecipeLayout, prefix: str = "") -> dict[str, Blocks]:
    """Every field that holds blocks, by its path.

    >>> {path: mark.slot for path, mark in slot_paths().items() if path.startswith("inner")}
    {'inner.batches': 'batches', 'inner.start': 'start', 'inner.support_loss': 'support_loss',
     'inner.rule': 'rule', 'inner.order': 'order'}
    """
    marks: dict[str, Blocks] = {}
    hints = get_type_hints(layout, include_extras=True)
    for member in fields(layout):
        annotation = hints[member.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            marks |= slot_paths(annotation, f"{prefix}{member.name}.")
        elif mark := slot_of(annotation):
            marks[prefix + member.name] = mark
    return marks
