"""Texts of the command about blocks and experiments, and the JSON schema, taken from the code itself."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import DictSchema
from torch import nn

from metablocks.checks import Blocks
from metablocks.recipe import schema
from metablocks.recipe.build import Experiment
from metablocks.recipe.layout import SECTIONS, RecipeLayout, is_section, slot_of
from metablocks.recipe.load import Shipped
from metablocks.recipe.parse import show
from metablocks.recipe.slots import SLOTS, Slot
from metablocks.tasks.base import example_shapes

_INDENTED: Any = {"initial_indent": " " * 10, "subsequent_indent": " " * 10}
_MEANING = re.compile(r"^- (`\w+`(?:, `\w+`)*): (.*(?:\n  .*)*)", re.MULTILINE)


def blocks_text(names: Iterable[str] = (*SECTIONS, *SLOTS)) -> str:
    """Sections of a recipe, and every block of its slots, by their names.

    With equation, source, and each field's type, default and meaning.

    >>> print(blocks_text(["order"]))  # doctest: +ELLIPSIS
    order: through which steps the meta-gradient looks
    <BLANKLINE>
      second_order (metablocks.order:SecondOrder)
          MAML: every step is differentiated through.
          Source: Finn, Abbeel, Levine 2017.
    ...
    """
    return "\n\n".join(
        _slot_text(SLOTS[name]) if name in SLOTS else _section_text(name) for name in names
    )


def meanings(target: Callable[..., Any]) -> dict[str, str]:
    """Meanings of the fields of a block or section: the items of its docstring, and of its bases'.

    >>> meanings(SLOTS["order"].blocks["annealed"])
    {'first_order_epochs': 'epochs at the beginning that are first-order.'}
    """
    owners = reversed(inspect.getmro(target)) if inspect.isclass(target) else [target]
    return {
        name: " ".join(text.split())
        for owner in owners
        for names, text in _MEANING.findall(inspect.cleandoc(owner.__doc__ or ""))
        for name in re.findall(r"\w+", names)
    }


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
    {'$ref': '#/$defs/order', 'description': 'through which steps the meta-gradient looks.'}
    >>> recipe["$defs"]["order"]["anyOf"][3]["properties"]["last"]  # doctest: +ELLIPSIS
    {'minimum': 0, 'type': 'integer', 'description': 'steps at the end ...'}
    """
    definitions = {layout.__name__: _object_schema(layout) for layout in SECTIONS.values()}
    root = definitions.pop(RecipeLayout.__name__)
    for slot in SLOTS.values():
        entries = [_block_schema(name, slot) for name in slot.blocks]
        outside = {
            "properties": {"block": {"type": "string", "pattern": ":"}},
            "required": ["block"],
        }
        definitions[slot.name] = {
            "description": slot.question,
            "anyOf": [{"enum": list(slot.blocks)}, *entries, {"type": "object", **outside}],
        }
    start = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions}
    return start | root


class _Plain(GenerateJsonSchema):
    """Without `additionalProperties: true`, which says nothing, and which pydantic writes since 2.11."""

    def dict_schema(self, schema: DictSchema) -> dict[str, Any]:
        written = super().dict_schema(schema)
        if written.get("additionalProperties") is True:
            del written["additionalProperties"]
        return written


def _slot_schema(mark: Blocks, required: bool) -> dict[str, Any]:
    block = {"$ref": f"#/$defs/{mark.slot}"}
    if mark.at_least is not None:
        return {"type": "array", "items": block, "minItems": mark.at_least}
    return block if required else {"anyOf": [block, {"type": "null"}]}


def _block_schema(name: str, slot: Slot) -> dict[str, Any]:
    target = slot.blocks[name]
    block = _object_schema(target, slot.context)
    block["properties"] = {"block": {"const": name}, **block["properties"]}
    block["required"] = ["block", *block["required"]]
    return {"description": "\n\n".join(_about(target)), **block}


def _object_schema(target: Callable[..., Any], context: tuple[str, ...] = ()) -> dict[str, Any]:
    known, means = schema.fields(target, context), meanings(target)
    properties = {name: _field_schema(field, known) for name, field in known.items()}
    for name, meaning in means.items():
        if name in properties:
            properties[name]["description"] = meaning
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name, field in known.items() if field.required],
        "additionalProperties": False,
    }


def _field_schema(field: schema.Field, known: Mapping[str, schema.Field]) -> dict[str, Any]:
    if mark := slot_of(field.annotation):
        return _slot_schema(mark, field.required)
    if is_section(field.annotation):
        return {"$ref": f"#/$defs/{field.annotation.__name__}"}
    made: dict[str, Any]
    if schema.is_groups(field):
        options = {n: _field_schema(other, {}) for n, other in known.items() if other is not field}
        group = {"type": "object", "properties": options, "additionalProperties": False}
        made = {"anyOf": [{"type": "object", "additionalProperties": group}, {"type": "null"}]}
    else:
        made = schema.adapter(field.annotation).json_schema(schema_generator=_Plain)
    if not field.required and schema.is_plain(field.default):
        made["default"] = field.default
    return made


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
            _asked(recipe.at("inner.batches.block"), "full_batch"),
            _asked(recipe.at("inner.start.block"), "as_learned"),
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
    lines = [f"  {name} ({target.__module__}:{target.__qualname__})"]
    lines += [textwrap.indent(paragraph, " " * 6) for paragraph in _about(target)]
    return "\n".join([*lines, *_field_lines(target, slot.context)])


def _section_text(name: str) -> str:
    about, *_ = _about(SECTIONS[name])
    return "\n".join([f"{name}: {about}", *_field_lines(SECTIONS[name])])


def _field_lines(target: Callable[..., Any], context: tuple[str, ...] = ()) -> Iterable[str]:
    known, means = schema.fields(target, context).values(), meanings(target)
    width = max((len(field.name) for field in known), default=0)
    for field in known:
        section = is_section(field.annotation)
        takes = "a section" if section else schema.describe(field.annotation)
        default = "required" if field.required else f"default {_shown(field.default)}"
        yield f"      - {field.name:<{width}}  {takes or field.annotation}; {default}"
        if field.name in means:
            yield textwrap.fill(means[field.name], 100, **_INDENTED)


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


def _asked(name: str, usual: str) -> str:
    """The name of a block, if it is another than the usual one."""
    return "" if name == usual else name


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
