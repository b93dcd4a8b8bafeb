"""Values that an annotation takes in another form, and errors that carry what they are about."""

import pickle

import numpy as np
import pytest
from calls import NAN
from good_calls import IMAGES

import metablocks as mb
from metablocks.checks import Count, Interval, check
from metablocks.errors import BlockError, TaskError
from metablocks.models import Conv4


@pytest.mark.parametrize(
    ("value", "annotation", "read"),
    [
        (3, Count, 3),
        (np.int32(3), Count, 3),
        (np.float32(0.5), float, 0.5),
        (np.int64(0), float, 0.0),
        (np.True_, bool, True),
        ([0, np.float64(3)], Interval, (0, 3.0)),
        ((1.0, 1.0), Interval, (1.0, 1.0)),
    ],
)
def test_numbers_of_numpy_and_lists_for_tuples_are_taken(value, annotation, read):
    taken = check("Loop", "workers", value, annotation)
    assert taken == read
    assert type(taken) is type(read)


@pytest.mark.parametrize("value", [(1.0, 0.5), (0.0, NAN), (1.0,), 1.0, (True, 2), None, 10**400])
def test_what_is_not_a_pair_in_order_is_not_an_interval(value):
    with pytest.raises(TaskError, match=r"^Sinusoid phase is .*low <= high"):
        mb.tasks.Sinusoid(phase=value)


def test_an_error_carries_its_block_and_field_and_so_does_its_pickle():
    with pytest.raises(BlockError) as caught:
        Conv4(**IMAGES, norm=["batch"])
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.block, error.field) == ("Conv4", "norm")
    assert (BlockError("x").block, BlockError("x").field) == (None, None)
