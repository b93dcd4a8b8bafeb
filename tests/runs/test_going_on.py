"""Going on with other than what a run began with: more epochs, another recipe, another machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import FEW, only_run

from metablocks.cli import main
from metablocks.errors import RecipeError
from metablocks.recipe import load
from metablocks.runs import beginning, checkpoint
from metablocks.runs.finished import read_run
from tools.fuzzing.resume_law import same_checkpoint

pytestmark = pytest.mark.usefixtures("without_plots")
TWO = [*FEW, "--set", "outer.epochs=2"]
CONSTANT = ["--set", "outer.schedule={block: constant}"]


def trained(out: Path, *arguments: str) -> Path:
    assert main(["run", *TWO, *arguments, "--out", str(out)]) == 0
    return only_run(out)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["learner"]


def resume(run: Path, *arguments: str) -> int:
    return main(["run", "--resume", str(run), "--quiet", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_changed_recipe_is_refused_leaf_by_leaf(run, capsys):
    changes = [
        "inner.steps=3",
        "outer.optimizer.lr=0.5",
        "outer.clip={block: value, maximum: 10.0}",
    ]
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert resume(run, *(word for change in changes for word in ("--set", change))) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"{run}/checkpoint.pt was written with another recipe (")
    for part in (
        "inner.steps: 1 → 3;",
        "outer.optimizer.lr: 0.001 → 0.5",
        "maximum: absent → 10.0",
    ):
        assert part in message
    assert f"metablocks run RECIPE --from {run}" in message
    assert resume(run, "--set", "outer.epochs=1") == 1
    assert "(outer.epochs: 2 → 1)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_field_that_recipes_were_given_since_is_no_change(run):
    """As for runs of older versions: by values, and by the hash of format 2."""
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        "".join(line for line in text.splitlines(True) if "ensemble" not in line)
    )
    recipe = load(run / "recipe.yaml")
    assert recipe.at("evaluation.ensemble") == 1
    values = {**recipe.values, "evaluation": {**recipe.values["evaluation"]}}
    del values["evaluation"]["ensemble"]
    checkpoint.check_recipe(run, values, recipe)
    checkpoint.check_recipe(run, recipe.written_hash, recipe)
    assert recipe.written_hash != recipe.hash


def test_a_finished_run_of_more_epochs_goes_on_as_if_it_had_been_longer(tmp_path, capsys):
    short = trained(tmp_path / "short", *CONSTANT)
    long = trained(tmp_path / "long", *CONSTANT, "--set", "outer.epochs=4")
    before = rows(short)
    capsys.readouterr()
    assert resume(short, "--set", "outer.epochs=4") == 0
    assert "note: not as before: epochs: 2 → 4" in capsys.readouterr().out
    assert rows(short)[: len(before)] == before  # the test after 2 epochs stays
    assert [row for row in rows(short) if row not in before] == rows(long)[2:]
    same_checkpoint(short / "checkpoint.pt", long / "checkpoint.pt")
    recipe = load(short / "recipe.yaml")
    record = json.loads((short / "run.json").read_text())
    assert (recipe.at("outer.epochs"), record["recipe"]) == (4, recipe.hash)
    assert record["resumed"][0]["changed"] == {"epochs": [2, 4]}
    done = (short / "metrics.jsonl").read_bytes()
    assert resume(short) == 0  # finished once more
    assert (short / "metrics.jsonl").read_bytes() == done
    assert main(["eval", str(short)]) == 0
    (short / "metrics.jsonl").write_bytes(done[: done.rindex(b'{"test"')])  # before its second test
    with pytest.raises(RecipeError, match="this run is not finished"):
        read_run(short)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_more_epochs_have_the_rates_of_the_longer_schedule(kind, tmp_path):
    schedule = ["--set", f"outer.schedule={{block: {kind}, final: 1e-4}}"]
    long = trained(tmp_path / "long", *schedule, "--set", "outer.epochs=4")
    short = trained(tmp_path / "short", *schedule)
    assert resume(short, "--set", "outer.epochs=4") == 0
    rates = [[row["lr"] for row in rows(run) if "epoch" in row] for run in (short, long)]
    assert rates[0][2:] == rates[1][2:]
    assert len(rates[0]) == 4


def test_a_run_from_another_begins_with_its_weights(finished, tmp_path, capsys):
    still = [*CONSTANT, "--set", "outer.optimizer.lr=0.0"]
    once = [*still, "--set", "outer.epochs=1", "--from", str(finished)]
    run = trained(tmp_path / "same", *once)
    best = finished / "best.pt"
    for name, tensor in weights(best).items():
        assert torch.equal(weights(run / "checkpoint.pt")[name], tensor)
    record = json.loads((run / "run.json").read_text())["from"]
    assert record["checkpoint"] == str(best.resolve())
    assert record["weights"] == ["model", "rule"]
    assert record["epoch"] == torch.load(best, weights_only=True)["state"]["epochs"]
    assert f"weights of model and rule: {best.resolve()}, epoch" in capsys.readouterr().out
    rule = ["--set", "inner.rule=[{block: learning_rate, init: 0.5}]"]
    other = weights(trained(tmp_path / "other", *once, *rule) / "checkpoint.pt")
    assert float(other["rule.rate.*"]) == 0.5  # the recipe's: its rule is another
    assert torch.equal(other["model.head.weight"], weights(best)["model.head.weight"])


def test_weights_that_do_not_fit_are_named_and_leave_no_directory(finished, tmp_path, capsys):
    arguments = ["--from", str(finished), "--set", "model.hidden=[40]", "--out", str(tmp_path)]
    assert main(["run", *TWO, *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        f"{finished}/best.pt: a whole checkpoint that does not fit this recipe"
    )
    assert "learner.model." in message
    assert not list(tmp_path.iterdir())
    assert main(["run", "--resume", str(finished), "--from", str(finished)]) == 2
    assert "--from is for a new run" in capsys.readouterr().err


def test_another_machine_is_noted_and_said_once(run, monkeypatch, capsys):
    environment = beginning.environment

    def elsewhere(device):
        return {**environment(device), "threads": 96, "commit": "0123"}

    monkeypatch.setattr(beginning, "environment", elsewhere)
    assert resume(run) == 0
    assert "note:" not in capsys.readouterr().out  # finished: nothing is computed anew
    assert resume(run, "--set", "outer.epochs=3") == 0
    assert "threads: 1 → 96" in capsys.readouterr().out
    (entry,) = json.loads((run / "run.json").read_text())["resumed"]
    assert entry["changed"]["threads"] == [1, 96]
    assert entry["changed"]["commit"][1] == "0123"
    assert entry["step"] == 4
    assert resume(run, "--set", "outer.epochs=4") == 0
    assert "note: not as before: epochs: 3 → 4\n" in capsys.readouterr().out
