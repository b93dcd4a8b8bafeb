"""Checks of values: numbers of NumPy pass, booleans and NaN do not, and errors name the field."""

import pickle

import numpy as np
import pytest

from metablocks.checks import choice, count, interval, number
from metablocks.errors import BlockError, RuleError, TaskError


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3)])
def test_a_whole_number_of_any_kind_is_a_count(value):
    assert type(count("Loop", "workers", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1), "1", None, 0, -1, 8])
def test_anything_else_is_not_a_count(value):
    with pytest.raises(BlockError, match=r"^Loop workers is .*; it takes a whole number, 1 to 7$"):
        count("Loop", "workers", value, most=7)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(0)])
def test_a_finite_number_of_any_kind_is_a_number(value):
    assert type(number("Momentum", "momentum", value, at_least=0, below=1)) is float


@pytest.mark.parametrize(
    "value", [False, float("nan"), float("inf"), "0.5", None, 1, -0.1, 10**400]
)
def test_anything_else_is_not_a_number(value):
    with pytest.raises(RuleError, match=r"^Momentum momentum is .*at least 0 and below 1$"):
        number("Momentum", "momentum", value, at_least=0, below=1, error=RuleError)


@pytest.mark.parametrize("value", [(1.0, 0.5), (0.0, float("nan")), (1.0,), 1.0, (True, 2), None])
def test_what_is_not_a_pair_in_order_is_not_an_interval(value):
    interval("Sinusoid", "phase", [0, np.float64(3)])
    with pytest.raises(TaskError, match=r"^Sinusoid phase is .*low <= high"):
        interval("Sinusoid", "phase", value, error=TaskError)


def test_an_error_carries_its_block_and_field_and_so_does_its_pickle():
    with pytest.raises(BlockError) as caught:
        choice("Conv4", "norm", ["batch"], ("batch", "none"))
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.block, error.field) == ("Conv4", "norm")
    assert (BlockError("x").block, BlockError("x").field) == (None, None)
