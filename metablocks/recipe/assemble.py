"""Blocks from a resolved recipe; what a constructor refuses becomes a problem with its place.

`assemble` makes them: on the meta device to try a recipe, on the device of a run to train it.
"""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from metablocks.checks import Blocks
from metablocks.errors import DataError, MetablocksError, first_line
from metablocks.recipe import schema
from metablocks.recipe.layout import slot_of, slot_paths
from metablocks.recipe.parse import Problem, join
from metablocks.recipe.record import Recipe
from metablocks.recipe.schema import within
from metablocks.recipe.slots import MODEL, SLOTS, SUPPORT_LOSS, SURGERY, TASKS, Slot, find
from metablocks.tasks.base import example_shapes

NEED_THE_LEARNER = ("clip", "optimizer", "schedule")


def assemble(
    recipe: Recipe,
    problems: list[Problem],
    *,
    device: torch.device | None = None,
    data: str | Path | None = None,
    task_seed: int | None = None,
) -> dict[str, Any]:
    """The blocks up to the learner by their paths, the model as surgery leaves it.

    Without `device` the model is made on the meta device, of no cost; blocks with a problem, and a
    model from outside, which need not run there, are left out. Appends to `problems` what constructors
    refuse. Raises `DataError` for a `data` folder without the data.
    """
    trial = device is None
    wrong = [problem.path for problem in problems]
    blocks: dict[str, Any] = {}
    for path, slot in block_paths(recipe):
        if slot.name in NEED_THE_LEARNER or any(within(other, path) for other in wrong):
            continue
        key, context = path, dict[str, Any]()
        if slot is TASKS:
            seed = (recipe.at("seed") or 0) if task_seed is None else task_seed
            context = {"seed": seed, "device": device or torch.device("cpu"), "data": data}
        elif slot is MODEL:
            source = blocks.get("tasks")
            if source is None or (trial and ":" in recipe.at(path)["block"]):
                continue
            context = {"input_shape": source.input_shape, "outputs": source.outputs}
        elif slot is SURGERY:
            key, steps = "model", recipe.at("inner.steps")
            if key not in blocks or steps is None:
                continue
            context = {"model": blocks[key], "steps": steps}
        elif slot is SUPPORT_LOSS:
            if "tasks" not in blocks:
                continue
            context = {"outputs": blocks["tasks"].outputs, "kind": blocks["tasks"].kind}
        with torch.device("meta") if trial and key == "model" else nullcontext():
            blocks[key] = construct(recipe, path, slot, context, problems)
        if blocks[key] is schema.INVALID:
            del blocks[key]
    return blocks


def try_blocks(recipe: Recipe, problems: list[Problem]) -> None:
    """Assemble the blocks that are clean so far, and pass inputs through the model, at no cost.

    The inputs are the tasks'; blocks from outside take and give what they will.
    """
    with torch.random.fork_rng(devices=[]):
        made = assemble(recipe, problems)
        paths = [path for path, slot in block_paths(recipe) if slot in (MODEL, SURGERY)]
        if not {"tasks", "model"} <= set(made) or any(
            within(problem.path, "surgery") for problem in problems
        ):
            return
        if any(":" in recipe.at(f"{path}.block") for path in ("tasks", *paths)):
            return
        inputs, dtype, outputs = example_shapes(made["tasks"])
        name = recipe.at(f"{paths[-1]}.block")
        try:
            output = made["model"](torch.zeros(2, *inputs, dtype=dtype, device="meta"))
            wrong = f"gives a {type(output).__name__}, not a tensor"
            if isinstance(output, torch.Tensor):
                shape = tuple(output.shape[1:])
                wrong = "" if shape == outputs else f"gives outputs of shape {shape}"
        except Exception as error:  # a model of another package may raise what it likes
            wrong = "" if "meta tensor" in str(error) else f"does not run: {first_line(error)}"
    if wrong:
        message = (
            f"the model that {name} leaves {wrong}; the tasks have inputs of shape {inputs} and "
            f"outputs of shape {outputs}"
        )
        problems.append(recipe.problem(paths[-1], message))


