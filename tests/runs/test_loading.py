"""`load_run` gives the learner, the tasks and the recipe of a run."""

import json

import pytest
import torch

import metablocks as mb
from metablocks.errors import BlockError, RecipeError, RunError


def test_the_loaded_learner_scores_what_the_run_did(run):
    tested = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    learner, source, recipe = mb.load_run(run, device="cpu")
    tasks = source.sample("test", range(recipe.at("evaluation.tasks")))
    losses = learner.evaluate(tasks, steps=recipe.at("evaluation.inner_steps")).query_losses
    assert losses.mean(0).tolist() == pytest.approx(tested["loss"], rel=1e-5)


def test_the_last_checkpoint_is_loaded_without_the_best(run):
    (run / "best.pt").unlink()
    with pytest.raises(RunError, match=r"best\.pt: no such checkpoint, .* the last is there"):
        mb.load_run(run)
    device = torch.device("cpu")
    assert mb.load_run(str(run), checkpoint="last", device=device).learner.steps == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folder": "nowhere"}, RecipeError, "nowhere: no such folder"),
        ({"folder": "."}, RecipeError, "it is not the folder of a run"),
        ({"checkpoint": "worst"}, BlockError, "load_run checkpoint is 'worst'"),
    ],
)
def test_what_is_no_run_is_refused(options, error, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        mb.load_run(**{"folder": run, **options})
