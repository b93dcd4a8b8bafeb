"""Random recipes over every slot, as a hypothesis strategy of YAML texts.

A recipe starts plain (the first block of every table, what its fields require and no more) and some
axes of it are varied; what fails shrinks towards the plain one. Slots, blocks and fields are read from
the recipe layout, the tables and the signatures, so that a new one is fuzzed without a line here.
"""

import json
from collections.abc import Collection
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from metablocks.checks import Blocks
from metablocks.errors import MetablocksError
from metablocks.recipe import schema
from metablocks.recipe.layout import RecipeLayout, slot_of, slot_paths
from metablocks.recipe.parse import join
from metablocks.recipe.slots import SLOTS, Slot
from metablocks.rules import StepInfo
from metablocks.tasks.base import example_shapes
from tools.fuzzing.values import JUNK, PATTERNS, STATED, always_drawn, value

MODEL, RULE, START, SUPPORT_LOSS, SURGERY, TASKS = (
    SLOTS[name] for name in ("model", "rule", "start", "support_loss", "surgery", "tasks")
)

WIDEST = 1024
"""The most inputs or outputs of a layer: a KFO keeps a square of them."""

Draw = Any
Entry = dict[str, Any]


@st.composite
def recipes(draw: Draw, slot: str | None = None, block: str | None = None) -> str:
    """The text of a recipe; with `slot` and `block` one that uses the block (outside of junk)."""
    axes = sorted({*slot_paths(), "inner.adapt"})
    varied = draw(st.sets(st.sampled_from(axes), max_size=5)) | _holding(slot)
    wanted = (slot, block)
    values = _section(draw, RecipeLayout, "", varied, wanted)
    if slot == SUPPORT_LOSS.name:
        others = [_entry(draw, TASKS, name, False) for name in TASKS.blocks]
        entry = values["inner"]["support_loss"]
        values["tasks"] = draw(st.sampled_from([e for e in others if _descends_on(entry, e)]))
    if wanted == ("batches", "stream"):  # which takes no other tasks that ship
        values["tasks"] = {"block": "text", "length": 8, "shots": 1, "queries": 1, "chunks": 8}
    values["tasks"], values["model"] = _model(draw, values, "model" in varied, wanted)
    if block is None and draw(st.integers(0, 7)) == 7:
        _spoil(draw, values)
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))


def _holding(slot: str | None) -> set[str]:
    """The axes to vary for a slot: its own, and for surgery what it operates on."""
    slots = {slot, TASKS.name, MODEL.name} if slot == SURGERY.name else {slot}
    return {path for path, mark in slot_paths().items() if mark.slot in slots}


def _section(
    draw: Draw, layout: type, path: str, varied: Collection[str], wanted: tuple[Any, Any]
) -> Entry:
    found: Entry = {}
    for field in schema.fields(layout).values():
        here = join(path, field.name)
        mark = slot_of(field.annotation)
        if is_dataclass(field.annotation):
            found[field.name] = _section(draw, field.annotation, here, varied, wanted)
        elif mark is None and (field.required or draw(st.booleans())):
            found[field.name] = _leaf(draw, field, here in varied)
        elif mark is not None and mark.slot == "model":
            found[field.name] = None  # made later, to fit the tasks
        elif mark is not None and mark.at_least is not None and (field.required or here in varied):
            found[field.name] = _chain(draw, SLOTS[mark.slot], mark, here in varied, wanted)
        elif mark is not None and (field.required or here in varied):
            found[field.name] = _block(draw, SLOTS[mark.slot], here in varied, wanted)
    return found


def _leaf(draw: Draw, field: schema.Field, varied: bool) -> Any:
    if field.name == "adapt":
        some = PATTERNS | st.lists(PATTERNS, min_size=1, max_size=3)
        return draw(some if varied else st.just("*"))
    return draw(value(field))


def _block(draw: Draw, slot: Slot, varied: bool, wanted: tuple[Any, Any]) -> Entry:
    if slot.name == wanted[0]:
        return _entry(draw, slot, wanted[1], varied)
    names = list(slot.blocks)
    name = draw(st.sampled_from(names)) if varied else names[0]
    return _entry(draw, slot, name, varied)


def _entry(draw: Draw, slot: Slot, name: str, varied: bool) -> Entry:
    """The block with its required fields and, where it is varied, some of the others."""
    known = schema.fields(slot.blocks[name], slot.context).values()
    some = {f.name for f in known if f.required or f.name in STATED or always_drawn(f)}
    if varied and (optional := [f.name for f in known if f.name not in some]):
        some |= draw(st.sets(st.sampled_from(optional), max_size=3))
    return {"block": name} | {
        f.name: _held(draw, mark) if (mark := slot_of(f.annotation)) else draw(value(f, known))
        for f in known
        if f.name in some
    }


def _held(draw: Draw, mark: Blocks) -> Any:
    """The first block of a slot, or two of it, as a field of another block."""
    slot = SLOTS[mark.slot]
    first = next(iter(slot.blocks))
    entries = [_entry(draw, slot, first, False) for _ in range(2)]
    return entries[0] if mark.at_least is None else entries


