"""Truncated and annealed orders and step losses: their ends, their numbers, their refusals."""

import policy_laws
import pytest
import small_problems as problem
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks import (
    AnnealedOrder,
    AnnealedStepLoss,
    Progress,
    TruncatedOrder,
)
from metablocks.errors import BlockError


@pytest.mark.parametrize("steps", [1, 3])
def test_truncation_ends_at_first_and_second_order(steps, place):
    policy_laws.truncation_ends(TruncatedOrder(last=1), problem.regression(steps=steps, **place))


def test_annealed_order_switches_exactly_at_its_epoch(place):
    order, others = AnnealedOrder(first_order_epochs=1), [0, 2, 2.99, 3, 3.01, 9]
    policy_laws.annealing_switches(order, problem.regression(**place), epoch=3, others=others)


@given(epochs=st.integers(1, 20), steps=st.integers(0, 8), later=st.floats(0, 5))
def test_an_annealed_step_loss_ends_at_final(epochs, steps, later):
    policy_laws.ends_at_final(AnnealedStepLoss(epochs=epochs), steps=steps, later=later)


def test_all_weight_on_the_last_step_is_the_final_step_loss(place):
    policy_laws.one_hot_is_final(problem.regression(**place))


@pytest.mark.parametrize(
    ("epoch", "weights"),
    [
        # v_k = max(1/N − e/(N·E), 0.03/N), by hand, N = 5, E = 10
        (0, [0, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (1, [0, 0.18, 0.18, 0.18, 0.18, 0.28]),
        (1.9, [0, 0.18, 0.18, 0.18, 0.18, 0.28]),
        (5, [0, 0.1, 0.1, 0.1, 0.1, 0.6]),
        (9, [0, 0.02, 0.02, 0.02, 0.02, 0.92]),
        (10, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_multi_step_loss_anneals_per_epoch_as_in_the_reference(epoch, weights):
    got = AnnealedStepLoss(epochs=10)(5, Progress(epoch))
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64))


def test_the_floor_of_the_annealing_is_three_hundredths():
    # epoch 99 of 100: 1/5 − 99/500 = 0.002 lies under the floor 0.03/5 = 0.006
    got = AnnealedStepLoss(epochs=100)(5, Progress(99))
    torch.testing.assert_close(got[1:], torch.tensor([0.006] * 4 + [0.976], dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TruncatedOrder(last=-1), "TruncatedOrder last is -1"),
        (lambda: AnnealedOrder(first_order_epochs=-1), "first_order_epochs is -1"),
        (lambda: AnnealedStepLoss(epochs=0), "AnnealedStepLoss epochs is 0"),
    ],
)
def test_values_out_of_range_are_refused(build, message):
    with pytest.raises(BlockError, match=message):
        build()
