"""What bad calls are made of: a learner, tasks, and the test of a table of such calls.

A row of a table: the call, the error's class, the field it names, and a part of its message.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import MetablocksError

NAN = math.nan
WEIGHTS = {"w": torch.ones(2)}


def learner_of(model=None, **blocks):
    given = {"loss": F.mse_loss, "steps": 1, "rule": mb.LearningRate(0.1), **blocks}
    return mb.MetaLearner(model or nn.Linear(2, 1), **given)


def half(*lead, inputs=2, examples=6):
    return torch.randn(*lead, examples, inputs), torch.randn(*lead, examples, 1)


def tasks(support=None, query=None):
    return mb.TaskBatch(support or half(3), query or half(3))


def meta(batch=None, **blocks):
    return learner_of(**blocks).meta_gradient(batch or tasks())


def each_of(rows):
    """A mark: the test gets every row of a table."""
    named = [pytest.param(*row, id=name) for name, row in rows.items()]
    return pytest.mark.parametrize(("call", "kind", "field", "message"), named)


def check_refusal(call, kind, field, message):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, MetablocksError)
    assert message in str(caught.value)
    assert caught.value.block
    assert caught.value.field == field
