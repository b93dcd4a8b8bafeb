"""Deployment: what a report says of models whose layers are taken out after adaptation."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import only_run

from metablocks import MetaLearner
from metablocks.cli import main
from metablocks.models import collapse_linear, fold_tnet
from metablocks.recipe import build, load
from metablocks.runs.deployment import (
    Deployment,
    ReducedFirst,
    deployment,
    reduce,
    reduced_learner,
)
from metablocks.runs.finished import read_run
from metablocks.runs.scores import Scores
from metablocks.runs.tables import deployment_text
from metablocks.runs.train import final_scores

STROKES = [
    "model.filters=4",
    "inner.steps=2",
    "outer.tasks_per_step=4",
    "outer.steps_per_epoch=4",
    "outer.epochs=2",
    "evaluation.tasks=10",
    "evaluation.every=1",
    "evaluation.inner_steps=2",
    "hardware.device=cpu",
]
SINUSOID = ["hardware.device=cpu", "model.hidden=[8]", "evaluation.inner_steps=3"]
LINNET = "surgery=[{block: append_linear, depth: 2, width: 9}]"
TNET = 'surgery=[{block: insert_tnet, layers: ["*", "!head.*"]}]'
BOTH = (
    'surgery=[{block: insert_tnet, layers: ["*", "!head.*"]}, {block: append_linear, depth: 2}]',
    'inner.adapt=["*", "!*.transform.*"]',
)


def run(out: Path, *settings: str) -> Path:
    words = [word for setting in (*STROKES, *settings) for word in ("--set", setting)]
    assert main(["run", "quickstart", *words, "--quiet", "--out", str(out)]) == 0
    return only_run(out)


def last_row(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def plain_size(recipe: str, settings: list[str]) -> int:
    """How many parameters the recipe's model has without surgery."""
    return sum(p.numel() for p in build(load(recipe, settings)).learner.model.parameters())


