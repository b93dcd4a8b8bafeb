"""The ensemble of the best checkpoints: who is in it, what it scores, and that no kill upsets it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import SMALL, only_run

from metablocks.cli import main
from metablocks.recipe import build, load
from metablocks.runs import Scores, checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import pool
from metablocks.runs.state import TrainingState
from tools.fuzzing.resume_law import same_checkpoint

STROKES = [
    "quickstart",
    *("--set", "model.filters=4"),
    *("--set", "outer.tasks_per_step=4"),
    *("--set", "outer.steps_per_epoch=3"),
    *("--set", "outer.epochs=4"),
    *("--set", "evaluation.tasks=12"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.inner_steps=2"),
    *("--set", "hardware.device=cpu"),
]
THREE = ["--set", "evaluation.ensemble=3", "--set", "evaluation.every=1"]


@pytest.fixture(scope="module", autouse=True)
def _without_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metablocks.runs.plots.draw", lambda directory: [])
        yield


def run(out: Path, *arguments: str) -> Path:
    assert main(["run", *arguments, "--quiet", "--out", str(out)]) == 0
    return only_run(out)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def members_of(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("epoch-*"))


@pytest.fixture(scope="module")
def strokes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("strokes"), *STROKES, *THREE)


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory):
    """The run that interrupted ones are compared with."""
    return run(tmp_path_factory.mktemp("sinusoid"), *SMALL, *THREE)


def best_three(run: Path) -> list[int]:
    """By the log: the three best epochs, the best first, the earlier of equals first."""
    judged = [(row["epoch"], row["validation"]) for row in rows(run) if "epoch" in row]
    sign = -1 if judged[0][1]["measure"] == "accuracy" else 1
    return [epoch for epoch, _ in sorted(judged, key=lambda pair: sign * pair[1]["mean"][-1])][:3]


def mean_prediction(run: Path, members: list[int], steps: int):
    """The members' mean prediction on all test tasks at once, and the targets."""
    experiment = build(load(str(run / "recipe.yaml")))
    tasks = experiment.source.sample("test", range(experiment.evaluation.tasks))
    tasks = tasks.to(experiment.dtype)
    predictions = []
    for epoch in members:
        content = torch.load(run / f"epoch-{epoch}.pt", weights_only=True)
        experiment.learner.load_state_dict(content["learner"])
        predictions.append(experiment.learner.evaluate(tasks, steps=steps).predictions)
    return torch.stack(predictions).mean(0), tasks.query[1]


