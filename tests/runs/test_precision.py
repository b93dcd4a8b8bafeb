"""bfloat16 as a recipe's precision: passes under autocast, parameters and updates in float32."""

import pytest
import torch
import torch.nn.functional as F
from small_runs import SMALL, only_run

import metablocks as mb
from metablocks.cli import main
from metablocks.models import Conv4
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


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        (
            [],
            "0.94 after 1 inner step, 0.26 after 3, -0.02 after 5, of one trained a little 0.99, 0.94",
        ),
        (["inner.order.block=first_order"], "0.69 after 3, 0.55 after 5, of one trained a little"),
        (["outer.estimator.block=adjoint"], "0.26 after 3"),
        (["inner.steps=0"], None),
        (["hardware.precision=float32"], None),
    ],
)
def test_what_bfloat16_costs_the_gradient_is_noted_where_it_is_chosen(changes, figures):
    notes = load("maml_sinusoid", [SETS[-1], *changes]).notes
    notes = [note for note in notes if "hardware.precision: bfloat16" in note]
    assert len(notes) == (figures is not None)
    assert all(figures in note and "tools/results/bfloat16.md" in note for note in notes)


def test_check_prints_that_note(capsys):
    assert main(["check", "maml_sinusoid", "--set", SETS[-1], "--set", SETS[1]]) == 0
    error = capsys.readouterr().err
    assert f"note: --set {SETS[-1]}: hardware.precision: bfloat16, in which the meta-grad" in error


def test_the_query_pass_alone_is_in_bfloat16_by_a_loss_that_calls_the_model():
    """Its gradient keeps a cosine of 0.99 where that of all passes in bfloat16 does not."""
    seen: dict[str, torch.dtype] = {}

    def support_loss(prediction, target):
        seen["support"] = prediction.dtype
        return F.cross_entropy(prediction, target)

    def query_loss(*, model, inputs, target):
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(inputs)
        seen["query"] = prediction.dtype
        return F.cross_entropy(prediction.float(), target)

    def gradient(loss, dtype=torch.float32, mixed=False):
        torch.manual_seed(0)
        model = Conv4(input_shape=source.input_shape, outputs=5, filters=8, downsample="pool")
        learner = mb.MetaLearner(
            model.to(dtype),
            loss=loss,
            support_loss=support_loss,
            steps=3,
            rule=mb.LearningRate(0.1),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            grads = learner.meta_gradient(tasks.to(dtype)).grads
        return torch.cat([g.double().flatten() for g in grads.values()])

    source = mb.tasks.Strokes(ways=5, shots=1, queries=5)
    tasks = source.sample("train", range(2))
    exact = gradient(F.cross_entropy, torch.float64)
    whole = gradient(F.cross_entropy, mixed=True)
    assert seen.pop("support") == torch.bfloat16
    query = gradient(query_loss)
    assert seen == {"support": torch.float32, "query": torch.bfloat16}
    assert (
        F.cosine_similarity(whole, exact, dim=0) < 0.99 < F.cosine_similarity(query, exact, dim=0)
    )
