"""Texts of the command about blocks and experiments, and the JSON schema, taken from the code itself."""

import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from metablocks.checks import Blocks
from metablocks.recipe import schema
from metablocks.recipe.build import Experiment
from metablocks.recipe.layout import (
    HardwareSection,
    InnerSection,
    OuterSection,
    RecipeLayout,
    slot_of,
)
from metablocks.recipe.load import Shipped
from metablocks.recipe.parse import show
from metablocks.recipe.slots import SLOTS, Slot
from metablocks.tasks.base import example_shapes


def blocks_text(slots: Iterable[Slot] = tuple(SLOTS.values())) -> str:
    """Every block of the slots: equation, source, and each field's type and default.

    >>> print(blocks_text([SLOTS["order"]]))  # doctest: +ELLIPSIS
    order: through which steps the meta-gradient looks
    <BLANKLINE>
      second_order (metablocks.order:SecondOrder)
          MAML: every step is differentiated through.
          Source: Finn, Abbeel, Levine 2017.
    ...
    """
    return "\n\n".join(_slot_text(slot) for slot in slots)


def shipped_text(recipes: Iterable[Shipped]) -> str:
    """One line a recipe: name, title, citation."""
    rows = list(recipes)
    width = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(
        f"{name:<{width[0]}}  {title:<{width[1]}}  {cite}".rstrip() for name, title, cite in rows
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors: sections, blocks by slot, fields with their defaults.

    It knows the shipped blocks; one from outside, `package.module:Name`, takes any fields.

    >>> recipe = json_schema()
    >>> recipe["$defs"]["InnerSection"]["properties"]["order"]
    {'$ref': '#/$defs/order'}
    >>> recipe["$defs"]["order"]["anyOf"][3]["properties"]["last"]
    {'minimum': 0, 'title': 'Last', 'type': 'integer'}
    """
    root = schema.adapter(schema.entry(RecipeLayout, section=True)).json_schema()
    definitions = root["$defs"]
    for layout in (RecipeLayout, InnerSection, OuterSection, HardwareSection):
        properties = definitions.get(layout.__name__, root)["properties"]
        for field in schema.fields(layout).values():
            if mark := slot_of(field.annotation):
                properties[field.name] = _slot_schema(mark, field.required)
    for slot in SLOTS.values():
        entries = [_block_schema(name, slot, definitions) for name in slot.blocks]
        outside = {
            "properties": {"block": {"type": "string", "pattern": ":"}},
            "required": ["block"],
        }
        definitions[slot.name] = {
            "description": slot.question,
            "anyOf": [{"enum": list(slot.blocks)}, *entries, {"type": "object", **outside}],
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def _slot_schema(mark: Blocks, required: bool) -> dict[str, Any]:
    block = {"$ref": f"#/$defs/{mark.slot}"}
    if mark.at_least is not None:
        return {"type": "array", "items": block, "minItems": mark.at_least}
    return block if required else {"anyOf": [block, {"type": "null"}]}


def _block_schema(name: str, slot: Slot, definitions: dict[str, Any]) -> dict[str, Any]:
    target, context = slot.blocks[name], slot.context
    block: dict[str, Any] = schema.adapter(schema.entry(target, context)).json_schema()
    definitions.update(block.pop("$defs", {}))
    block["properties"]["block"] = {"const": name}
    block["description"] = "\n\n".join(_about(target))
    for field in schema.fields(target, context).values():
        if mark := slot_of(field.annotation):
            block["properties"][field.name] = _slot_schema(mark, field.required)
        elif not field.required and schema.is_plain(field.default):
            block["properties"][field.name]["default"] = field.default
    return block


def summary(experiment: Experiment) -> str:
    """A few lines on what an experiment would train."""
    recipe, learner, plan = experiment.recipe, experiment.learner, experiment.evaluation
    source = experiment.source
    sizes = [
        noun if value == 1 else f"{value} {name}"
        for name, noun in (("ways", "1 way"), ("shots", "1 shot"), ("queries", "1 query"))
        if isinstance(value := recipe.at(f"tasks.{name}"), int)
    ]
    shape, _, output = example_shapes(source)
    arrow = " → ".join(" × ".join(map(str, sizes)) for sizes in (shape, output))
    parameters = dict(learner.model.named_parameters())
    adapted = sum(parameters[name].numel() for name in learner.adapted)
    rules = " → ".join(entry["block"] for entry in recipe.at("inner.rule"))
    optimizer, schedule = recipe.at("outer.optimizer"), recipe.at("outer.schedule.block")
    clip, support_loss = recipe.at("outer.clip"), recipe.at("inner.support_loss")
    steps = experiment.epochs * experiment.steps_per_epoch
    rows = {
        "tasks": [recipe.at("tasks.block"), *sizes, source.kind, arrow],
        "model": [
            " → ".join(block["block"] for block in (recipe.at("model"), *recipe.at("surgery"))),
            f"{_count(learner.model):,} parameters",
            f"{adapted:,} adapt inside a task",
        ],
        "inner": [
            _plural(learner.steps, "step"),
            rules,
            recipe.at("inner.order.block"),
            f"{_count(learner.rule):,} learned by the rule",
            f"descends {support_loss['block']}" if support_loss else "",
        ],
        "outer": [
            f"{recipe.at('outer.step_loss.block')} loss",
            recipe.at("outer.estimator.block"),
            f"{optimizer['block']} lr {optimizer['lr']:g}" if "lr" in optimizer else "",
            f"{schedule} schedule",
            f"meta-gradient clipped by {clip['block']}" if clip else "",
        ],
        "training": [
            f"{_plural(experiment.epochs, 'epoch')} × {_plural(experiment.steps_per_epoch, 'step')}"
            f" × {_plural(experiment.tasks_per_step, 'task')}",
            f"{steps * experiment.tasks_per_step:,} tasks in all",
        ],
        "evaluation": [
            _plural(plan.tasks, "task"),
            "every epoch" if plan.every == 1 else f"every {plan.every} epochs",
            _plural(plan.inner_steps, "inner step"),
            f"and the {plan.ensemble} best checkpoints together" if plan.ensemble > 1 else "",
        ],
        "hardware": [
            str(experiment.device),
            recipe.at("hardware.executor.block"),
            recipe.at("hardware.precision"),
        ],
    }
    cite = f" ({recipe.values['cite']})" if recipe.values["cite"] else ""
    lines = [f"{recipe.name}{cite}"]
    lines += [f"  {name:<11}{', '.join(filter(None, parts))}" for name, parts in rows.items()]
    return "\n".join([*lines, f"  {'hash':<11}{recipe.hash}"])


def _slot_text(slot: Slot) -> str:
    blocks = [_block_text(name, target, slot) for name, target in slot.blocks.items()]
    return "\n\n".join([f"{slot.name}: {slot.question}", *blocks])


def _block_text(name: str, target: Callable[..., Any], slot: Slot) -> str:
    known = schema.fields(target, slot.context).values()
    width = max((len(field.name) for field in known), default=0)
    lines = [f"  {name} ({target.__module__}:{target.__qualname__})"]
    lines += [textwrap.indent(paragraph, " " * 6) for paragraph in _about(target)]
    for field in known:
        takes = schema.describe(field.annotation) or str(field.annotation)
        default = "required" if field.required else f"default {_shown(field.default)}"
        lines.append(f"      - {field.name:<{width}}  {takes}; {default}")
    return "\n".join(lines)


def _about(target: Callable[..., Any]) -> list[str]:
    """First paragraph of the docstring, the equation set off below it, and the source."""
    paragraphs = (inspect.getdoc(target) or "").split("\n\n")
    about = paragraphs[:1] if paragraphs[0] else []
    if len(paragraphs) > 1 and all(line.startswith("    ") for line in paragraphs[1].splitlines()):
        about.append(paragraphs[1])
    for paragraph in paragraphs[1:]:
        _, mark, source = f"\n{paragraph}".partition("\nSource: ")
        if mark:
            about.append(f"Source: {source}")
    return about


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return value if isinstance(value, str) and value else show(value)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
