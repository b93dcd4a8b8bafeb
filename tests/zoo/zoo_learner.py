"""A learner on an entry, and its tasks, as the tests of the zoo make them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import nn
from zoo import ENTRIES
from zoo_entry import RATE, SEED, STEPS, Entry, seed
from zoo_reference import Reference, reference
from zoo_state import Draws

import metablocks as mb

each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def each_with(values: Iterable[Any], chosen: Callable[[int, int], bool]) -> list[Any]:
    """Every entry with every value; (number of the entry, of the value) not chosen are long."""
    return [
        pytest.param(
            entry,
            value,
            id=f"{entry.name}-{value}",
            marks=[] if chosen(number, index) else [pytest.mark.long],
        )
        for number, entry in enumerate(ENTRIES)
        for index, value in enumerate(values)
    ]


def learner_of(entry: Entry, model: nn.Module | None = None, **blocks: Any) -> mb.MetaLearner:
    """Two steps of one rate on all parameters, unless `blocks` say other."""
    blocks = {"loss": entry.loss, "steps": STEPS, "rule": mb.LearningRate(RATE), **blocks}
    return mb.MetaLearner(model or entry.model(), **blocks)


def differentiable(entry: Entry) -> mb.Order:
    """The highest order that PyTorch has derivatives for."""
    return mb.FirstOrder() if entry.no_second else mb.SecondOrder()


def tasks_of(entry: Entry) -> mb.TaskBatch | list[mb.Task]:
    """The entry's tasks, stacked where they can be."""
    tasks = entry.tasks()
    return mb.TaskBatch.stack(tasks) if entry.stacked else tasks


def replayed(entry: Entry, *, second: bool) -> Reference:
    """The reference with the draws that a learner makes from `SEED` on, in a loop."""
    draws, model = Draws(), entry.model()
    # Not the method itself: where a model is copied, so is what its hooks are bound to.
    model.register_forward_pre_hook(lambda module, args: draws.record(module, args))
    order = mb.SecondOrder() if second else mb.FirstOrder()
    learner, tasks = learner_of(entry, model, order=order), tasks_of(entry)
    learner.meta_gradient(tasks)
    draws.passes.clear()  # those of checks that only the first call makes
    seed(SEED)  # after all that draws tasks and models
    learner.meta_gradient(tasks)
    plain = entry.plain_model()
    plain.register_forward_pre_hook(draws.replay)
    return reference(entry, second=second, model=plain)
