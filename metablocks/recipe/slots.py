"""The slots of a recipe, each with one literal table: short name to block.

A block is a class or function; its keyword parameters are its recipe fields, except those that the
builder supplies (`context`). Nothing registers itself: what is not in a table is reached by its
path, `my_pkg.my_module:MyRule`, from packages that the user allowed.
"""

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metablocks import batches, estimators, executors, models, order, start, step_loss, tasks
from metablocks.errors import RecipeError, suggest, suggest_then
from metablocks.losses import LOSSES
from metablocks.recipe import outer
from metablocks.rules import RULES, UpdateRule
from metablocks.tasks.episodes import MapDataset
from metablocks.tasks.torchvision_sets import DATASETS
from metablocks.tasks.transforms import TRANSFORMS
from metablocks.tuning import AutoExecutor


@dataclass(frozen=True)
class Slot:
    """One axis of a recipe: what it answers, its blocks, its type.

    `context`: parameters that are no fields of a recipe, supplied by the builder or by code alone.
    """

    name: str
    question: str
    blocks: dict[str, Callable[..., Any]]
    type: Any
    context: tuple[str, ...] = ()


SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot(
            "tasks",
            "what is learned from",
            {
                "sinusoid": tasks.Sinusoid,
                "linear": tasks.Linear,
                "logistic": tasks.Logistic,
                "strokes": tasks.Strokes,
                "text": tasks.Text,
                "omniglot": tasks.Omniglot,
                "mini_imagenet": tasks.MiniImagenet,
                "tiered_imagenet": tasks.TieredImagenet,
                "cifar_fs": tasks.CifarFS,
                "cub": tasks.CUB,
                "folders": tasks.Folders,
                "classes": tasks.Classes,
                "episodes": tasks.Episodes,
                "mix": tasks.Mix,
                "by_split": tasks.BySplit,
            },
            tasks.TaskSource,
            ("seed", "device", "data"),
        ),
        Slot(
            "model",
            "what is learned",
            {
                "conv4": models.Conv4,
                "mlp": models.MLP,
                "torchvision": models.torchvision_classifier,
                "huggingface": models.huggingface_model,
                "transformer": models.Transformer,
                "gru": models.GRU,
            },
            nn.Module,
            ("input_shape", "outputs"),
        ),
        Slot(
            "surgery",
            "how the model is changed before it is learned, one block after another",
            {
                "per_step_batch_norm": models.per_step_batch_norm,
                "insert_tnet": models.insert_tnet,
                "append_linear": models.append_linear,
                "insert_lora": models.insert_lora,
            },
            nn.Module,
            ("model", "steps"),
        ),
        Slot(
            "batches",
            "which examples each inner step sees",
            {
                "full_batch": batches.FullBatch,
                "minibatches": batches.Minibatches,
                "stream": batches.Stream,
            },
            batches.Batches,
        ),
        Slot(
            "start",
            "which fast weights a task begins with",
            {
                "as_learned": start.AsLearned,
                "fixed": start.Fixed,
                "zeros": start.Zeros,
                "zero_head": start.ZeroHead,
                "prototypes": start.Prototypes,
            },
            start.Start,
        ),
        Slot("rule", "how a gradient becomes an update", RULES, UpdateRule),
        Slot(
            "support_loss",
            "what the inner steps descend, in place of the tasks' own loss",
            LOSSES,
            Callable,
            ("outputs", "kind"),
        ),
        Slot(
            "order",
            "through which steps the meta-gradient looks",
            {
                "second_order": order.SecondOrder,
                "first_order": order.FirstOrder,
                "truncated": order.TruncatedOrder,
                "annealed": order.AnnealedOrder,
            },
            order.Order,
        ),
        Slot(
            "step_loss",
            "which steps' query losses count",
            {
                "final": step_loss.FinalStepLoss,
                "uniform": step_loss.UniformStepLoss,
                "annealed": step_loss.AnnealedStepLoss,
            },
            step_loss.StepLoss,
        ),
        Slot(
            "estimator",
            "how the meta-gradient is computed",
            {
                "unrolled": estimators.Unrolled,
                "adjoint": estimators.Adjoint,
                "reptile": estimators.Reptile,
                "implicit": estimators.Implicit,
            },
            estimators.Estimator,
        ),
        Slot(
            "clip",
            "how far the meta-gradient may go, before the optimiser takes it",
            {"value": outer.ClipValue, "norm": outer.ClipNorm},
            outer.Clip,
            ("parameters",),
        ),
        Slot(
            "optimizer",
            "how the meta-parameters move",
            {"adam": outer.adam, "adamw": outer.adamw, "sgd": outer.sgd},
            Optimizer,
            ("parameters",),
        ),
        Slot(
            "schedule",
            "how the meta rate changes with the epoch",
            {"constant": outer.constant, "cosine": outer.cosine, "linear": outer.linear},
            LRScheduler | None,
            ("optimizer", "epochs"),
        ),
        Slot(
            "executor",
            "how tasks are spread over the hardware",
            {"loop": executors.Loop, "vmap": executors.Vmap, "auto": AutoExecutor},
            executors.Executor,
        ),
        Slot(
            "transform",
            "how inputs of support or query are changed when they are drawn",
            TRANSFORMS,
            Callable,
        ),
        Slot(
            "dataset",
            "where the source episodes has its inputs and labels from",
            DATASETS,
            MapDataset,
        ),
    )
}
"""The slots by name, in the order of a recipe."""

