"""A resolved recipe to an experiment that is ready to train.

The seed governs the model's initialisation, drawn on the CPU so that every device starts from the
same numbers; building leaves the global random state as it was.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metablocks.batches import Stream
from metablocks.devices import find_device, has_float64
from metablocks.errors import (
    ExecutorError,
    MetablocksError,
    ModuleError,
    RecipeError,
    RuleError,
    SelectionError,
    first_line,
)
from metablocks.executors import Vmap
from metablocks.learner import MetaLearner
from metablocks.losses import cross_entropy
from metablocks.meta_steps import Nonfinite
from metablocks.recipe.assemble import assemble, block_paths, construct
from metablocks.recipe.layout import EvaluationSection
from metablocks.recipe.outer import Clip
from metablocks.recipe.parse import Place, Problem, join, raise_problems
from metablocks.recipe.record import Recipe, leaves
from metablocks.recipe.schema import within
from metablocks.rules import Chain, UpdateRule
from metablocks.start import Prototypes
from metablocks.tasks.base import TaskSource

_ARGUMENTS = {
    "model": "model",
    "steps": "inner.steps",
    "start": "inner.start",
    "batches": "inner.batches",
    "rule": "inner.rule",
    "order": "inner.order",
    "adapt": "inner.adapt",
    "norm_statistics": "inner.norm_statistics",
    "support_loss": "inner.support_loss",
    "step_loss": "outer.step_loss",
    "estimator": "outer.estimator",
    "executor": "hardware.executor",
}
"""The learner's arguments, by the paths of a recipe that they come from."""
_KINDS = {
    SelectionError: "inner.adapt",
    RuleError: "inner.rule",
    ModuleError: "model",
    ExecutorError: "hardware.executor",
}
"""The paths of errors that name no argument."""


LOSSES = {
    "classification": F.cross_entropy,
    "regression": F.mse_loss,
    "text": cross_entropy(kind="text"),  # of the next token, in nats
}


@dataclass(frozen=True)
class Experiment:
    """The parts of a training loop, on its device and in its precision."""

    recipe: Recipe
    source: TaskSource
    learner: MetaLearner
    optimizer: Optimizer
    clip: Clip | None
    """Called on the meta-gradient before the optimiser's step."""
    scheduler: LRScheduler | None
    """Stepped once an epoch; None for a constant rate."""
    tasks_per_step: int
    steps_per_epoch: int
    epochs: int
    nonfinite: Nonfinite
    """`stop` or `skip` (see `fit`)."""
    evaluation: EvaluationSection
    device: torch.device
    dtype: torch.dtype
    """Of parameters and data."""
    mixed: bool = False
    """True if forward passes are in bfloat16."""

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the learner computes: autocast to bfloat16 if the recipe says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @property
    def kind(self) -> str:
        """`classification` and `text` (cross-entropy) or `regression` (mean squared error)."""
        return self.source.kind