def sinusoid(*settings: str, spread: float = 0.3):
    """An experiment whose meta-parameters are away from where they start."""
    experiment = build(load("maml_sinusoid", [*SINUSOID, *settings]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in experiment.learner.parameters():
            parameter.add_(spread * parameter.abs().mean() * torch.randn_like(parameter))
    return experiment


def deployed(experiment, tasks: int = 6, steps: int = 3) -> Deployment:
    each = final_scores(experiment, "test", tasks=tasks, steps=steps)
    found = deployment(experiment, each)
    assert found is not None
    return found


# ---- runs


@pytest.fixture(scope="module")
def linnet(tmp_path_factory):
    rule = "inner.rule=[{block: meta_sgd, init: 0.4}]"
    return run(tmp_path_factory.mktemp("linnet"), LINNET, rule, "evaluation.ensemble=2")


def test_a_run_tells_sizes_and_both_orders(linnet, capsys):
    row = last_row(linnet)
    assert list(row) == ["test", "deployment", "ensemble"]
    found = row["deployment"]
    plain = plain_size("quickstart", STROKES)
    assert found["reductions"] == ["collapse_linear"]
    assert found["reduced_parameters"] == plain
    # Five outputs: layers [5 → 9 → 5] with biases behind the head.
    assert found["parameters"] == plain + (5 * 9 + 9) + (9 * 5 + 5)
    assert found["meta_parameters"] == 2 * found["parameters"]
    assert found["tasks"] == 4
    assert found["difference"] <= 1e-12
    assert found["left_out"] == {}
    assert main(["eval", str(linnet)]) == 0  # of the best checkpoint, as the run's
    printed = capsys.readouterr().out
    size = found["parameters"]
    assert f"deployed: {size:,} → {plain:,} parameters by collapse_linear; {2 * size:,} " in printed
    assert "  adapted, then collapsed: the same predictions up to " in printed
    first = Scores(**found["reduced_first"]["scores"])
    own = Scores(**row["test"])
    assert first.tasks == own.tasks
    line = f"  collapsed, then adapted: {first.text(2)} in place of {own.text(2)}; task by task "
    assert line in printed


def test_collapsed_first_is_a_plain_model_with_the_same_rates(linnet):
    """By hand: the collapsed model, the rates of its parameters, the same tasks."""
    experiment = build(load(str(linnet / "recipe.yaml")))
    content = torch.load(linnet / "best.pt", weights_only=True)
    experiment.learner.load_state_dict(content["learner"])
    plain = build(load(str(linnet / "recipe.yaml"), ["surgery=[]"]))
    plain.learner.model.load_state_dict(collapse_linear(experiment.learner.model).state_dict())
    rates = experiment.learner.rule.state_dict()
    mine = {name: rates[name] for name in plain.learner.rule.state_dict()}
    assert set(rates) - set(mine) == {name for name in rates if "appended" in name} != set()
    plain.learner.rule.load_state_dict(mine)
    found = last_row(linnet)["deployment"]["reduced_first"]
    scores = final_scores(plain, "test")
    # Up to the order of float32 sums.
    assert found["scores"]["loss"] == pytest.approx(scores.loss, rel=1e-5)
    assert found["scores"]["mean"] == pytest.approx(scores.mean, abs=1e-6)
    own = last_row(linnet)["test"]["mean"][-1]
    assert found["change"] == pytest.approx(scores.mean[-1] - own, abs=1e-6)


def test_eval_tells_it_of_its_own_tasks_and_steps(linnet, capsys):
    assert main(["eval", str(linnet), "--tasks", "3", "--steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "(3 tasks, float64)" in printed
    # Without a step nothing has adapted, and both orders give one function.
    assert "task by task +0.00 ± 0.00 points, no measurable difference" in printed


def test_a_finished_run_resumes_to_the_same_section(linnet, capsys):
    before = last_row(linnet)
    assert main(["run", "--resume", str(linnet), "--quiet"]) == 0
    assert "collapsed, then adapted" in capsys.readouterr().out
    assert last_row(linnet)["deployment"]["reduced_first"] == before["deployment"]["reduced_first"]


def test_compare_reads_runs_with_and_without_the_section(linnet, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for path in linnet.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    del rows[-1]["deployment"]
    (old / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    one, other = read_run(linnet), read_run(old)
    assert (one.test, one.ensemble) == (other.test, other.ensemble)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], None),
        (
            ["inner.rule=[{block: meta_curvature}, {block: learning_rate, init: 0.4}]"],
            "deployed: {plain:,} parameters; {meta:,} meta-parameters were trained",
        ),
    ],
    ids=["maml", "meta_curvature"],
)
def test_without_such_layers_there_is_one_line_at_the_most(settings, line, tmp_path, capsys):
    path = run(tmp_path, *settings, "outer.epochs=1")
    assert list(last_row(path)) == ["test"]
    printed = [row for row in capsys.readouterr().out.splitlines() if "deployed" in row]
    learner = build(load(str(path / "recipe.yaml"))).learner
    meta, plain = (sum(p.numel() for p in m.parameters()) for m in (learner, learner.model))
    assert printed == ([line.format(plain=plain, meta=meta)] if line else [])


def test_nothing_ends_a_finished_run(tmp_path, monkeypatch, capsys):
    """What goes wrong in one comparison is told; the scores and the other are there."""

    def refuse(*_, **__):
        raise RuntimeError("no float64 here")

    monkeypatch.setattr(MetaLearner, "adapt", refuse)
    found = last_row(run(tmp_path, LINNET, "outer.epochs=1"))["deployment"]
    assert found["difference"] is None
    assert found["left_out"] == {"difference": "RuntimeError: no float64 here"}
    assert found["reduced_first"]["scores"]["tasks"] == 10
    printed = capsys.readouterr().out
    assert "  adapted, then collapsed: left out: RuntimeError: no float64 here" in printed


# ---- numbers


def test_collapsed_first_is_measurably_worse_where_depth_is_what_adapts():
    """The 1-D case: a = 0, b = 1/√2α adapts at once; collapsed, c = ab moves by 2α of the way."""
    rate = 0.1
    linear = [
        "tasks={block: linear, shots: 20, queries: 20}",
        "model.hidden=[]",
        "surgery=[{block: append_linear, depth: 1}]",
        'inner.adapt=["*.weight"]',
        f"inner.rule[0].init={rate}",
        "hardware.device=cpu",
    ]
    experiment = build(load("maml_sinusoid", linear))
    head = experiment.learner.model.head
    with torch.no_grad():
        head.weight.zero_()
        head.appended[0].weight.fill_((2 * rate) ** -0.5)  # the loss has no ½
    found = deployed(experiment, tasks=200, steps=1)
    own = final_scores(experiment, "test", tasks=200, steps=1)
    assert found.difference is not None
    assert found.difference <= 1e-12
    first = found.reduced_first
    assert first is not None
    assert first.scores.final > 5 * own.final
    assert first.verdict == "measurably worse"
    assert first.change == pytest.approx(first.scores.final - own.final, rel=1e-6)
    assert deployment_text(found, own).endswith("measurably worse")


@pytest.mark.parametrize(
    ("settings", "reductions", "word"),
    [
        ([LINNET], ["collapse_linear"], "collapsed"),
        ([LINNET, 'inner.adapt=["head.*"]'], ["collapse_linear"], "collapsed"),
        ([TNET, 'inner.adapt=["*", "!*.transform.*"]'], ["fold_tnet"], "folded"),
        (list(BOTH), ["fold_tnet", "collapse_linear"], "folded and collapsed"),
    ],
    ids=["linnet", "linnet, head alone", "tnet", "both"],
)
@pytest.mark.parametrize(
    "rule",
    [
        "[{block: learning_rate, init: 0.02}]",
        "[{block: lslr, init: 0.02, beyond: last}]",
        "[{block: meta_sgd, init: 0.02}]",
        "[{block: kfo}, {block: learning_rate, init: 0.02}]",
        "[{block: kfo, adapt_transform: true, rate: 0.02}, {block: learning_rate, init: 0.02}]",
        "[{block: meta_curvature}, {block: learning_rate, init: 0.02}]",
    ],
)
def test_after_adaptation_equal_and_before_it_another(settings, reductions, word, rule):
    experiment = sinusoid(*settings, f"inner.rule={rule}")
    found = deployed(experiment)
    assert found.left_out == {}
    assert found.reductions == reductions
    assert found.reduced_parameters == plain_size("maml_sinusoid", SINUSOID) < found.parameters
    assert found.difference is not None
    assert found.difference <= 1e-12
    assert found.reduced_first is not None
    assert found.reduced_first.interval > 1e-3  # float32 rounds at 1e-6; means may cancel
    scores = final_scores(experiment, "test", tasks=6, steps=3)
    assert f"  adapted, then {word}: " in deployment_text(found, scores)


def test_folding_and_collapsing_commute():
    experiment, plain = sinusoid(*BOTH), build(load("maml_sinusoid", SINUSOID)).learner.model
    task = experiment.source.sample("test", [0])[0]
    adapted = experiment.learner.adapt(task.support).double()
    x = task.query[0].double()
    for small in (
        collapse_linear(fold_tnet(adapted)),
        fold_tnet(collapse_linear(adapted)),
        reduce(adapted),
    ):
        assert repr(small) == repr(plain)
        # The weights are float32 numbers, the products of them float64.
        torch.testing.assert_close(small(x), adapted(x), rtol=1e-12, atol=1e-12)


def test_where_the_appended_layers_do_not_adapt_both_orders_are_one():
    """BOIL: the body's gradient goes through the product of the layers, collapsed or not."""
    found = deployed(sinusoid(LINNET, 'inner.adapt=["!head.*"]'))
    assert found.reduced_first is not None
    assert abs(found.reduced_first.change) < 1e-4  # float32
    first = replace(found.reduced_first, interval=1e-4)
    assert first.verdict == "no measurable difference"


def test_per_step_norms_are_counted_as_the_one_norm_that_stays():
    per_step = "surgery=[{block: per_step_batch_norm}, {block: append_linear, depth: 1}]"
    experiment = build(load("quickstart", [*STROKES, per_step, 'inner.adapt=["*", "!*.norm.*"]']))
    found = deployed(experiment, tasks=3, steps=2)
    assert found.left_out == {}
    assert found.reduced_parameters == plain_size("quickstart", STROKES)
    assert found.meta_parameters == found.parameters + 4 * 2 * 4  # 4 norms' γ, β of the other step
    assert found.difference is not None
    assert found.difference <= 1e-12


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            # The head [4 → 9] of a model with appended layers [9 → 1] becomes [4 → 1].
            [
                "surgery=[{block: append_linear, depth: 2, width: 9, features: 1}]",
                "inner.rule=[{block: meta_sgd, init: 0.02}]",
            ],
            "what the rule has learned does not fit the reduced model: rate.linear.weight is [9, 1]"
            " there and [1, 1] here",
        ),
        (
            [LINNET, 'inner.adapt=["*.appended.*"]'],
            "only layers that are taken out adapt",
        ),
    ],
    ids=["rates do not fit", "nothing left to adapt"],
)
def test_what_cannot_be_compared_is_left_out_with_a_reason(settings, reason):
    experiment = sinusoid(*settings)
    found = deployed(experiment)
    assert found.reduced_first is None
    assert found.left_out == {"reduced_first": reason}
    assert found.difference is not None
    assert found.difference <= 1e-12
    scores = final_scores(experiment, "test", tasks=6, steps=3)
    told = deployment_text(found, scores).splitlines()[-1]
    assert told == f"  collapsed, then adapted: left out: {reason}"


