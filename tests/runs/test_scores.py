"""Scores: statistics over tasks, against numbers worked out by hand; and what an epoch cost."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from metablocks.memory import forget_peak, peak_memory
from metablocks.recipe import build, load
from metablocks.runs import Scores, accuracy, score
from metablocks.runs.scores import difference, pool, pool_seeds
from metablocks.runs.state import TrainingState
from metablocks.runs.train import Meter, Stopped


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize(
    ("measure", "values", "mean", "std", "worst"),
    [
        # one task is its own worst tenth
        ("accuracy", [0.25], 0.25, None, 0.25),
        # (2² + 0 + 2²) / 2 = 4; the worst tenth of 3 tasks is one task
        ("mse", [1.0, 3.0, 5.0], 3.0, 2.0, 5.0),
        ("accuracy", [1.0, 3.0, 5.0], 3.0, 2.0, 1.0),
        # 10 tasks: one; nine at 1 and one at 11 have mean 2 and variance (9 + 81) / 9 = 10
        ("mse", [1.0] * 9 + [11.0], 2.0, 10**0.5, 11.0),
        ("accuracy", [1.0] * 9 + [11.0], 2.0, 10**0.5, 1.0),
        # 11 tasks: two, rounded up
        ("accuracy", [0.0, 0.5] + [1.0] * 9, 9.5 / 11, None, 0.25),
        ("mse", [0.0, 2.0, 4.0] + [1.0] * 8, 14 / 11, None, 3.0),
    ],
)
def test_spread_and_worst_decile_are_those_worked_out_by_hand(measure, values, mean, std, worst):
    scores = pool("test", measure, column(*values), column(*values))
    assert scores.mean == pytest.approx([mean], abs=1e-12)
    assert scores.worst_decile == pytest.approx([worst], abs=1e-12)
    if std is not None:
        assert scores.std == pytest.approx([std], abs=1e-12)
        # tables of Student's t at 97.5 % with 2, 9 and 10 degrees of freedom
        errors = {3: 4.302652729749, 10: 2.262157162798, 11: 2.228138851986}[len(values)]
        assert scores.interval == pytest.approx([errors * std / len(values) ** 0.5], abs=1e-9)


def test_from_thirty_tasks_on_an_interval_is_1_96_standard_errors():
    values = torch.rand(30, 2, dtype=torch.float64)
    expected = (1.96 * values.std(0) / 30**0.5).tolist()
    assert pool("test", "mse", values, values).interval == pytest.approx(expected, abs=1e-12)
    few = pool("test", "mse", values[:29], values[:29])
    expected = (2.048407141795 * values[:29].std(0) / 29**0.5).tolist()
    assert few.interval == pytest.approx(expected, abs=1e-9)


def test_one_task_has_no_interval():
    scores = pool("test", "accuracy", column(0.25), column(0.25))
    assert (scores.text(0), *scores.spread_text(0)) == ("25.00 % ± –", "–", "25.00 %")
    two = pool_seeds([scores, pool("test", "accuracy", column(0.75), column(0.75))])
    assert two.mean == [0.5]
    assert two.interval == pytest.approx([12.706204736175 * 0.125**0.5 / 2**0.5], abs=1e-9)
    assert pool_seeds([scores]).text(0) == "25.00 % ± –"


@pytest.mark.parametrize("count", [2, 3, 4, 10, 29])
def test_small_samples_miss_their_mean_as_often_as_they_say(count):
    """5 % of 20 000 samples of a normal variable, whose mean is known."""
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(count, 20_000, generator=draw, dtype=torch.float64)
    scores = pool("test", "mse", values, values)
    missed = torch.tensor(scores.mean).abs() > torch.tensor(scores.interval)
    assert 0.045 < float(missed.double().mean()) < 0.055


def test_scores_by_task_come_back_from_a_log():
    values = torch.rand(5, 3, dtype=torch.float64)
    scores = pool("test", "mse", values, values)
    again = Scores.from_dict(json.loads(json.dumps(scores.as_dict(by_task=True))))
    assert again == scores
    assert torch.equal(again.by_task, values)
    assert Scores.from_dict(scores.as_dict()).by_task is None


def test_a_difference_is_taken_task_by_task():
    easy = torch.rand(50, 3, dtype=torch.float64)
    one, other = (pool("test", "mse", v, v) for v in (easy + 0.01, easy[:, 1:]))
    gap = difference(one, other)
    assert gap.mean == pytest.approx([0.01], abs=1e-12)
    assert gap.interval == pytest.approx([0.0], abs=1e-12)
    for wrong in (Scores.from_dict(other.as_dict()), pool("test", "mse", easy[1:], easy[1:])):
        with pytest.raises(ValueError, match="of equally many tasks"):
            difference(one, wrong)


def test_the_worst_tasks_are_chosen_anew_at_each_step():
    values = torch.tensor([[0.0, 0.9], [0.5, 0.2]], dtype=torch.float64)
    assert pool("test", "accuracy", values, values).worst_decile == [0.0, 0.2]


def test_a_task_that_diverged_is_among_the_worst():
    scores = pool("test", "mse", column(1.0, float("nan"), 2.0), column(0.0, 0.0, 0.0))
    assert scores.worst_decile == pytest.approx([float("nan")], nan_ok=True)


def test_scores_do_not_depend_on_how_tasks_are_batched():
    experiment = build(load("maml_sinusoid", ["hardware.device=cpu"]))
    one, other = (
        score(experiment.learner, experiment.source, "test", tasks=7, steps=2, batch=batch)
        for batch in (2, 7)
    )
    assert one.mean == pytest.approx(other.mean, rel=1e-5)  # float32, summed in another order
    for name in ("interval", "std", "worst_decile", "loss"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)


def test_scores_as_people_write_them():
    values = [[0.5, 0.75], [0.01, 0.02], [0.1, 0.2], [0.0, 0.5], [1.0, 0.5]]
    percent, error = Scores("test", 600, "accuracy", *values), Scores("test", 600, "mse", *values)
    assert (percent.text(1), *percent.spread_text(1)) == ("75.00 ± 2.00 %", "20.00 %", "50.00 %")
    assert (error.text(1), *error.spread_text(1)) == ("0.7500 ± 0.0200", "0.2000", "0.5000")
    assert Scores(**json.loads(json.dumps(percent.as_dict()))) == percent


def test_the_best_epoch_is_the_earliest_of_those_that_score_best():
    def best(measure: str, *finals: float) -> int | None:
        state = TrainingState()
        for epoch, final in enumerate(finals, 1):
            state.judge(epoch, pool("test", measure, column(final), column(0.0)), keep=1)
        return state.best_epoch

    assert best("mse", 3.0, 3.0, 2.0, 2.0) == 3
    assert best("accuracy", 0.2, 0.3, 0.3, 0.1) == 2
    assert best("mse", float("nan"), 2.0, float("nan")) == 2
    assert best("mse", float("nan"), float("inf")) == 1


def test_accuracy_is_the_share_of_hits():
    assert float(accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))) == 0.75


@pytest.fixture
def clock(monkeypatch):
    """Moves the meter's clock by some seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_lap_counts_training_apart_and_starts_anew(clock):
    meter = Meter(torch.device("cpu"))
    with meter.training():
        clock(2)
    clock(3)
    first, second = meter.lap(), meter.lap()
    assert (first["training_seconds"], first["seconds"]) == (2, 5)
    assert (second["training_seconds"], second["seconds"]) == (0, 0)


