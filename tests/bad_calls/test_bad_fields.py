"""Every field of every block and public function is given values that its annotation does not take.

The table is made from signatures. None may be accepted in silence, and none refused in Python's or
torch's own words, in code and in recipes.
"""

import inspect
import itertools
import json
import math
import re
import typing
from typing import Any

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Lt
from calls import NAN
from good_calls import NEEDED
from torch import nn

import metablocks as mb
from metablocks.checks import UNCHECKED
from metablocks.errors import MetablocksError, RecipeError
from metablocks.recipe import load, schema
from metablocks.recipe.slots import SLOTS
from metablocks.tasks.torchvision_sets import DATASETS

# Public names that nobody calls with values of their own: what the house makes, and what one subclasses.
NOT_CALLED = {
    *("Batch", "Tensors", "Granularity", "RULES", "laws", "tasks"),
    *("Order", "StepLoss", "Executor", "Estimator", "UpdateRule", "StepAware", "StepInfo"),
    *("Batches", "Start"),
    *(
        "Carry",
        "Epoch",
        "Evaluation",
        "InnerLoop",
        "LoadedRun",
        "MetaGradient",
        "ModuleState",
        "TaskGradient",
        "Trajectory",
        "Validation",
    ),
    *("CompileWarning", "MetablocksError", "RandomDrawsWarning", "NamedTensors"),
}

BLOCKS = {
    **{f"mb.{name}": getattr(mb, name) for name in mb.__all__ if name not in NOT_CALLED},
    **{f"{s.name}.{name}": block for s in SLOTS.values() for name, block in s.blocks.items()},
}
UNIQUE = {block: name for name, block in BLOCKS.items()}


def fields(block):
    target = block.__init__ if inspect.isclass(block) else block
    hints = typing.get_type_hints(target, include_extras=True)
    parameters = inspect.signature(block).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.name != "self"}