def build(
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    data: str | Path | None = None,
    task_seed: int | None = None,
) -> Experiment:
    """Put the recipe's blocks together. `device` stands in for the recipe's; `data` is a folder.

    `task_seed` stands in for the recipe's seed where tasks are drawn.

    Raises `RecipeError`, with places, for blocks that make no sense together and for a device that
    is not here, and `DataError` for a `data` folder without the data.

    >>> from metablocks.recipe import load
    >>> experiment = build(load("maml_sinusoid", ["hardware.device=cpu"]))
    >>> experiment.kind, experiment.learner.steps, experiment.device
    ('regression', 1, device(type='cpu'))
    """
    problems: list[Problem] = []
    placed_on = _device(recipe, device, problems)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.at("seed"))
        seed = recipe.at("seed") if task_seed is None else task_seed
        blocks = assemble(recipe, problems, {"seed": seed, "device": placed_on, "data": data})
        raise_problems(problems)
        source = blocks["tasks"]
        raise_problems(recipe.problem(*refusal) for refusal in _tasks_refused(recipe, blocks))
        learner = _learner(recipe, blocks, LOSSES[source.kind])
    mixed = recipe.at("hardware.precision") == "bfloat16"
    dtype: torch.dtype = getattr(torch, "float32" if mixed else recipe.at("hardware.precision"))
    try:
        learner.to(device=placed_on, dtype=dtype)
    except (TypeError, RuntimeError) as error:  # float64 on a device without it; no memory
        message = f"the model does not go to {placed_on} in {dtype}: {first_line(error)}"
        if dtype == torch.float64 and not has_float64(placed_on):
            message = f"{placed_on} has no float64; take precision: float32, or device: cpu"
        raise_problems([recipe.problem("hardware.precision", message)])
    problems += [recipe.problem(*refusal) for refusal in _learner_refused(recipe, learner)]
    context = {"parameters": [*learner.named_parameters()], "epochs": recipe.at("outer.epochs")}
    blocks = assemble(recipe, problems, context, blocks)
    raise_problems(problems)
    return Experiment(
        recipe=recipe,
        source=source,
        learner=learner,
        clip=blocks.get("outer.clip"),
        optimizer=blocks["outer.optimizer"],
        scheduler=blocks["outer.schedule"],
        tasks_per_step=recipe.at("outer.tasks_per_step"),
        steps_per_epoch=recipe.at("outer.steps_per_epoch"),
        epochs=recipe.at("outer.epochs"),
        nonfinite=recipe.at("outer.nonfinite"),
        evaluation=EvaluationSection(**recipe.at("evaluation")),
        device=placed_on,
        dtype=dtype,
        mixed=mixed,
    )


def build_rule(recipe: Recipe) -> UpdateRule:
    """The recipe's update rule by itself, not set up for any parameters yet.

    >>> from metablocks.recipe import load
    >>> build_rule(load("maml_sinusoid"))
    LearningRate(0.01, granularity='scalar', per_step=False, learn=False)
    """
    problems: list[Problem] = []
    paths = [(path, slot) for path, slot in block_paths(recipe) if slot.name == "rule"]
    rules = [construct(recipe, path, slot, {}, problems) for path, slot in paths]
    raise_problems(problems)
    return _chained(rules)


def _device(
    recipe: Recipe, name: str | torch.device | None, problems: list[Problem]
) -> torch.device:
    """The recipe's device, or the one named in its place; a problem if this machine has none such."""
    try:
        return find_device(str(name or recipe.at("hardware.device")))
    except ValueError as error:
        problem = recipe.problem("hardware.device", str(error))
        problems.append(Problem(Place(f"--device {name}"), "", str(error)) if name else problem)
        return torch.device("cpu")


def _learner(recipe: Recipe, blocks: dict[str, Any], loss: Any) -> MetaLearner:
    stated = {name: blocks.get(path, recipe.at(path)) for name, path in _ARGUMENTS.items()}
    try:
        return MetaLearner(**stated | {"loss": loss, "rule": _chained(_rules(blocks))})
    except MetablocksError as error:
        problem = recipe.problem(_refused(recipe, blocks, error), str(error))
        raise RecipeError(str(problem)) from error
    except Exception as error:  # no memory for what a rule sets up; a block of one's own
        message = f"the learner could not be set up: {type(error).__name__}: {first_line(error)}"
        raise RecipeError(str(recipe.problem("inner", message))) from error


def _rules(blocks: dict[str, Any]) -> list[UpdateRule]:
    return [block for path, block in blocks.items() if within(path, "inner.rule")]


def _chained(rules: list[UpdateRule]) -> UpdateRule:
    return rules[0] if len(rules) == 1 else Chain(*rules)


