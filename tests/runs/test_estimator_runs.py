"""Runs with Reptile and the implicit gradient: what is logged, resumed and scheduled."""

import json

import pytest
import torch
from small_runs import only_run
from torch import nn

from metablocks.cli import main
from metablocks.recipe import build, load
from metablocks.recipe.outer import linear
from metablocks.runs.train import meta_step
from metablocks.types import Progress
from tools.fuzzing import resume_law

SMALL = [
    "outer.tasks_per_step=3",
    "outer.steps_per_epoch=4",
    "outer.epochs=2",
    "evaluation.tasks=3",
]


def small(name):
    return build(load(name, [*SMALL, "hardware.device=cpu"]))


def epochs(out):
    rows = map(json.loads, (only_run(out) / "metrics.jsonl").read_text().splitlines())
    found = [row for row in rows if "epoch" in row]
    assert len(found) == 2
    return found


def test_what_an_estimator_says_is_logged_as_the_mean_over_the_epoch(tmp_path, capsys):
    sets = [part for given in SMALL for part in ("--set", given)]
    assert main(["run", "imaml_sinusoid", "--out", str(tmp_path), *sets]) == 0
    logged = [row["metrics"] for row in epochs(tmp_path)]
    experiment = small("imaml_sinusoid")
    metrics = [meta_step(experiment, number, Progress()).metrics for number in range(4)]
    for name in ("cg_residual", "inner_gradient"):
        mean = sum(float(each[name]) for each in metrics) / len(metrics)
        assert logged[0][name] == pytest.approx(mean, rel=1e-5)


def test_a_run_of_an_estimator_that_says_nothing_has_no_such_key(tmp_path, capsys):
    sets = [part for given in SMALL for part in ("--set", given)]
    assert main(["run", "reptile_sinusoid", "--out", str(tmp_path), *sets]) == 0
    assert not any("metrics" in row for row in epochs(tmp_path))


@pytest.mark.parametrize("name", ["imaml_sinusoid", "reptile_sinusoid"])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_bit_for_bit(name):
    resume_law.goes_on_bit_for_bit(lambda: small(name), first=1, then=2)


def test_a_linear_schedule_takes_every_group_to_its_end_and_can_be_restored():
    def made():
        groups = [{"params": list(nn.Linear(1, 1).parameters()), "lr": lr} for lr in (1.0, 0.5)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, linear(optimizer, final=0.1, epochs=4)

    (optimizer, schedule), (other, restored) = made(), made()
    rates = []
    for epoch in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        if epoch == 2:
            other.load_state_dict(optimizer.state_dict())
            restored.load_state_dict(schedule.state_dict())
        optimizer.step()
        schedule.step()
    lines = [[lr + (0.1 - lr) * min(epoch / 4, 1) for lr in (1.0, 0.5)] for epoch in range(6)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(lines))
    other.step()
    restored.step()
    assert [group["lr"] for group in other.param_groups] == rates[3]