MOVED: dict[tuple[str, str], str] = {
    ("Reptile", "batch"): "inner.batches: {block: minibatches, size: …}",
}
"""Fields that blocks had, by the block's own name and the field, and what says it now."""


def find(slot: Slot, name: str, allow: Collection[str] = ()) -> Callable[..., Any]:
    """The block that `name` means in a slot: a short name, or `package.module:Name`.

    Raises `RecipeError` for a name that is not in the table, a package that is not allowed, and a
    path that leads to nothing callable.

    Law: a class or function from outside was written in a package of `allow`. A module also reaches
    what it imports (`my_pkg:os.system`), which who allows that package has not allowed.

    >>> find(SLOTS["order"], "truncated").__name__
    'TruncatedOrder'
    """
    if ":" in name:
        return _outside(name, allow)
    if name not in slot.blocks:
        there_are = (
            f"there are: {', '.join(slot.blocks)}, and package.module:Name with --allow package"
        )
        raise RecipeError(
            f'no {slot.name} block is called "{name}"{suggest_then(name, slot.blocks, there_are)}'
        )
    return slot.blocks[name]


def import_block(name: str) -> Callable[..., Any]:
    """The class or function at `package.module:Name`, wherever it was written. Runs its module.

    For names that the user typed; those of a recipe go through `find`. Raises `RecipeError` for a
    module that cannot be imported, and a path that leads to nothing callable.
    """
    found: Callable[..., Any] = _follow(name)[-1]
    return found


def _outside(name: str, allow: Collection[str]) -> Callable[..., Any]:
    module_name, package = _module(name), name.partition(":")[0].partition(".")[0]
    if not _is_allowed(module_name, allow):
        raise RecipeError(
            f'"{name}" is code from outside metablocks, which a recipe may not run by itself; '
            f"to run it, allow it: --allow {package}"
        )
    objects = _follow(name)
    for home in filter(None, map(_home, objects)):
        if not _is_allowed(home, allow):
            raise RecipeError(
                f'"{name}" is code of "{home}", which "{module_name}" only imports; '
                f"to run it, allow that too: --allow {home.partition('.')[0]}"
            )
    found: Callable[..., Any] = objects[-1]
    return found


def _module(name: str) -> str:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise RecipeError(f'"{name}" is no path to a block; it takes package.module:Name')
    return module_name


def _is_allowed(module_name: str, allow: Collection[str]) -> bool:
    return any(module_name == a or module_name.startswith(f"{a}.") for a in allow)


def _follow(name: str) -> list[Any]:
    """The objects on a path, from behind its module to the callable that it leads to."""
    module_name, attribute = _module(name), name.partition(":")[2]
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:
        kind = type(error).__name__
        raise RecipeError(f'importing "{module_name}" failed: {kind}: {error}') from error
    objects = []
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = suggest(part, dir(target))
            raise RecipeError(f'"{module_name}" has no "{attribute}"{near}')
        target = getattr(target, part)
        objects.append(target)
    if not callable(target):
        raise RecipeError(f'"{name}" is a {type(target).__name__}; it takes a class or function')
    return objects


def _home(target: Any) -> str | None:
    """The module that a module, class or function is written in; None for objects that were made."""
    if isinstance(target, ModuleType):
        return target.__name__
    module = getattr(target, "__module__", None) if hasattr(target, "__qualname__") else None
    return module if isinstance(module, str) else None
