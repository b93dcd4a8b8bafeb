"""bfloat16 as a recipe's precision: passes under autocast, parameters and updates in float32."""

import pytest
import torch
from small_runs import SMALL, only_run

from metablocks.cli import main
from metablocks.recipe import build, load
from metablocks.runs.train import final_scores, meta_step
from metablocks.types import Progress

SETS = ["outer.tasks_per_step=3", "hardware.device=cpu", "hardware.precision=bfloat16"]


def test_passes_are_in_bfloat16_and_masters_in_float32():
    loop = "hardware.executor={block: loop, workers: 1, channels_last: false, compile: false}"
    experiment = build(load("maml_sinusoid", [*SETS, loop]))
    seen = set()
    loss = experiment.learner.loss

    def look(prediction, target):
        seen.add(prediction.dtype)
        return loss(prediction, target)

    experiment.learner.loss = look
    result = meta_step(experiment, 0, Progress())
    final_scores(experiment, "validation", tasks=2)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in experiment.learner.parameters()} == {torch.float32}
    assert {g.dtype for g in result.grads.values()} == {torch.float32}
    exact = build(load("maml_sinusoid", SETS[:-1]))
    due = meta_step(exact, 0, Progress()).grads
    error = sum(float((result.grads[n] - g).square().sum()) for n, g in due.items()) ** 0.5
    norm = sum(float(g.square().sum()) for g in due.values()) ** 0.5
    assert 1e-4 < error / norm < 0.1  # 8 bits of mantissa through two passes


def test_a_run_learns_in_bfloat16(tmp_path, capsys):
    more = [w for s in (*SETS[1:], "outer.epochs=2") for w in ("--set", s)]
    assert main(["run", *SMALL, *more, "--out", str(tmp_path), "--quiet"]) == 0
    assert "precision: bfloat16" in (only_run(tmp_path) / "recipe.yaml").read_text()


def test_vmap_over_batch_norm_is_refused_when_built(capsys):
    given = ["check", "quickstart", "--set", "hardware.precision=bfloat16", "--set"]
    assert main([*given, "hardware.executor={block: vmap, chunk: null, compile: false}"]) == 2
    error = capsys.readouterr().err
    assert "vmap does not run batch norm (body.0.norm) in bfloat16; take the block loop" in error
    assert main([*given, "hardware.executor={block: auto, memory: null, compile: false}"]) == 0


@pytest.mark.parametrize("precision", ["float16", "bf16"])
def test_other_precisions_are_refused(precision, capsys):
    assert main(["check", "maml_sinusoid", "--set", f"hardware.precision={precision}"]) == 2
    assert "bfloat16" in capsys.readouterr().err
