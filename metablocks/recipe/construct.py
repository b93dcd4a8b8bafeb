"""Blocks from a resolved recipe; what a constructor refuses becomes a problem with its place."""

import inspect
import re
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from metablocks.errors import DataError, MetablocksError, first_line
from metablocks.recipe import schema
from metablocks.recipe.layout import ManyBlocks, slot_paths
from metablocks.recipe.parse import Place, Problem, join, to_node
from metablocks.recipe.record import Recipe
from metablocks.recipe.slots import SLOTS, Slot, find

NEED_THE_LEARNER = ("clip", "optimizer", "schedule")


def construct(
    recipe: Recipe, path: str, slot: Slot, context: dict[str, Any], problems: list[Problem]
) -> Any:
    """The block at `path`, or `schema.INVALID` after appending what is wrong.

    `context` is what the builder supplies; the block gets the part that its signature names.
    Raises `DataError` where a task source misses the data folder it was given.
    """
    entry = recipe.at(path)
    name = entry["block"]
    target = find(slot, name, recipe.allow)
    known = schema.fields(target, slot.context)
    arguments = {
        field: schema.check(to_node(value, Place("")), known[field].annotation, field, [])
        for field, value in entry.items()
        if field != "block"
    }
    try:
        block = target(**arguments, **schema.supplied(target, context))
        fits = fits_slot(block, slot)
    except DataError:
        raise
    except MetablocksError as error:
        problems.append(problem_at(recipe, path, str(error), arguments))
        return schema.INVALID
    except Exception as error:
        kind = type(error).__name__
        message = f"{name} could not be made: {kind}: {first_line(error)}"
        problems.append(problem_at(recipe, path, message, arguments))
        return schema.INVALID
    if not fits:
        given = type(block)
        needed = getattr(slot.type, "__qualname__", str(slot.type))
        module = getattr(slot.type, "__module__", "")
        message = (
            f"{name} gives a {given.__module__}.{given.__qualname__}; "
            f"the {slot.name} slot takes a {module}.{needed}"
        )
        problems.append(Problem(recipe.written_place(join(path, "block")), path, message))
        return schema.INVALID
    return block


def fits_slot(block: Any, slot: Slot) -> bool:
    """Whether a block is of its slot's type.

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


def problem_at(recipe: Recipe, path: str, message: str, fields: Iterable[str]) -> Problem:
    """A problem of the block at `path`, pointed at the field that the message names first."""
    matches = [(re.search(rf"\b{re.escape(name)}\b", message), name) for name in fields]
    named = [(match.start(), name) for match, name in matches if match]
    if named:
        path = join(path, min(named)[1])
    return Problem(recipe.written_place(path), path, message)


def try_blocks(recipe: Recipe, problems: list[Problem]) -> None:
    """Construct the blocks that are clean so far, to find values that their constructors refuse.

    The model is made on the meta device, of no cost. What needs the learner's parameters waits.
    """
    wrong = [problem.path for problem in problems]
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for path, slot in block_paths(recipe):
            if slot.name in NEED_THE_LEARNER or any(_within(other, path) for other in wrong):
                continue
            context: dict[str, Any] = {}
            if slot.name == "tasks":
                seed = recipe.values.get("seed", 0)
                context = {"seed": seed, "device": torch.device("cpu"), "data": None}
            if slot.name == "model":
                source = made.get("tasks", schema.INVALID)
                if source is schema.INVALID or ":" in recipe.at(path)["block"]:
                    continue
                context = {"input_shape": source.input_shape, "outputs": source.outputs}
            if slot.name == "surgery":
                steps = recipe.values.get("inner", {}).get("steps")
                if made.get("model", schema.INVALID) is schema.INVALID or steps is None:
                    continue
                context = {"model": made["model"], "steps": steps}
            on_model = slot.name in ("model", "surgery")
            with torch.device("meta") if on_model else nullcontext():
                block = construct(recipe, path, slot, context, problems)
            made["model" if on_model else slot.name] = block
        if all(made.get(name, schema.INVALID) is not schema.INVALID for name in ("tasks", "model")):
            _try_model(recipe, made["tasks"], made["model"], problems)


def _try_model(recipe: Recipe, source: Any, model: Any, problems: list[Problem]) -> None:
    """One pass through the model as surgery has left it: from the tasks' inputs to their outputs.

    What blocks from outside take and give is their own.
    """
    blocks = [path for path, slot in block_paths(recipe) if slot.name in ("model", "surgery")]
    if any(":" in recipe.at(f"{path}.block") for path in ("tasks", *blocks)):
        return
    inputs, name = source.input_shape, recipe.at(f"{blocks[-1]}.block")
    try:
        given = tuple(model(torch.zeros(2, *inputs, device="meta")).shape[1:])
        wrong = f"gives outputs of shape {given}" if given != (source.outputs,) else None
    except RuntimeError as error:
        wrong = f"does not run: {first_line(error)}"
    if wrong:
        message = (
            f"the model that {name} leaves {wrong}; the tasks have inputs of shape {inputs} and "
            f"outputs of shape {(source.outputs,)}"
        )
        problems.append(problem_at(recipe, blocks[-1], message, ()))


def block_paths(recipe: Recipe) -> list[tuple[str, Slot]]:
    """Every block of the recipe in the layout's order: its path and its slot."""
    found: list[tuple[str, Slot]] = []
    for path, mark in slot_paths().items():
        value = recipe.at(path)
        if value is None:
            continue
        slot = SLOTS[mark.slot]
        if isinstance(mark, ManyBlocks):
            found += [(join(path, index), slot) for index in range(len(value))]
        else:
            found.append((path, slot))
    return found


def _within(path: str, block: str) -> bool:
    return path.startswith(block) and path[len(block) :][:1] in ("", ".", "[")
