"""The model that a learner leaves for deployment: plain, and often smaller than what was trained.

    reduce(adapt(θ)) = adapt(θ)        equal predictions, fewer parameters
    adapt(reduce(θ)) ≠ adapt(θ)        the same function to start from, which adapts otherwise

What `learner.adapt` returns needs nothing of the rule any more, so learned rates and gradient
transforms (KFO, Meta-Curvature) stay behind. Layers that are there for adaptation alone are taken
out of it: a low-rank update is added to its layer's weight, a T folded into the layer in front of
it, appended linear layers are collapsed into the last one. Taken out before adaptation, they take
the learned preconditioner with them, and the scores of that order show it. Source: Hu et al. 2021
(LoRA); Lee, Choi 2018 (T-net); Arnold, Iqbal, Sha 2021 (LinNet).
"""

import copy
import glob
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from metablocks.adapted import fixed_at_step
from metablocks.errors import BlockError, MetablocksError
from metablocks.functional import module_arguments
from metablocks.learner import MetaLearner
from metablocks.models import collapse_linear, fold_lora, fold_tnet
from metablocks.models.linnet import DeepLinear
from metablocks.models.lora import LowRank
from metablocks.models.tnet import Transformed
from metablocks.recipe import Experiment
from metablocks.recipe.build import build_rule
from metablocks.runs.scores import Scores, difference, plain
from metablocks.runs.train import final_scores
from metablocks.tasks.base import Split
from metablocks.types import relative_error

CHECKED_TASKS = 4
"""On how many tasks, at most, predictions are compared."""

_REDUCTIONS: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    LowRank: fold_lora,  # first, since its updates may be of the layers below
    Transformed: fold_tnet,
    DeepLinear: collapse_linear,
}
"""Layers that are there for adaptation alone, and what takes them out."""


@dataclass(frozen=True)
class ReducedFirst:
    """Scores of the model reduced before adaptation, by the same rule and steps.

    `change` is its final score less the learner's, the mean over tasks, and `interval` half the width
    of the 95 % confidence interval of that mean, nan with one task (see `difference`).
    """

    scores: Scores
    change: float
    interval: float

    @property
    def verdict(self) -> str:
        """The change in words: none is measurable if 0 is in its interval, or with one task."""
        if self.scores.tasks == 1 or not abs(self.change) > self.interval:
            return "no measurable difference"
        better = (self.change > 0) == (self.scores.measure == "accuracy")
        return f"measurably {'better' if better else 'worse'}"