def construct(
    recipe: Recipe, path: str, slot: Slot, context: dict[str, Any], problems: list[Problem]
) -> Any:
    """The block at `path`, or `schema.INVALID` after appending what is wrong.

    `context` is what the builder supplies; the block gets the part that its signature names.
    Raises `DataError` for a task source without the data in the folder it is given. A model that cannot
    be made on the meta device is `schema.INVALID` there, and nothing is wrong with it.
    """
    entry = recipe.at(path)
    name = entry["block"]
    target = find(slot, name, recipe.allow)
    arguments = schema.arguments(target, slot.context, entry)
    for parameter in schema.fields(target, slot.context).values():
        if mark := slot_of(parameter.annotation):
            held = _held(recipe, join(path, parameter.name), mark, context, problems)
            if held is schema.INVALID:
                return held
            arguments[parameter.name] = held
    try:
        block = target(**arguments, **schema.supplied(target, context))
        fits = fits_slot(block, slot)
    except DataError:
        raise
    except MetablocksError as error:
        if _looks_at_numbers(error):
            return schema.INVALID
        field = error.field or ""
        at = join(path, field) if field in arguments else path
        problems.append(recipe.problem(at, str(error)))
        return schema.INVALID
    except Exception as error:
        if _looks_at_numbers(error):
            return schema.INVALID
        message = f"{name} could not be made: {type(error).__name__}: {first_line(error)}"
        problems.append(recipe.problem(path, message))
        return schema.INVALID
    if not fits:
        kind = type(block)
        needed = getattr(slot.type, "__qualname__", str(slot.type))
        module = getattr(slot.type, "__module__", "")
        message = (
            f"{name} gives a {kind.__module__}.{kind.__qualname__}; "
            f"the {slot.name} slot takes a {module}.{needed}"
        )
        problems.append(Problem(recipe.written_place(join(path, "block")), path, message))
        return schema.INVALID
    return block


def _looks_at_numbers(error: Exception) -> bool:
    """True for the error of a model that asks for a number as it is made on the meta device."""
    return torch.empty(0).is_meta and "meta tensor" in str(error)


def _held(
    recipe: Recipe, path: str, mark: Blocks, context: dict[str, Any], problems: list[Problem]
) -> Any:
    """The block or blocks that another one holds at `path`."""
    slot = SLOTS[mark.slot]
    if mark.at_least is None:
        return construct(recipe, path, slot, context, problems)
    paths = [join(path, number) for number in range(len(recipe.at(path)))]
    blocks = [construct(recipe, below, slot, context, problems) for below in paths]
    return schema.INVALID if any(block is schema.INVALID for block in blocks) else blocks


def fits_slot(block: Any, slot: Slot) -> bool:
    """True if a block is of its slot's type.

    A protocol of one call says nothing at run time but "callable", so a callable must also take as
    many arguments, and not be a module or an optimiser.

    >>> from metablocks.order import SecondOrder
    >>> fits_slot(SecondOrder(), SLOTS["order"]), fits_slot(SecondOrder(), SLOTS["step_loss"])
    (True, False)
    """
    if isinstance(block, type) or not isinstance(block, slot.type):
        return False
    call = vars(slot.type).get("__call__") if isinstance(slot.type, type) else None
    if not getattr(slot.type, "_is_protocol", False) or call is None:
        return True
    if isinstance(block, torch.nn.Module | torch.optim.Optimizer):
        return False
    count = len(inspect.signature(call).parameters) - 1
    try:
        inspect.signature(block).bind(*[None] * count)
    except TypeError:
        return False
    return True


def block_paths(recipe: Recipe) -> list[tuple[str, Slot]]:
    """Every block of the recipe in the layout's order: its path and its slot."""
    blocks: list[tuple[str, Slot]] = []
    for path, mark in slot_paths().items():
        value = recipe.at(path)
        if value is None:
            continue
        slot = SLOTS[mark.slot]
        if mark.at_least is not None:
            blocks += [(join(path, index), slot) for index in range(len(value))]
        else:
            blocks.append((path, slot))
    return blocks
