"""A resolved recipe to an experiment that is ready to train.

The seed governs the model's initialisation, drawn on the CPU so that every device starts from the
same numbers; building leaves the global random state as it was.
"""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metablocks.devices import find_device
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
from metablocks.recipe.clipping import Clip
from metablocks.recipe.construct import NEED_THE_LEARNER, block_paths, construct, problem_at
from metablocks.recipe.parse import Place, Problem, raise_problems
from metablocks.recipe.record import Recipe
from metablocks.recipe.schema import INVALID
from metablocks.rules import Chain, UpdateRule
from metablocks.tasks.base import TaskSource

LOSSES = {"classification": F.cross_entropy, "regression": F.mse_loss}


@dataclass(frozen=True)
class EvaluationPlan:
    """On how many tasks, how often (in epochs), with how many inner steps."""

    tasks: int
    every: int
    inner_steps: int
    ensemble: int = 1
    """How many of the best checkpoints by validation are tested together; 1 for no ensemble."""


@dataclass(frozen=True)
class Experiment:
    """All that a training loop needs, on its device and in its precision."""

    recipe: Recipe
    source: TaskSource
    learner: MetaLearner
    optimizer: Optimizer
    clip: Clip | None
    """Called on the meta-gradient before the optimiser's step."""
    scheduler: LRScheduler | None
    """Stepped once an epoch; None where the rate is constant."""
    tasks_per_step: int
    steps_per_epoch: int
    epochs: int
    evaluation: EvaluationPlan
    device: torch.device
    dtype: torch.dtype
    """Of parameters and data."""
    mixed: bool = False
    """Whether forward passes are in bfloat16."""

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the learner computes: autocast to bfloat16 where that is wished."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @property
    def kind(self) -> str:
        """`classification` (cross-entropy) or `regression` (mean squared error)."""
        return self.source.kind


def build(
    recipe: Recipe, *, device: str | torch.device | None = None, data: str | Path | None = None
) -> Experiment:
    """Put the recipe's blocks together. `device` stands in for the recipe's; `data` is a folder.

    Raises `RecipeError`, with places, for blocks that make no sense together and for a device that
    is not here, and `DataError` for a `data` folder without the data.

    >>> from metablocks.recipe import load
    >>> experiment = build(load("maml_sinusoid", ["hardware.device=cpu"]))
    >>> experiment.kind, experiment.learner.steps, experiment.device
    ('regression', 1, device(type='cpu'))
    """
    problems: list[Problem] = []
    found = _device(recipe, device, problems)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.at("seed"))
        source, blocks = _blocks(recipe, found, data, problems)
        raise_problems(problems)
        if source.kind not in LOSSES:
            message = f'tasks of kind "{source.kind}"; it is one of {", ".join(LOSSES)}'
            raise_problems([Problem(recipe.place("tasks"), "tasks", message)])
        learner = _learner(recipe, blocks, LOSSES[source.kind])
    _check_rule(recipe, learner)
    mixed = recipe.at("hardware.precision") == "bfloat16"
    dtype: torch.dtype = getattr(torch, "float32" if mixed else recipe.at("hardware.precision"))
    try:
        learner.to(device=found, dtype=dtype)
    except (TypeError, RuntimeError) as error:  # float64 on a device without it; no memory
        message = f"the model does not go to {found} in {dtype}: {first_line(error)}"
        raise_problems([Problem(recipe.place("hardware.precision"), "hardware", message)])
    names = ("tasks", "every", "inner_steps", "ensemble")
    plan = EvaluationPlan(*(recipe.at(f"evaluation.{name}") for name in names))
    _check_evaluation(recipe, learner, plan, problems)
    if mixed:
        _check_mixed(recipe, learner, problems)
    clip, optimizer, scheduler = _outer(recipe, learner, problems)
    raise_problems(problems)
    return Experiment(
        recipe=recipe,
        source=source,
        learner=learner,
        clip=clip,
        optimizer=optimizer,
        scheduler=scheduler,
        tasks_per_step=recipe.at("outer.tasks_per_step"),
        steps_per_epoch=recipe.at("outer.steps_per_epoch"),
        epochs=recipe.at("outer.epochs"),
        evaluation=plan,
        device=found,
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
    recipe: Recipe, given: str | torch.device | None, problems: list[Problem]
) -> torch.device:
    """The recipe's device, or what is given in its place; a problem where it is not here."""
    try:
        return find_device(str(given or recipe.at("hardware.device")))
    except ValueError as error:
        place, path = recipe.place("hardware.device"), "hardware.device"
        if given:
            place, path = Place(f"--device {given}"), ""
        problems.append(Problem(place, path, str(error)))
        return torch.device("cpu")


