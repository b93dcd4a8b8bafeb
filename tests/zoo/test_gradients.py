"""Every model's meta-gradient is plain autograd's, under every executor, estimator and order."""

import warnings
from functools import cache
from typing import Any

import pytest
from torch.backends import cuda
from zoo import ENTRIES
from zoo_entry import SEED, Entry, seed
from zoo_learner import learner_of, replayed, tasks_of
from zoo_reference import Reference, attention, distance, reference

import metablocks as mb
from metablocks.errors import ExecutorError, MetablocksError

SWITCHES = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
ESTIMATORS = (mb.Unrolled(), mb.Adjoint())
ORDERS = (mb.SecondOrder(), mb.FirstOrder())


@cache
def known(entry: Entry, second: bool) -> Reference:
    """The reference, once for all combinations."""
    return replayed(entry, second=second) if entry.random else reference(entry, second=second)


def _product() -> list[Any]:
    """All combinations; each model under the plainest one and one other of CI, the rest are long."""
    others = [
        (executor, estimator, order)
        for executor in (mb.Loop(), mb.Vmap())
        for estimator in ESTIMATORS
        for order in ORDERS
    ]
    plainest = others.pop(0)
    rows = []
    for number, entry in enumerate(ENTRIES):
        for index, combination in enumerate([*others, plainest]):
            chosen = combination is plainest or index == number % len(others)
            marks = [] if chosen else [pytest.mark.long]
            name = "-".join([entry.name, *(type(block).__name__ for block in combination)])
            rows.append(pytest.param(entry, *combination, id=name, marks=marks))
    return rows


@pytest.mark.parametrize(("entry", "executor", "estimator", "order"), _product())
def test_meta_gradient(
    entry: Entry, executor: mb.Executor, estimator: mb.Estimator, order: mb.Order
) -> None:
    """Equal to the loop in plain autograd, or refused where PyTorch has no such derivative.

    1e-9 of a gradient's norm: some 1e4 operations on float64, each right to 1e-16, in another order,
    leave 1e-12 to 1e-14; a wrong term leaves 1e-3 and more (`test_limits.py` holds that against it).
    """
    learner = learner_of(entry, executor=executor, estimator=estimator, order=order)
    tasks = tasks_of(entry)
    second, vmap = isinstance(order, mb.SecondOrder), isinstance(executor, mb.Vmap)
    with attention(entry):
        if vmap and entry.no_vmap:
            with pytest.raises(ExecutorError, match=r"Loop\(\)"):
                learner.meta_gradient(tasks)
        elif second and entry.no_second:
            with pytest.raises(MetablocksError, match=entry.no_second.replace(".", r"\.")):
                learner.meta_gradient(tasks)
        elif vmap and entry.random:
            _holds_to_itself(learner, tasks, entry.tolerance)
        else:
            expected = known(entry, second)
            seed(SEED)
            _is(learner.meta_gradient(tasks), expected, entry.tolerance)


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.fused_attention], ids=lambda entry: entry.name
)
def test_fused_attention_has_a_second_derivative(entry: Entry) -> None:
    """Where one is taken, the math kernel is used without being asked; the user's switches stay."""
    learner, tasks = learner_of(entry), tasks_of(entry)
    before = [is_on() for is_on in SWITCHES]
    with attention(entry):
        expected = known(entry, True)
    seed(SEED)
    _is(learner.meta_gradient(tasks), expected, entry.tolerance)
    assert [is_on() for is_on in SWITCHES] == before


def _is(result: mb.MetaGradient, expected: Reference, tolerance: float) -> None:
    assert set(result.grads) == {f"model.{name}" for name in expected.grads}
    grads = {name.removeprefix("model."): gradient for name, gradient in result.grads.items()}
    assert distance(grads, expected.grads) < tolerance
    off = (result.query_losses[:, -1] - expected.losses).norm() / expected.losses.norm()
    assert off < tolerance
    assert abs(result.loss - expected.losses.mean()) < tolerance * expected.losses.norm()


def _holds_to_itself(learner: mb.MetaLearner, tasks: mb.TaskBatch, tolerance: float) -> None:
    """Draws under Vmap are not the loop's, but the same at the same seed."""
    results = []
    for _ in range(2):
        seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mb.executors.RandomDrawsWarning)
            results.append(learner.meta_gradient(tasks))
    assert results[0].query_losses[:, -1].isfinite().all()
    assert distance(results[0].grads, results[1].grads) < tolerance