def members(annotation):
    """An annotation's alternatives, and the marks of its ranges."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        kinds, marks = members(arguments[0])
        return kinds, [*marks, *arguments[1:]]
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        both = [members(argument) for argument in arguments]
        return [k for kinds, _ in both for k in kinds], [m for _, marks in both for m in marks]
    return [annotation], []


def misfits(annotation):
    """Values that do not fit an annotation."""
    kinds, marks = members(annotation)
    if Any in kinds or UNCHECKED in marks:
        return
    literals = [x for kind in kinds for x in typing.get_args(kind) if isinstance(x, str)]
    listed = any(isinstance(typing.get_origin(k), type) and typing.get_args(k) for k in kinds)
    yield from (object(), b"", NAN, math.inf, -math.inf, [[]], {1, 2}, np.float32("nan"))
    yield nn.Linear  # a class in the place of an instance
    if type(None) not in kinds:
        yield None
    if bool not in kinds:
        yield from (True, np.True_)
    if str not in kinds or literals:
        yield "no"
    if float not in kinds:
        yield from (1.5, torch.tensor(1.5))
    if int not in kinds and float not in kinds:
        yield 1
    if not listed:
        yield []
    yield from (-1 for mark in marks if isinstance(mark, Ge | Gt))
    yield from (0.0 for mark in marks if isinstance(mark, Gt))
    yield from (mark.lt for mark in marks if isinstance(mark, Lt))


def test_every_public_name_and_every_block_of_a_recipe_is_in_the_table():
    assert set(mb.__all__) >= NOT_CALLED
    for block, name in UNIQUE.items():
        if block is mb.Chain:
            block(mb.LearningRate(0.1))
        elif block not in (mb.load_run, *DATASETS.values()):  # which need their data
            block(**NEEDED.get(block, {}))
        for field, annotation in fields(block).items():
            assert annotation is not inspect.Parameter.empty, (name, field)


@pytest.mark.parametrize("block", [pytest.param(b, id=n) for b, n in UNIQUE.items()])
def test_a_field_takes_nothing_but_what_its_signature_says(block):
    for field, annotation in fields(block).items():
        for value in misfits(annotation):
            needed = {name: v for name, v in NEEDED.get(block, {}).items() if name != field}
            with pytest.raises(MetablocksError) as caught:
                block(value) if block is mb.Chain else block(**needed, **{field: value})
            error, name = caught.value, block.__name__
            assert error.block == name
            assert error.field.partition("[")[0] == field
            assert f"{name} {error.field} is " in str(error)
            assert "; it " in str(error) or "? It " in str(error)


# `Task` and `TaskBatch` are made for each task of a step: of their fields, but not of names, they say it.
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=n) for b, n in UNIQUE.items() if b not in (mb.Task, mb.TaskBatch)],
)
def test_a_name_that_is_no_field_or_a_field_that_is_missing_is_named(block):
    needed = {} if block is mb.Chain else NEEDED.get(block, {})
    with pytest.raises(
        MetablocksError, match=f"^{block.__name__} has no parameter learnt"
    ) as caught:
        block(**needed, learnt=1)
    assert isinstance(caught.value, TypeError)
    for field in needed:
        if inspect.signature(block).parameters[field].default is inspect.Parameter.empty:
            with pytest.raises(
                MetablocksError, match=f"^{block.__name__} {field} is missing; it takes"
            ):
                block(**{name: value for name, value in needed.items() if name != field})


RECIPE = "maml_strokes"
PLACES = {
    "tasks": "tasks",
    "model": "model",
    "surgery": "surgery[0]",
    "rule": "inner.rule[0]",
    "order": "inner.order",
    "batches": "inner.batches",
    "start": "inner.start",
    "support_loss": "inner.support_loss",
    "executor": "hardware.executor",
    "transform": "tasks.support_transform[0]",
    "dataset": "tasks.datasets",
}
HOLDERS = {  # of blocks that are held by others
    "transform": "tasks={block: cifar_fs, ways: 5, shots: 1, queries: 2, support_transform: [IT]}",
    "dataset": "tasks={block: episodes, splits: [1, 0, 0], ways: 5, shots: 1, queries: 2, datasets: IT}",
}


def plain_misfits(annotation):
    """Some of `misfits`, as a recipe writes them."""
    written = {
        "nan": ".nan",
        "True": "true",
        "None": "null",
        "no": "'no'",
        "1.5": "1.5",
        "-1": "-1",
    }
    return {written[str(value)] for value in misfits(annotation) if str(value) in written}


def as_block(source):
    """A block that another one holds, as a recipe writes it."""
    return {"block": type(source).__name__.lower(), **getattr(source, "fields", {})}


@pytest.mark.parametrize(
    ("slot", "name"),
    [pytest.param(s, n, id=f"{s.name}.{n}") for s in SLOTS.values() for n in s.blocks],
)
def test_a_field_of_a_recipe_takes_nothing_but_what_its_signature_says(slot, name):
    block, place = slot.blocks[name], PLACES.get(slot.name, f"outer.{slot.name}")
    known = schema.fields(block, slot.context)
    needed = {k: v for k, v in NEEDED.get(block, {}).items() if k in known}
    plain = f"{place.removesuffix('[0]')}={'[IT]' if '[0]' in place else 'IT'}"
    given = {k: json.dumps(v, default=as_block) for k, v in needed.items()}
    wrong = {field: sorted(plain_misfits(known[field].annotation)) for field in known}
    for values in itertools.zip_longest(*wrong.values()):  # one of each field at once
        entry = {field: v for field, v in zip(wrong, values, strict=True) if v is not None}
        written = ", ".join(f"{k}: {v}" for k, v in {"block": name, **given, **entry}.items())
        with pytest.raises(RecipeError) as caught:
            load(RECIPE, [HOLDERS.get(slot.name, plain).replace("IT", f"{{{written}}}")])
        for field in entry:
            assert re.search(rf"{re.escape(place)}\.{field}\b", str(caught.value)), field