@dataclass(frozen=True)
class Deployment:
    """Sizes of a learner and of what it leaves, and what comes of the two orders of reduction.

    Law: adapted, then reduced is adapted: `difference` is rounding, 1e-12 at the most.
    """

    meta_parameters: int
    """All that the outer loop learns, the rule's included."""
    parameters: int
    """Of the adapted model."""
    reduced_parameters: int
    """Of the adapted model after `reductions`."""
    reductions: list[str] = field(default_factory=list)
    """Names of the functions that take layers out, in order; none where nothing is to be reduced."""
    tasks: int = 0
    """The number of tasks that `difference` is over."""
    difference: float | None = None
    """‖reduced − adapted‖ / ‖adapted‖ of the query predictions, in float64: the largest over tasks."""
    reduced_first: ReducedFirst | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """The reasons of numbers that are missing, by their names."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return plain(self)


def deployment(experiment: Experiment, scores: Scores) -> Deployment | None:
    """The deployable model's size and scores; None if that is the meta-parameters as they stand.

    `scores` are the learner's, by task: reduced first, it is judged on the same tasks after as many
    steps. If there is nothing to reduce, parameters are counted, no more.

    Raises nothing for a model or a rule that cannot be compared: `left_out` has the reason.
    """
    adapted = fixed_at_step(copy.deepcopy(experiment.learner.model), 0)
    meta = sum(p.numel() for p in experiment.learner.learned.values())
    sizes = (meta, _count(adapted), _count(reduce(adapted)))
    found = [take_out.__name__ for take_out in _found(adapted)]
    if not found:
        return Deployment(*sizes) if meta != sizes[1] else None
    split, count, steps = scores.split, scores.tasks, len(scores.mean) - 1
    tasks = min(CHECKED_TASKS, count)

    def reduce_first() -> ReducedFirst:
        first = replace(experiment, learner=reduced_learner(experiment))
        reduced = final_scores(first, split, tasks=count, steps=steps)
        change = difference(reduced, scores)
        return ReducedFirst(reduced, change.final, change.interval[-1])

    numbers, left_out = dict[str, Any](), dict[str, str]()
    wanted: dict[str, Callable[[], object]] = {
        "difference": partial(reduction_error, experiment, split, tasks, steps),
        "reduced_first": reduce_first,
    }
    for name, compute in wanted.items():
        try:
            numbers[name] = compute()
        except (
            Exception
        ) as error:  # beyond what a run is for: no model or rule may end it over them
            stated = isinstance(error, MetablocksError)
            left_out[name] = str(error) if stated else f"{type(error).__name__}: {error}"
    return Deployment(*sizes, reductions=found, tasks=tasks, left_out=left_out, **numbers)


def reduce(model: nn.Module) -> nn.Module:
    """The model without layers that are there for adaptation alone: the same function.

    Every low-rank update is added to its layer's weight, every T folded into its layer, every appended
    layer collapsed into the one before. A model without such layers is returned as it is.

    >>> from metablocks.models import append_linear, insert_tnet
    >>> reduce(append_linear(insert_tnet(nn.Sequential(nn.Linear(3, 2))), depth=2, features=2))
    Sequential(
      (model): Sequential(
        (0): Linear(in_features=3, out_features=2, bias=True)
      )
      (linear): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    for take_out in _found(model):
        model = take_out(model)
    return model


def reduction_error(experiment: Experiment, split: Split, tasks: int, steps: int) -> float:
    """‖reduce(adapted) − adapted‖ / ‖adapted‖ of the query predictions, the largest over tasks.

    Adapted and predicted in float64 on the CPU, in a copy of the learner.
    """
    precise = copy.deepcopy(experiment.learner).to("cpu", torch.float64)
    some = experiment.source.sample(split, range(tasks)).to("cpu").to(torch.float64)
    errors = []
    for task in (some[index] for index in range(len(some))):
        adapted = precise.adapt(task.support, steps=steps)
        args, kwargs = module_arguments(precise.batches.query(task.query, steps)[0])
        with torch.no_grad():
            expected, got = adapted(*args, **kwargs), reduce(adapted)(*args, **kwargs)
        errors.append(relative_error({"": got}, {"": expected}))
    return max(errors)


def reduced_learner(experiment: Experiment) -> MetaLearner:
    """The experiment's learner, its model reduced before it ever adapts; all else as trained.

    What adapted goes on adapting, as far as it is still there, and the rule keeps what it has learned
    for that: rates, transforms, masks. What it has learned for layers that are gone, goes.

    Raises `BlockError` where nothing that adapts is left, and where what the rule has learned does
    not fit the reduced model.
    """
    learner = experiment.learner
    model = reduce(learner.model)
    before = dict(learner.model.named_parameters(remove_duplicate=False))
    moving = {id(before[name]) for name in learner.adapted}
    adapt = [
        glob.escape(name)
        for name, _ in model.named_parameters(remove_duplicate=False)
        if id(before[name]) in moving
    ]
    if not adapt:
        raise BlockError("only layers that are taken out adapt")
    reduced = MetaLearner(
        model,
        loss=learner.loss,
        support_loss=learner.support_loss,
        steps=learner.steps,
        start=learner.start,
        batches=learner.batches,
        rule=build_rule(experiment.recipe),
        order=learner.order,
        step_loss=learner.step_loss,
        adapt=adapt,
        norm_statistics=learner.norm_statistics,
        estimator=learner.estimator,
        executor=learner.executor,
    ).to(experiment.device, experiment.dtype)
    trained, fresh = learner.rule.state_dict(), reduced.rule.state_dict()
    for name, tensor in fresh.items():
        if name not in trained or trained[name].shape != tensor.shape:
            shape = list(trained[name].shape) if name in trained else "not"
            raise BlockError(
                f"what the rule has learned does not fit the reduced model: {name} is {shape} there "
                f"and {list(tensor.shape)} here"
            )
    reduced.rule.load_state_dict({name: trained[name] for name in fresh})
    return reduced


def _found(model: nn.Module) -> list[Callable[[nn.Module], nn.Module]]:
    """The reductions that a model has layers for."""
    members = list(model.modules())
    return [
        take_out
        for layer, take_out in _REDUCTIONS.items()
        if any(isinstance(module, layer) for module in members)
    ]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