def test_what_is_reduced_first_has_every_other_block_of_the_learner():
    blocks = "start={block: zeros, pattern: '*.bias'}", "batches={block: minibatches, size: 3}"
    learner = (experiment := sinusoid(LINNET, *(f"inner.{block}" for block in blocks))).learner
    reduced = reduced_learner(experiment)
    names = {"loss", "support_loss", "steps", "start", "batches", "order", "step_loss", "executor"}
    for name in names | {"norm_statistics", "estimator"}:
        assert getattr(reduced, name) == getattr(learner, name), name


def test_rates_that_fit_a_smaller_layer_are_kept():
    wide = "surgery=[{block: append_linear, depth: 2, width: 9, features: 1}]"
    found = deployed(sinusoid(wide, "inner.rule=[{block: lslr, init: 0.02, beyond: last}]"))
    assert found.left_out == {}
    assert found.reduced_first is not None


def test_the_learner_and_the_random_state_stay_as_they_are():
    experiment = sinusoid(*BOTH)
    each = final_scores(experiment, "test", tasks=6, steps=3)
    before, state = copy.deepcopy(experiment.learner.state_dict()), torch.get_rng_state()
    deployment(experiment, each)
    after = experiment.learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("measure", "tasks", "change", "interval", "verdict"),
    [
        ("accuracy", 9, -0.2, 0.1, "measurably worse"),
        ("accuracy", 9, 0.2, 0.1, "measurably better"),
        ("mse", 9, 0.2, 0.1, "measurably worse"),
        ("mse", 9, -0.2, 0.1, "measurably better"),
        ("mse", 9, 0.1, 0.1, "no measurable difference"),
        ("mse", 1, 0.2, 0.0, "no measurable difference"),
        ("mse", 9, float("nan"), float("nan"), "no measurable difference"),
    ],
)
def test_a_difference_is_measured_by_its_interval(measure, tasks, change, interval, verdict):
    scores = Scores("test", tasks, measure, [0.5], [0.1], [0.1], [0.5], [0.5])
    assert ReducedFirst(scores, change, interval).verdict == verdict