def test_a_meter_goes_on_where_a_stopped_one_was(clock):
    before = Meter(torch.device("cpu"), {"seconds": 100.0, "training_seconds": 90.0})
    with contextlib.suppress(Stopped), before.training():
        clock(2)
        raise Stopped
    assert before.spent() == {"seconds": 102, "training_seconds": 92}
    after = Meter(torch.device("cpu"), before.spent())
    clock(1)
    first, second = after.lap(), after.lap()
    assert (first["training_seconds"], first["seconds"]) == (92, 103)
    assert (second["training_seconds"], second["seconds"]) == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
def test_what_was_held_before_training_does_not_hide_what_training_holds():
    held = torch.ones(64, 2**20)  # 256 MiB, as of data while it is read
    del held
    meter = Meter(torch.device("cpu"))
    held = torch.ones(32, 2**20)
    cost = meter.lap()
    beyond = cost["peak_memory"] - cost["memory_at_start"]
    assert abs(beyond - held.nbytes) < 16 * 2**20


def test_peak_memory_is_in_bytes_and_does_not_fall():
    cpu, slack = torch.device("cpu"), 4 * 2**20  # the kernel counts in batches of pages
    forget_peak(cpu)
    before = peak_memory(cpu)
    held = torch.ones(64, 2**20)  # 256 MiB
    grown = peak_memory(cpu)
    assert 10 * 2**20 < before <= grown + slack
    assert grown >= held.nbytes
    del held
    assert peak_memory(cpu) >= grown - slack
