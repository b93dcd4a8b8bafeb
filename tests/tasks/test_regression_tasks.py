"""Sinusoid, linear and logistic tasks: the formula, the ranges, the errors."""

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks.errors import TaskError
from metablocks.tasks import Linear, Logistic, Sinusoid


def joined(batch):
    """All x and y of each task, `[tasks, examples]`, float64 on the CPU."""
    sides = zip(batch.support, batch.query, strict=True)
    return [torch.cat(pair, dim=1)[..., 0].double().cpu() for pair in sides]


def fit(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Amplitude, phase and worst residual of y = A sin(x − φ) by least squares on sin x, cos x."""
    basis = torch.stack([x.sin(), -x.cos()], dim=-1)
    solution = torch.linalg.lstsq(basis, y[..., None]).solution
    worst = (basis @ solution - y[..., None]).abs().max()
    a, b = solution[:, 0, 0], solution[:, 1, 0]
    return (a**2 + b**2).sqrt(), torch.atan2(b, a), worst


def test_a_sinusoid_is_amplitude_times_sine_of_x_minus_phase_in_finns_ranges(device) -> None:
    source = Sinusoid(shots=10, queries=10, device=device)
    x, y = joined(source.sample("train", range(200)))
    amplitude, phase, worst = fit(x, y)
    assert worst < 2e-6  # y up to 5 in float32, x rounded to float32: 5 · 2⁻²⁴ · a few
    assert amplitude.min() > 0.1 - 1e-5
    assert amplitude.max() < 5 + 1e-5
    assert phase.min() > -1e-4
    assert phase.max() < math.pi + 1e-4
    assert x.abs().max() <= 5
    # Uniform: means of 200 amplitudes and phases within five standard errors.
    assert abs(amplitude.mean() - 2.55) < 5 * 4.9 / math.sqrt(12 * 200)
    assert abs(phase.mean() - math.pi / 2) < 5 * math.pi / math.sqrt(12 * 200)


def test_fixed_ranges_give_one_function() -> None:
    source = Sinusoid(amplitude=(2.0, 2.0), phase=(0.5, 0.5), frequency=(3.0, 3.0))
    x, y = joined(source.sample("test", range(4)))
    torch.testing.assert_close(y, 2 * torch.sin(3 * x - 0.5), atol=5e-6, rtol=0)


def test_even_points_are_one_grid_that_support_and_query_share_out_anew_in_each_task() -> None:
    source = Sinusoid(shots=2, queries=3, domain=(-1.0, 3.0), points="even")
    x, y = joined(source.sample("train", range(50)))
    assert x.sort().values.unique(dim=0).tolist() == [[-1.0, 0.0, 1.0, 2.0, 3.0]]
    assert len(x[:, :2].sort().values.unique(dim=0)) == 10  # every pair is a support set
    drawn = Sinusoid(shots=2, queries=3, domain=(-1.0, 3.0)).sample("train", range(50))
    assert torch.equal(fit(x, y)[0].round(decimals=3), fit(*joined(drawn))[0].round(decimals=3))


def test_support_and_query_have_the_sizes_asked_for(device) -> None:
    batch = Sinusoid(shots=3, queries=7, device=device).sample("train", range(2))
    assert [tuple(leaf.shape) for leaf in batch.support] == [(2, 3, 1), (2, 3, 1)]
    assert [tuple(leaf.shape) for leaf in batch.query] == [(2, 7, 1), (2, 7, 1)]
    assert all(leaf.is_contiguous() for leaf in (*batch.support, *batch.query))


@given(sigma=st.floats(0.1, 10.0), index=st.integers(0, 1000))
def test_a_linear_task_has_one_slope_of_its_own(sigma: float, index: int) -> None:
    x, y = joined(Linear(shots=2, queries=3, sigma=sigma).sample("train", [index, index + 1]))
    slopes = y / x
    assert torch.allclose(slopes, slopes[:, :1].expand(-1, 5), rtol=1e-6)
    assert slopes[0, 0] != slopes[1, 0]


def test_linear_slopes_and_inputs_have_the_stated_spread() -> None:
    x, y = joined(Linear(shots=5, queries=5, sigma=2.0).sample("train", range(1000)))
    slope = (y / x)[:, 0]
    # Standard error of a variance of n normals is var · √(2/n); of a mean, √(var/n). Five of them.
    assert abs(slope.mean()) < 5 * math.sqrt(4 / 1000)
    assert abs(slope.var() - 4) < 5 * 4 * math.sqrt(2 / 1000)
    assert abs(x.mean()) < 5 * math.sqrt(1 / 10_000)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / 10_000)


def test_logistic_labels_follow_a_logistic_model_of_each_task(device) -> None:
    """Weights fitted to the support set, by Newton's method, give the chances of the query labels.

    1000 examples fit a weight up to about 0.1, which averages out over 500 tasks: the labels of ten
    bins of chances are held to five standard errors, and so is the weights' spread, which is sigma.
    """
    source = Logistic(shots=1000, queries=1000, dim=2, sigma=2.0, device=device)
    batch = source.sample("train", range(500))
    (x, y), (others, labels) = (
        (a.double().cpu(), b.double().cpu()) for a, b in (batch.support, batch.query)
    )
    weights = torch.zeros(500, 2, 1, dtype=torch.float64)
    for _ in range(12):
        chance = torch.sigmoid(x @ weights)
        hessian = x.mT @ (chance * (1 - chance) * x)
        weights += torch.linalg.solve(hessian, x.mT @ (y[..., None] - chance))
    chance = torch.sigmoid(others @ weights)[..., 0]
    for low in torch.arange(0, 1, 0.1):
        here = (chance >= low) & (chance < low + 0.1)
        p, count = chance[here], int(here.sum())
        assert count > 1000
        error = (p * (1 - p)).sum().sqrt() / count
        assert abs(labels[here].mean() - p.mean()) < 5 * error
    assert abs(weights.mean()) < 5 * math.sqrt(4 / 1000)
    assert abs(weights.var() - 4) < 5 * 4 * math.sqrt(2 / 1000)
    assert abs(x.mean()) < 5 * math.sqrt(1 / 1e6)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / 1e6)


def test_logistic_labels_of_steep_tasks_are_the_side_of_the_boundary() -> None:
    x, y = Logistic(shots=20, queries=1, sigma=1e6).sample("test", range(50)).support
    side = torch.where(y == 1, x[..., 0], -x[..., 0])
    assert bool(((side > 0).all(1) | (side < 0).all(1)).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sinusoid(shots=0), r"Sinusoid shots is 0; it takes a whole number, 1 or more"),
        (lambda: Sinusoid(queries=-1), "queries is -1; it takes a whole number, 1 or more"),
        (lambda: Sinusoid(seed=-3), "seed is -3; it takes a whole number, 0 or more"),
        (lambda: Sinusoid(amplitude=(5.0, 0.1)), r"amplitude is \(5.0, 0.1\).*low <= high"),
        (lambda: Sinusoid(phase=(0.0, math.inf)), "phase is .*finite"),
        (lambda: Sinusoid(frequency=(1.0,)), "frequency is .*pair"),
        (lambda: Sinusoid(domain=(1.0, 1.0)), "domain is .*single x; low must be below high"),
        (lambda: Linear(shots=0, queries=1), "Linear shots is 0"),
        (lambda: Linear(shots=1, queries=1, sigma=0.0), "sigma is 0.0; it takes a finite number"),
        (lambda: Linear(shots=1, queries=1, sigma=math.nan), "sigma is nan"),
        (lambda: Logistic(shots=0, queries=1), "Logistic shots is 0"),
        (
            lambda: Logistic(shots=1, queries=1, dim=0),
            "dim is 0; it takes a whole number, 1 or more",
        ),
        (
            lambda: Logistic(shots=1, queries=1, sigma=-1.0),
            "sigma is -1.0; it takes a finite number",
        ),
    ],
)
def test_a_field_out_of_range_is_named_with_what_would_work(build, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build()


def test_twenty_five_tasks_are_drawn_in_a_moment() -> None:
    # Training takes a step every few milliseconds. About 0.3 ms here; the bound is for loaded hosts.
    source = Sinusoid()
    source.sample("train", range(25))
    best = math.inf
    for start in range(0, 500, 25):
        begun = time.perf_counter()
        source.sample("train", range(start, start + 25))
        best = min(best, time.perf_counter() - begun)
    assert best < 2e-3