def _blocks(
    recipe: Recipe, device: torch.device, data: str | Path | None, problems: list[Problem]
) -> tuple[TaskSource, dict[str, Any]]:
    """Task source, and every other block up to the learner by its path."""
    source: Any = None
    blocks: dict[str, Any] = {}
    for path, slot in block_paths(recipe):
        context: dict[str, Any] = {}
        if slot.name in NEED_THE_LEARNER:
            continue
        if slot.name == "tasks":
            context = {"seed": recipe.at("seed"), "device": device, "data": data}
            source = construct(recipe, path, slot, context, problems)
            if source is INVALID:
                raise_problems(problems)
            continue
        if slot.name == "model":
            context = {"input_shape": source.input_shape, "outputs": source.outputs}
        if slot.name == "surgery":
            raise_problems(problems)
            context = {"model": blocks["model"], "steps": recipe.at("inner.steps")}
        block = construct(recipe, path, slot, context, problems)
        blocks["model" if slot.name == "surgery" else path] = block
    return source, blocks


def _learner(recipe: Recipe, blocks: dict[str, Any], loss: Any) -> MetaLearner:
    rules = [block for path, block in blocks.items() if path.startswith("inner.rule[")]
    try:
        return MetaLearner(
            blocks["model"],
            loss=loss,
            steps=recipe.at("inner.steps"),
            rule=_chained(rules),
            order=blocks["inner.order"],
            step_loss=blocks["outer.step_loss"],
            adapt=recipe.at("inner.adapt"),
            estimator=blocks["outer.estimator"],
            executor=blocks["hardware.executor"],
        )
    except MetablocksError as error:
        raise RecipeError(str(_locate(recipe, blocks, error))) from error
    except Exception as error:  # no memory for what a rule sets up; a block of one's own
        message = f"the learner could not be set up: {type(error).__name__}: {first_line(error)}"
        problem = Problem(recipe.written_place("inner"), "inner", message)
        raise RecipeError(str(problem)) from error


def _chained(rules: list[UpdateRule]) -> UpdateRule:
    return rules[0] if len(rules) == 1 else Chain(*rules)


def _locate(recipe: Recipe, blocks: dict[str, Any], error: MetablocksError) -> Problem:
    """Which part of the recipe a learner's refusal is about."""
    message = str(error)
    for path, block in blocks.items():
        if re.search(rf"\b{type(block).__name__}\b", message):
            return problem_at(recipe, path, message, list(_fields(recipe, path)))
    kinds = {
        SelectionError: "inner.adapt",
        RuleError: "inner.rule",
        ModuleError: "model",
        ExecutorError: "hardware.executor",
    }
    path = next((path for kind, path in kinds.items() if isinstance(error, kind)), "inner")
    return Problem(recipe.written_place(path), path, message)


def _fields(recipe: Recipe, path: str) -> list[str]:
    start = f"{path}."
    return [key.removeprefix(start) for key in recipe.places if key.startswith(start)]


def _check_rule(recipe: Recipe, learner: MetaLearner) -> None:
    """What a rule learns must have a step to learn from."""
    learned = [name for name, p in learner.rule.named_parameters() if p.requires_grad]
    if learned and not learner.steps:
        message = (
            f"0, but the rule learns {learned[0]}{', …' * (len(learned) > 1)}, which no loss depends on "
            "without an inner step; take 1 or more, or a rule that learns nothing"
        )
        problem = Problem(recipe.written_place("inner.steps"), "inner.steps", message)
        raise_problems([problem])


def _check_evaluation(
    recipe: Recipe, learner: MetaLearner, plan: EvaluationPlan, problems: list[Problem]
) -> None:
    if learner.max_steps is not None and plan.inner_steps > learner.max_steps:
        path = "evaluation.inner_steps"
        message = (
            f"{plan.inner_steps}, but a per-step block of this recipe is made for "
            f"{learner.max_steps} (inner.steps); take at most {learner.max_steps}, or give the block "
            "beyond: last, to go on with its last row"
        )
        problems.append(Problem(recipe.written_place(path), path, message))


def _check_mixed(recipe: Recipe, learner: MetaLearner, problems: list[Problem]) -> None:
    """PyTorch's vmap has no derivative of batch norm under autocast."""
    norms = [
        n for n, m in learner.model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    if norms and isinstance(learner.executor, Vmap):
        path = "hardware.executor"
        message = (
            f"vmap does not run batch norm ({norms[0]}) in bfloat16; take the block loop or auto, "
            "or precision: float32"
        )
        problems.append(Problem(recipe.written_place(path), path, message))


def _outer(
    recipe: Recipe, learner: MetaLearner, problems: list[Problem]
) -> tuple[Clip | None, Optimizer, LRScheduler | None]:
    context: dict[str, Any] = {
        "parameters": list(learner.named_parameters()),
        "epochs": recipe.at("outer.epochs"),
    }
    made: dict[str, Any] = {"clip": None}
    for path, slot in block_paths(recipe):
        if slot.name in NEED_THE_LEARNER:
            made[slot.name] = construct(recipe, path, slot, context | made, problems)
            raise_problems(problems)
    return made["clip"], made["optimizer"], made["schedule"]
