"""MAML++ in recipes: what it changes, its schedules, and that each part can be switched off."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import metablocks as mb
from metablocks.models import Conv4
from metablocks.recipe import build, load

PARTS = ("MSL", "LSLR", "BNWB", "BNRS", "DA", "CA")
SMALL = [
    "tasks.ways=2",
    "tasks.queries=2",
    "tasks.size=16",
    "model.filters=3",
    "outer.tasks_per_step=2",
    "outer.epochs=8",
    "inner.steps=3",
    "surgery[0].statistics=running",
    "hardware.device=cpu",
]
OFF = {
    "MSL": ["outer.step_loss.block=final"],
    "LSLR": ["inner.rule[0]={block: learning_rate, init: 0.1}"],
    "BNWB": ["surgery[0].affine=shared"],
    "BNRS": ["surgery[0].statistics=batch"],
    "DA": ["inner.order.block=second_order"],
    "CA": ["outer.schedule.block=constant"],
}


def test_maml_pp_differs_from_maml_by_exactly_its_own_keys():
    def leaves(value, path=""):
        if isinstance(value, dict):
            return {k: v for n, x in value.items() for k, v in leaves(x, f"{path}.{n}").items()}
        return {path.removeprefix("."): value}

    one, other = (
        leaves(load(name).values) for name in ("maml_omniglot_5w1s", "maml_pp_omniglot_5w1s")
    )
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert changed == {
        "name",
        "cite",
        "surgery",  # BNRS, BNWB
        "inner.adapt",  # γ and β are for the outer loop
        "inner.rule",  # LSLR
        "inner.steps",
        "inner.order.block",  # DA
        "inner.order.first_order_epochs",
        "outer.step_loss.block",  # MSL
        "outer.step_loss.epochs",
        "evaluation.inner_steps",
        "evaluation.ensemble",
    }
    # CA is in both: the plain recipe has it too, to learn within its budget.
    assert one["outer.schedule.block"] == other["outer.schedule.block"] == "cosine"


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("msl", {"outer"}),
        ("lslr", {"inner"}),
        ("bn", {"surgery", "inner"}),
    ],
)
def test_an_ablation_differs_by_its_part_alone(part, changed):
    one, other = (load(n).values for n in ("maml_omniglot_20w1s", f"maml_{part}_omniglot_20w1s"))
    assert {key for key in one if one[key] != other[key]} == {"name", "cite", *changed}
    whole = load("maml_pp_omniglot_20w1s").values
    for section, field in (("outer", "step_loss"), ("inner", "rule"), ("inner", "adapt")):
        if other[section][field] != one[section][field]:
            assert other[section][field] == whole[section][field]


@pytest.mark.parametrize("epoch", [0, 1, 9, 10, 29, 30, 31, 45, 89])
def test_the_schedules_of_the_recipe_are_the_formulas(epoch):
    """MSL, DA, CA at several epochs of maml_pp_omniglot_20w1s, against the equations by hand."""
    experiment = build(load("maml_pp_omniglot_20w1s", ["hardware.device=cpu"]))
    learner, progress = experiment.learner, mb.Progress(epoch)
    steps, annealing, epochs = 5, 10, 90
    early = max(1 / steps - epoch / (steps * annealing), 0.03 / steps)
    weights = [0, *[early] * 4, 1 - 4 * early] if epoch < annealing else [0, 0, 0, 0, 0, 1]
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(learner.step_loss(steps, progress), expected)
    assert [learner.order(k, steps, progress) for k in range(steps)] == [epoch >= 30] * steps
    for _ in range(epoch):
        experiment.optimizer.step()
        experiment.scheduler.step()
    rate = 1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    assert experiment.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)


def test_the_rates_of_the_recipe_are_one_per_tensor_and_step():
    """LSLR at its start: [steps] rates for each adapted tensor, all 0.1, γ and β without any."""
    learner = build(load("maml_pp_omniglot_20w1s", ["hardware.device=cpu"])).learner
    rates = {n: p for n, p in learner.named_parameters() if n.startswith("rule.")}
    assert set(rates) == {f"rule.rate.{name}" for name in learner.adapted}
    assert len(rates) == 10
    assert not any(".norm." in name for name in rates)
    for rate in rates.values():
        torch.testing.assert_close(rate.detach(), torch.full((5,), 0.1))
    shapes = {n: tuple(p.shape) for n, p in learner.named_parameters() if ".norm." in n}
    assert set(shapes.values()) == {(5, 64)}
    assert len(shapes) == 8


def assembled(parts):
    """The learner of the small recipe by hand, with some parts of MAML++ and without the others."""
    recipe = load("maml_pp_strokes", SMALL)
    torch.manual_seed(recipe.at("seed"))
    model = Conv4(input_shape=(1, 16, 16), outputs=2, filters=3)
    if parts & {"BNWB", "BNRS"}:
        model = mb.per_step_batch_norm(
            model,
            3,
            statistics="running" if "BNRS" in parts else "batch",
            affine="per_step" if "BNWB" in parts else "shared",
            beyond="last",
        )
    learner = mb.MetaLearner(
        model,
        loss=F.cross_entropy,
        steps=3,
        adapt=["*", "!*.norm.*"],
        rule=mb.lslr(0.1, beyond="last") if "LSLR" in parts else mb.LearningRate(0.1),
        order=mb.AnnealedOrder(first_order_epochs=5) if "DA" in parts else mb.SecondOrder(),
        step_loss=mb.AnnealedStepLoss(epochs=4) if "MSL" in parts else mb.FinalStepLoss(),
        executor=mb.Vmap(),
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    schedule = None
    if "CA" in parts:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=1e-5)
    return learner, optimizer, schedule


def outcome(learner, optimizer, schedule, source):
    """Parameters, statistics and predictions after a step in each of eight epochs."""
    for epoch in range(8):
        tasks = source.sample("train", range(2 * epoch, 2 * epoch + 2))
        learner.backward(tasks, progress=mb.Progress(epoch))
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
    tasks = source.sample("test", range(3))
    judged = learner.evaluate(tasks)
    return {
        **{name: p.detach() for name, p in learner.named_parameters()},
        "test losses": judged.query_losses,
        "test predictions": judged.predictions,
    }


@functools.cache
def by_hand(*off):
    """The outcome of the learner by hand without some parts."""
    source = build(load("maml_pp_strokes", SMALL)).source
    return outcome(*assembled(set(PARTS) - set(off)), source)


@pytest.mark.parametrize("off", [(), *[(part,) for part in PARTS], ("BNWB", "BNRS"), PARTS])
def test_a_part_switched_off_is_the_learner_without_it(off):
    changes = [change for part in off for change in OFF[part]]
    if {"BNWB", "BNRS"} <= set(off):
        changes = [c for c in changes if not c.startswith("surgery")] + ["surgery=[]"]
    experiment = build(load("maml_pp_strokes", [*SMALL, *changes]))
    got = outcome(experiment.learner, experiment.optimizer, experiment.scheduler, experiment.source)
    expected = by_hand(*off)
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_something(part):
    assert not torch.equal(by_hand()["test losses"], by_hand(part)["test losses"])


def test_no_surgery_is_shared_affine_and_batch_statistics():
    """Both halves of per-step norm off inside it, and it taken out: one learner, bit for bit."""
    inside = build(load("maml_pp_strokes", [*SMALL, *OFF["BNWB"], *OFF["BNRS"]]))
    outside = build(load("maml_pp_strokes", [*SMALL[:-2], SMALL[-1], "surgery=[]"]))
    one, other = (outcome(e.learner, e.optimizer, e.scheduler, e.source) for e in (inside, outside))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("clip", "bound"),
    [
        ("{block: value, maximum: 1e-4}", lambda g: max(x.abs().max() for x in g.values())),
        (
            "{block: norm, maximum: 1e-4}",
            lambda g: sum(x.square().sum() for x in g.values()) ** 0.5,
        ),
    ],
)
@pytest.mark.parametrize("only", ["*", "model.*"])
def test_the_meta_gradient_can_be_clipped(clip, bound, only):
    clip = clip.replace("}", f', only: "{only}"}}')
    experiment = build(load("maml_pp_strokes", [*SMALL, f"outer.clip={clip}"]))
    learner = experiment.learner
    learner.backward(experiment.source.sample("train", range(2)))
    raw = {name: p.grad.clone() for name, p in learner.named_parameters()}
    experiment.clip()
    grads = {name: p.grad for name, p in learner.named_parameters()}
    chosen = {n: g for n, g in grads.items() if only == "*" or n.startswith("model.")}
    assert float(bound(chosen)) == pytest.approx(1e-4, rel=1e-4)
    assert all(torch.equal(raw[n], grads[n]) for n in grads if n not in chosen)