def _chain(
    draw: Draw, slot: Slot, mark: Blocks, varied: bool, wanted: tuple[Any, Any]
) -> list[Entry]:
    """Up to two blocks in front of what has to be there: for rules, one that descends, the only one."""
    names = list(slot.blocks)
    needed = [name for name in names if slot is not RULE or _descends(name)]
    last = [draw(st.sampled_from(needed)) if varied else needed[0]] * (mark.at_least or 0)
    if slot.name == wanted[0] and wanted[1] in needed:
        last = [wanted[1]]
    others = [name for name in names if slot is not RULE or name not in needed]
    front = draw(st.lists(st.sampled_from(others), max_size=2)) if varied else []
    if slot.name == wanted[0] and wanted[1] not in last:
        front = [*front[:1], wanted[1]]
    return [_entry(draw, slot, name, varied) for name in [*front, *last]]


def _model(draw: Draw, values: Entry, varied: bool, wanted: tuple[Any, Any]) -> tuple[Entry, Entry]:
    """A model that takes the tasks' inputs and the wanted surgery, where a table has one.

    Where it has none for a wanted model or surgery, it gets other tasks.
    """
    # A start is of a net with a body, and some starts are of classes.
    tasks = _entry(draw, TASKS, "strokes", False) if wanted[0] == START.name else values["tasks"]
    names = [wanted[1]] if wanted[0] == MODEL.name else list(MODEL.blocks)
    entries = [_entry(draw, MODEL, name, varied) for name in names]
    surgery = [e for e in values.get("surgery", ()) if wanted == (SURGERY.name, e["block"])]
    fitting = [(tasks, entry) for entry in entries if _fits(entry, tasks, surgery)]
    if not fitting and wanted[0] in (MODEL.name, SURGERY.name):
        others = [_entry(draw, TASKS, name, False) for name in TASKS.blocks]
        pairs = [(other, entry) for other in others for entry in entries]
        fitting = [(other, entry) for other, entry in pairs if _fits(entry, other, surgery)]
    found: tuple[Entry, Entry] = draw(
        st.sampled_from(fitting or [(tasks, entry) for entry in entries])
    )
    return found


def _fits(entry: Entry, tasks: Entry, surgery: list[Entry]) -> bool:
    """Whether the model can be made for the tasks, and is small enough for a fuzz."""
    shapes = _shapes(json.dumps(tasks))
    return shapes is not None and _takes(json.dumps(entry), json.dumps(surgery), shapes)


@cache
def _shapes(tasks: str) -> tuple[Any, ...] | None:
    """Inputs and outputs of a model for the tasks, and `example_shapes`; None if they cannot be made."""
    try:
        source = _make(TASKS, json.loads(tasks))
    except (MetablocksError, RuntimeError):
        return None
    return source.input_shape, source.outputs, *example_shapes(source)


@cache
def _takes(entry: str, surgery: str, shapes: tuple[Any, ...]) -> bool:
    inputs, outputs, shape, dtype, output = shapes
    try:
        with torch.device("meta"):
            model = _make(MODEL, json.loads(entry), input_shape=inputs, outputs=outputs)
            for change in json.loads(surgery):
                target = SURGERY.blocks[change["block"]]
                context = schema.supplied(target, {"model": model, "steps": 1})
                _make(SURGERY, change, **context)
            prediction = model(torch.zeros(2, *shape, dtype=dtype))
    except (MetablocksError, RuntimeError):
        return False
    if tuple(prediction.shape[1:]) != output:
        return False
    return all(max(p.shape) <= WIDEST for p in model.parameters())


@cache
def _descends(name: str) -> bool:
    """Whether a rule by itself goes against the gradient, so that it can end a chain."""
    known = schema.fields(RULE.blocks[name], RULE.context).values()
    try:
        rule = RULE.blocks[name](**{field.name: 0.01 for field in known if field.required})
        params = {"weight": torch.ones(2, 2)}
        rule.setup(params, 1)
        updates, _ = rule(params, rule.init(params), StepInfo(0, 1, params))
    except (MetablocksError, TypeError):
        return False
    return bool((updates["weight"] < 0).all())


def _descends_on(entry: Entry, tasks: Entry) -> bool:
    """Whether the support loss is one for the tasks."""
    try:
        source = _make(TASKS, tasks)
        context = {"outputs": source.outputs, "kind": source.kind}
        target = SUPPORT_LOSS.blocks[entry["block"]]
        _make(SUPPORT_LOSS, entry, **schema.supplied(target, context))
    except (MetablocksError, OSError):
        return False
    return True


def _make(slot: Slot, entry: Entry, **context: Any) -> Any:
    target = slot.blocks[entry["block"]]
    known = schema.fields(target, slot.context)

    def made(name: str, value: Any) -> Any:
        mark = slot_of(known[name].annotation) if name in known else None
        if mark is None:
            return value
        held = SLOTS[mark.slot]
        return [_make(held, e) for e in value] if isinstance(value, list) else _make(held, value)

    return target(**{n: made(n, v) for n, v in entry.items() if n != "block"}, **context)


def _spoil(draw: Draw, values: Entry) -> None:
    """Put one thing into the recipe that should not be there, or take one out."""
    at: Any = values
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
            at = at[key]
            continue
        how = draw(st.sampled_from(["junk", "remove", "add"]))
        if how == "remove":
            del at[key]
        elif how == "add" and isinstance(at, dict):
            at["unknown"] = 1
        else:
            at[key] = draw(st.sampled_from(JUNK))
        return
