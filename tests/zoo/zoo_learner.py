"""A learner on an entry, and its tasks, as the tests of the zoo make them."""

from typing import Any

from zoo_entry import RATE, STEPS, Entry

import metablocks as mb


def learner_of(entry: Entry, **blocks: Any) -> mb.MetaLearner:
    """Two steps of one rate on all parameters, unless `blocks` say other."""
    blocks = {"loss": entry.loss, "steps": STEPS, "rule": mb.LearningRate(RATE), **blocks}
    return mb.MetaLearner(blocks.pop("model", None) or entry.model(), **blocks)


def task_batch(entry: Entry) -> mb.TaskBatch:
    """The entry's tasks, stacked."""
    return mb.TaskBatch.stack(entry.tasks())
