"""Tests that need the pretend device: `pytest --device pretend tests/on_pretend_device.py`.

`test_pretend_device.py` runs them in both ways, `pretend` and `pretend-mps`.
"""

import json
from pathlib import Path

import pretend_device
import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from pretend_device import Memory, Waits
from torch import nn

import metablocks as mb
from metablocks.cli import main
from metablocks.devices import has_float64
from metablocks.errors import ExecutorError
from metablocks.recipe import build, load
from metablocks.runs.state import TrainingState
from metablocks.runs.train import meta_step

FEW = [
    f"--set={name}={count}"
    for name, count in {
        "outer.epochs": 1,
        "outer.tasks_per_step": 4,
        "evaluation.tasks": 4,
        "evaluation.inner_steps": 2,
    }.items()
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two meta-steps on the device, which `device: auto` picks, and the same on the CPU."""
    folder = tmp_path_factory.mktemp("runs")
    for place in ("auto", "cpu"):
        arguments = [f"--set=hardware.device={place}", f"--out={folder / place}", "--quiet"]
        assert (
            main(["run", "maml_sinusoid", *FEW, "--set=outer.steps_per_epoch=2", *arguments]) == 0
        )
    return [next((folder / place).iterdir()) for place in ("auto", "cpu")]


def test_a_run_is_on_the_device_and_has_the_scores_of_the_cpu(runs):
    record = json.loads((runs[0] / "run.json").read_text())
    assert record["device"] == "pretend" + " (a pretended GPU)" * has_float64("pretend")
    lines = [(run / "metrics.jsonl").read_text().splitlines()[-1] for run in runs]
    ours, theirs = (json.loads(line)["test"]["mean"] for line in lines)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_it_is_evaluated_resumed_and_compared_in_processes_of_their_own(
    runs, tmp_path, monkeypatch, request
):
    name = request.config.getoption("--device")
    for variable, value in pretend_device.installed(name, tmp_path).items():
        monkeypatch.setenv(variable, value)
    assert main(["eval", str(runs[0]), "--steps", "3"]) == 0
    assert main(["run", "--resume", str(runs[0]), "--quiet"]) == 0
    arguments = ["--steps=2", f"--out={tmp_path / 'comparisons'}", "--quiet"]
    assert main(["compare", str(runs[0]), "fomaml_sinusoid", *FEW, *arguments]) == 0
    (record,) = Path(tmp_path).glob("comparisons/*/runs/*/run.json")
    assert json.loads(record.read_text())["device"].startswith("pretend")


def test_a_run_of_the_cpu_goes_on_there_which_is_said_and_a_step_is_replayed(runs, capsys):
    longer = ["--set=outer.epochs=2", "--device=pretend", "--quiet"]
    assert main(["run", "--resume", str(runs[1]), *longer]) == 0
    assert "device: cpu → pretend" in capsys.readouterr().out
    assert main(["replay", str(runs[1]), "--step=3", "--device=pretend"]) == 0
    assert "every gradient is finite" in capsys.readouterr().out


def test_verify_holds_and_gradients_are_checked(capsys):
    assert main(["verify", "learning_rate", "--device", "pretend", "--examples", "2"]) == 0
    assert main(["check", "--gradients", "maml_sinusoid"]) == 0
    on_cpu = "on the CPU, as pretend has no float64" in capsys.readouterr().out
    assert on_cpu != has_float64("pretend")


def test_a_recipe_in_float64_is_refused_with_the_way_out_if_the_device_has_none(capsys):
    status = main(["check", "maml_sinusoid", "--set", "hardware.precision=float64"])
    assert status == (0 if has_float64("pretend") else 2)
    refusal = "hardware.precision: pretend has no float64; take precision: float32, or device: cpu"
    assert (refusal in capsys.readouterr().err) != has_float64("pretend")


def test_a_meta_step_waits_for_the_device_three_times():
    """Is the loss finite, is the gradient, and the loss for the log."""
    settings = [setting.removeprefix("--set=") for setting in FEW]
    experiment, state = build(load("maml_sinusoid", settings)), TrainingState()
    waits = []
    for number in range(3):
        before = Waits.count
        state.record(meta_step(experiment, number, mb.Progress()))
        waits.append(Waits.count - before)
    assert waits[1:] == [3, 3]


# ---- memory


@pytest.fixture
def limited(monkeypatch):
    """Limit the device to so many times what `Loop` needs beyond what is held."""
    small = problem.regression(tasks=8, steps=2, device="pretend")
    learner = small.learner()
    learner.meta_gradient(small.tasks)  # with the check of the first call
    held = Memory.peak = Memory.used
    learner.meta_gradient(small.tasks)
    need = Memory.peak - held

    def limit(factor):
        monkeypatch.setattr(Memory, "capacity", held + int(factor * need))
        return learner, small.tasks

    return limit


def test_an_executor_that_runs_out_of_memory_is_not_chosen(limited, caplog):
    caplog.set_level("INFO", "metablocks")
    learner, tasks = limited(3)
    choice = mb.choose_executor(learner, tasks)
    tried = {name.partition(" with")[0] for name in choice.costs}
    assert "Loop()" in tried
    assert "Vmap()" not in tried
    assert "is left out: pretend backend out of memory" in caplog.text
    learner.executor = choice.executor
    learner.meta_gradient(tasks)


def test_a_device_too_small_for_one_task_is_an_error_with_ways_out(limited):
    with pytest.raises(
        ExecutorError, match=r"no memory for one task at a time: pretend .*Take fewer"
    ):
        mb.choose_executor(*limited(0.5))


def test_a_budget_is_held_or_said_not_to_be(limited):
    learner, tasks = limited(1000)
    words = (
        "no executor keeps to" if has_float64("pretend") else "is not held: torch counts no memory"
    )
    with pytest.warns(UserWarning, match=f"memory=1 {words}|{words} memory=1"):
        choice = mb.choose_executor(learner, tasks, memory=1)
    assert ("unknown amount" in choice.reason) != has_float64("pretend")


# ---- default device, threads, traces


class Positions(nn.Module):
    """Makes a tensor without naming a device, as much code does under a default device."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x) + torch.arange(len(x), dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    "executor",
    [mb.Loop(), mb.Loop(workers=2), mb.Vmap(), mb.Vmap(compile="trace")],
    ids=repr,
)
def test_a_learner_made_under_a_default_device_computes_there(executor):
    losses = []
    for place in ("pretend", "cpu"):
        with torch.device(place):
            model, x = Positions(), torch.ones(4, 3, 1)
            model.load_state_dict({"linear.weight": torch.ones(1, 1), "linear.bias": torch.ones(1)})
            learner = mb.MetaLearner(
                model, loss=F.mse_loss, steps=2, rule=mb.LearningRate(0.01), executor=executor
            )
            learner.meta_gradient(mb.TaskBatch((x, x), (x, x)))
            losses.append(learner.meta_gradient(mb.TaskBatch((x, x), (x, x))).loss)
    assert losses[0].device.type == "pretend"
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