def _refused(recipe: Recipe, blocks: dict[str, Any], error: MetablocksError) -> str:
    """The recipe's path of what a learner refuses, by the error's `block` and `field`, or its class."""
    if error.block != "MetaLearner" or error.field is None:
        paths = [path for path, block in blocks.items() if type(block).__name__ == error.block]
        kinds = (path for kind, path in _KINDS.items() if isinstance(error, kind))
        if len(paths) == 1:
            has = error.field and error.field in recipe.at(paths[0])
            return join(paths[0], error.field or "") if has else paths[0]
        return next(kinds, "inner")
    argument, *parts = error.field.split(".")
    path = _ARGUMENTS.get(argument, "inner")
    if argument != "rule":
        return ".".join([path, *parts])
    module: Any = blocks["outer.estimator"].inner_rule(_chained(_rules(blocks)))
    path_of = {id(block): path for path, block in blocks.items()}
    path = path_of.get(id(module), path)
    for part in parts:  # down a chain, to the rule that is a block, or a field of it
        module = getattr(module, part, None)
        path = path_of.get(id(module), path)
    return join(path, parts[-1]) if parts and parts[-1] in (recipe.at(path) or ()) else path


def _tasks_refused(recipe: Recipe, blocks: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Paths of what does not go with the tasks, and why.

    Tasks of an unknown kind, prototypes of no classes, streams without rows, too few rows, and rows
    without a stream. Rows are those of sources that ship.
    """
    kind = blocks["tasks"].kind
    if kind not in LOSSES:
        yield "tasks", f'tasks of kind "{kind}"; it is one of {", ".join(LOSSES)}'
    if isinstance(blocks["inner.start"], Prototypes) and kind == "regression":
        message = "prototypes are those of classes, and the tasks are regression; take zero_head"
        yield "inner.start", message
    fields = list(leaves(recipe.at("tasks"), "tasks"))
    sources = [value for path, value in fields if path.endswith("block")]
    if any(":" in name for name in sources):
        return
    rows = [(n, path) for path, n in fields if path.endswith("chunks") and n is not None]
    stream = isinstance(blocks["inner.batches"], Stream)
    most = max(recipe.at("inner.steps"), recipe.at("evaluation.inner_steps"))
    if stream and not rows:
        yield (
            "inner.batches",
            f"stream takes tasks with a batch for each inner step, and those of {sources[0]} have one "
            "support set; take full_batch or minibatches, text with chunks, or a source of your own, "
            "package.module:Name",
        )
    for number, path in sorted(rows)[:1]:
        if not stream:
            yield (
                path,
                f"{number}, but inner.batches is no stream, so that a step would see all chunks at once; "
                "take inner.batches={block: stream}, or chunks: null",
            )
        elif number < most:
            yield (
                path,
                f"{number}, but each of {most} inner steps (inner.steps, evaluation.inner_steps) adapts "
                f"to a chunk of its own; take at least {most}",
            )


def _learner_refused(recipe: Recipe, learner: MetaLearner) -> Iterator[tuple[str, str]]:
    """Paths of what does not go with the learner as it is set up, and why."""
    learned = [name for name, p in learner.rule.named_parameters() if p.requires_grad]
    if learned and not learner.steps:
        yield (
            "inner.steps",
            f"0, but the rule learns {learned[0]}, which no loss depends on without an inner step; take "
            "1 or more, or a rule that learns nothing",
        )
    most, judged = learner.max_steps, recipe.at("evaluation.inner_steps")
    if most is not None and judged > most:
        yield (
            "evaluation.inner_steps",
            f"{judged}, but a per-step block of this recipe is made for {most} (inner.steps); take at "
            f"most {most}, or give the block beyond: last, to go on with its last row",
        )
    norms = [
        n for n, m in learner.model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    low = recipe.at("hardware.precision") == "bfloat16"
    if low and norms and isinstance(learner.executor, Vmap):  # whose derivative PyTorch has not
        yield (
            "hardware.executor",
            f"vmap does not run batch norm ({norms[0]}) in bfloat16; take the block loop or auto, or "
            "precision: float32",
        )
