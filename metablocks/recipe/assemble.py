"""Blocks from a resolved recipe; what a constructor refuses becomes a problem with its place.

`assemble` makes them: on the meta device to try a recipe, on the device of a run to train it.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from metablocks.checks import Blocks
from metablocks.errors import DataError, MetablocksError, first_line
from metablocks.recipe import schema
from metablocks.recipe.layout import slot_of, slot_paths
from metablocks.recipe.parse import Problem, join
from metablocks.recipe.record import Recipe
from metablocks.recipe.schema import within
from metablocks.recipe.slots import SLOTS, Slot, find
from metablocks.tasks.base import example_shapes

_OF_TASKS = ("input_shape", "outputs", "kind")
"""The attributes of a task source that other blocks are made by."""


def assemble(
    recipe: Recipe,
    problems: list[Problem],
    given: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
    *,
    trial: bool = False,
) -> dict[str, Any]:
    """The blocks of the recipe by their paths, the model as surgery leaves it; `made` are there already.

    A block is made of what is `given` and of what blocks before it give to it, and left out if a part
    of its slot's context is missing, or it has a problem. In a `trial` the model is made on the meta
    device, of no cost; one from outside, which need not run there, is left out. Appends to `problems`
    what constructors refuse. Raises `DataError` for a folder of data without the data.
    """
    wrong = [problem.path for problem in problems]
    steps = recipe.at("inner.steps")
    context = {**given} if steps is None else {"steps": steps, **given}
    blocks = dict(made or {})
    for path, slot in block_paths(recipe):
        ready = path not in blocks and context.keys() >= set(slot.context)
        if not ready or any(within(other, path) for other in wrong):
            continue
        if trial and slot.name == "model" and ":" in recipe.at(path)["block"]:
            continue
        key, name = ("model", "model") if slot.name == "surgery" else (path, slot.name)
        with torch.device("meta") if trial and key == "model" else nullcontext():
            blocks[key] = context[name] = construct(recipe, path, slot, context, problems)
        if blocks[key] is schema.INVALID:
            del blocks[key], context[name]
        elif slot.name == "tasks":
            context |= {name: getattr(blocks[key], name) for name in _OF_TASKS}
    return blocks


def try_blocks(recipe: Recipe, problems: list[Problem]) -> None:
    """Assemble the blocks that are clean so far, and pass inputs through the model, at no cost.

    The inputs are the tasks'; blocks from outside take and give what they will.
    """
    with torch.random.fork_rng(devices=[]):
        given = {"seed": recipe.at("seed") or 0, "device": torch.device("cpu"), "data": None}
        made = assemble(recipe, problems, given, trial=True)
        paths = [path for path, slot in block_paths(recipe) if slot.name in ("model", "surgery")]
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
            wrong = "" if _asks_for_numbers(error) else f"does not run: {first_line(error)}"
    if wrong:
        message = (
            f"the model that {name} leaves {wrong}; the tasks have inputs of shape {inputs} and "
            f"outputs of shape {outputs}"
        )
        problems.append(recipe.problem(paths[-1], message))


def construct(
    recipe: Recipe, path: str, slot: Slot, context: Mapping[str, Any], problems: list[Problem]
) -> Any:
    """The block at `path`, or `schema.INVALID` after appending what is wrong.

    Of `context` the block gets what its slot supplies and its signature names.
    Raises `DataError` for a task source without the data in the folder it is given. A model that cannot
    be made on the meta device is `schema.INVALID` there, and nothing is wrong with it.
    """
    entry = recipe.at(path)
    name = entry["block"]
    target = find(slot, name, recipe.allow)
    known = schema.fields(target, slot.context)
    arguments = schema.arguments(known, entry)
    for field in known.values():
        if mark := slot_of(field.annotation):
            held = _held(recipe, join(path, field.name), mark, context, problems)
            if held is schema.INVALID:
                return held
            arguments[field.name] = held
    try:
        supplied = {name: context[name] for name in slot.context if name in context}
        block = target(**arguments, **schema.supplied(target, supplied))
        fits = fits_slot(block, slot)
    except DataError:
        raise
    except Exception as error:
        if torch.empty(0).is_meta and _asks_for_numbers(error):
            return schema.INVALID
        message = f"{name} could not be made: {type(error).__name__}: {first_line(error)}"
        if isinstance(error, MetablocksError):
            message = str(error)
            path = join(path, error.field) if error.field in arguments else path
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


def _asks_for_numbers(error: Exception) -> bool:
    """True for the error of a model that asks for a number on the meta device, which has none."""
    return "meta tensor" in str(error)


def _held(
    recipe: Recipe, path: str, mark: Blocks, context: Mapping[str, Any], problems: list[Problem]
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