def test_an_ensemble_of_classifiers_is_the_mean_of_its_members_logits(strokes):
    test = rows(strokes)[-1]["ensemble"]
    assert test["members"] == best_three(strokes)
    before = torch.load(strokes / "previous.pt", weights_only=True)["state"]["ranking"]
    kept = {*test["members"], *(epoch for epoch, _ in before)}  # of both checkpoints
    assert members_of(strokes) == sorted(f"epoch-{epoch}.pt" for epoch in kept)
    assert test["inner_steps"] == 2
    logits, targets = mean_prediction(strokes, test["members"], steps=2)
    hits = (logits.argmax(-1) == targets).double().mean(1)
    losses = [F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    # The tasks run in other batches here, in float32.
    assert test["mean"] == pytest.approx([float(hits.mean())], abs=1e-6)
    assert test["std"] == pytest.approx([float(hits.std())], abs=1e-6)
    assert test["worst_decile"] == pytest.approx([float(hits.sort().values[:2].mean())], abs=1e-6)
    assert test["loss"] == pytest.approx([float(sum(losses)) / 12], rel=1e-4)


def test_an_ensemble_in_regression_is_the_mean_of_its_members_predictions(sinusoid):
    test = rows(sinusoid)[-1]["ensemble"]
    assert test["members"] == best_three(sinusoid)
    assert test["measure"] == "mse"
    predictions, targets = mean_prediction(sinusoid, test["members"], steps=10)
    errors = (predictions - targets).square().flatten(1).mean(1)
    assert test["mean"] == test["loss"] == pytest.approx([float(errors.mean())], rel=1e-4)
    assert test["worst_decile"] == pytest.approx([float(errors.max())], rel=1e-4)


def test_the_single_best_checkpoint_is_tested_as_without_an_ensemble(strokes, tmp_path):
    alone = run(tmp_path, *STROKES)
    assert members_of(alone) == []
    assert rows(alone) == [*rows(strokes)[:-1], {"test": rows(strokes)[-1]["test"]}]


@pytest.mark.parametrize("recipe", [STROKES, SMALL], ids=["strokes", "sinusoid"])
def test_an_ensemble_of_one_scores_what_its_checkpoint_scores(recipe, tmp_path, capsys):
    last = rows(run(tmp_path, *recipe, *THREE, "--set", "outer.epochs=1"))[-1]
    assert last["ensemble"]["members"] == [1]
    for name in ("mean", "interval", "std", "worst_decile", "loss"):
        (value,) = last["ensemble"][name]
        assert value == pytest.approx(last["test"][name][-1], rel=1e-5)  # float32 against float64
    printed = capsys.readouterr().out
    assert "ensemble of the best validation checkpoint: mean" in printed
    assert "(epoch 1; 3 asked for, 1 validated)" in printed


def test_eval_judges_the_ensemble_as_the_run_did(strokes, capsys):
    last = rows(strokes)[-1]["ensemble"]
    scores = Scores(**last)
    assert main(["eval", str(strokes), "--checkpoint", "ensemble"]) == 0
    printed = capsys.readouterr().out
    epochs = ", ".join(map(str, last["members"]))
    assert (
        f"ensemble of the 3 best validation checkpoints: mean logits (epochs {epochs})" in printed
    )
    assert scores.text(0) in printed
    arguments = [
        "--checkpoint",
        "ensemble",
        "--tasks",
        "5",
        "--steps",
        "4",
        "--split",
        "validation",
    ]
    assert main(["eval", str(strokes), *arguments]) == 0
    assert "validation, 5 tasks" in capsys.readouterr().out


def test_eval_says_that_a_run_kept_only_its_best_checkpoint(tmp_path, capsys):
    alone = run(tmp_path, *SMALL, "--set", "outer.epochs=1")
    assert main(["eval", str(alone), "--checkpoint", "ensemble"]) == 2
    assert "kept one checkpoint, the best; to keep more, train with" in capsys.readouterr().err


def assert_same_run(one: Path, other: Path) -> None:
    """The same files; logs and every checkpoint bit for bit."""
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in one.iterdir()) == names
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    epochs = [json.loads(line)["epoch"] for line in (one / "times.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    for name in (name for name in names if name.endswith(".pt")):
        same_checkpoint(one / name, other / name)


class Killed(KeyboardInterrupt):
    """Ends the command where it stands, as a kill does."""


@pytest.mark.parametrize("epoch", [2, 4])
@pytest.mark.parametrize("place", ["before the checkpoint counts", "before the deletion"])
def test_a_kill_at_the_worst_moment_loses_no_member(place, epoch, sinusoid, tmp_path, monkeypatch):
    """At epoch 4 the first drops out of the best three; at epoch 2 none does."""
    save, keep = checkpoint.save, RunDirectory.keep_members
    mse = [row["validation"]["mean"][-1] for row in rows(sinusoid)[:-1]]
    assert mse[0] > max(mse[1:4])

    def save_or_die(path, experiment, state, **options):
        if path.name == "checkpoint.pt" and state.epochs == epoch:
            raise Killed
        save(path, experiment, state, **options)

    def keep_or_die(directory, epochs):
        if f'"epoch": {epoch},' in directory.metrics.read_text():
            raise Killed
        keep(directory, epochs)

    with monkeypatch.context() as patch:
        if place == "before the deletion":
            patch.setattr(RunDirectory, "keep_members", keep_or_die)
        else:
            patch.setattr(checkpoint, "save", save_or_die)
        assert main(["run", *SMALL, *THREE, "--quiet", "--out", str(tmp_path)]) == 130
    run = only_run(tmp_path)
    if (run / "checkpoint.pt").exists():
        ranking = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["ranking"]
        assert {f"epoch-{epoch}.pt" for epoch, _ in ranking} <= set(members_of(run))
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert_same_run(run, sinusoid)


def test_a_recipe_without_the_key_has_no_ensemble(tmp_path):
    text = load("maml_sinusoid").to_yaml()
    old = tmp_path / "old.yaml"
    old.write_text("".join(line for line in text.splitlines(True) if "ensemble" not in line))
    assert build(load(str(old), ["hardware.device=cpu"])).evaluation.ensemble == 1


def test_epochs_that_diverged_rank_last():
    state = TrainingState()
    for epoch, mse in enumerate([math.nan, 3.0, math.nan, 2.0, math.inf], 1):
        values = torch.tensor([[mse]])
        state.judge(epoch, pool("validation", "mse", values, values), keep=4)
    assert state.members == [4, 2, 1, 3]
    assert state.best_epoch == 4
