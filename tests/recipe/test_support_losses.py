"""The slot `inner.support_loss`: what inner steps descend, shipped, learned and from outside."""

import pytest
import torch
import torch.nn.functional as F

import metablocks as mb
from metablocks.cli import main
from metablocks.errors import RecipeError
from metablocks.laws import gradients
from metablocks.losses import LOSSES
from metablocks.recipe import build, from_text, load

SMALL = {
    "regression": ["maml_sinusoid", "model.hidden=[3]", "model.activation=tanh"],
    "classification": ["maml_strokes", "tasks.ways=3", "model.filters=2", "inner.steps=2"],
}
FITTING = {
    "regression": ["mse", "learned_loss", "weighted"],
    "classification": ["cross_entropy", "learned_loss", "weighted"],
}


def experiment(kind, entry, allow=()):
    name, *changes = SMALL[kind]
    changes += ["hardware.device=cpu", "hardware.precision=float64", f"inner.support_loss={entry}"]
    return build(load(name, changes, allow=allow))


@pytest.mark.parametrize(
    ("kind", "block"), [(kind, block) for kind, blocks in FITTING.items() for block in blocks]
)
def test_the_gradient_of_a_recipe_with_a_support_loss(kind, block):
    made = experiment(kind, block)
    tasks = made.source.sample("train", [0, 1]).to(torch.float64)
    gradients.plain_autograd(made.learner, tasks)
    learned = [n for n, _ in made.learner.named_parameters() if n.startswith("support_loss.")]
    assert bool(learned) == isinstance(made.learner.support_loss, torch.nn.Module)


def test_every_shipped_one_fits_some_tasks():
    assert set(LOSSES) == {block for blocks in FITTING.values() for block in blocks}


def test_the_tasks_own_loss_named_is_the_same():
    plain, named = (experiment("regression", entry) for entry in ("null", "mse"))
    tasks = plain.source.sample("train", [0, 1]).to(torch.float64)
    got, expected = (one.learner.meta_gradient(tasks) for one in (named, plain))
    assert all(torch.equal(got.grads[name], grad) for name, grad in expected.grads.items())


def test_losses_take_sequences_of_classes():
    scores = torch.randn(2, 4, 3, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    expected = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(LOSSES["cross_entropy"]()(scores, targets), expected)
    assert mb.LearnedLoss(outputs=3).double()(scores, targets).shape == ()
    even = mb.WeightedLoss(hidden=2).double()
    for parameter in even.parameters():
        parameter.data.zero_()  # every weight is 1/2
    torch.testing.assert_close(even(scores, targets), expected / 2)


def test_an_example_counts_in_the_inner_step_with_its_weight():
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets, weighted = torch.tensor([0, 1, 2, 0, 1]), mb.WeightedLoss(hidden=4).double()
    losses = F.cross_entropy(scores, targets, reduction="none")
    weights = weighted.weights(losses).detach()
    expected = torch.autograd.grad((weights * losses).mean(), scores)
    torch.testing.assert_close(torch.autograd.grad(weighted(scores, targets), scores), expected)


@pytest.mark.parametrize(
    ("kind", "block", "message"),
    [
        ("regression", "cross_entropy", r"inner\.support_loss: .* regression need mse"),
        ("classification", "mse", r"inner\.support_loss: .* classification need cross_entropy"),
    ],
)
def test_a_loss_for_other_targets_is_refused(kind, block, message):
    with pytest.raises(RecipeError, match=message):
        experiment(kind, block)


def test_a_recipe_without_the_field_reads_as_before():
    text = load("maml_sinusoid").to_yaml()
    assert "support_loss: null" in text
    without = from_text(text.replace("support_loss: null", "").replace("  \n", ""))
    assert without.values == load("maml_sinusoid").values


def test_a_loss_from_outside_is_learned_where_it_is_allowed():
    entry = "{block: 'outside_blocks:OutsideLoss', decay: 0.1}"
    with pytest.raises(RecipeError, match="--allow outside_blocks"):
        experiment("regression", entry)
    made = experiment("regression", entry, allow=["outside_blocks"])
    tasks = made.source.sample("train", [0, 1]).to(torch.float64)
    gradients.plain_autograd(made.learner, tasks)
    gradients.finite_differences(made.learner, made.source.sample("train", [0]).to(torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inner.order.block=first_order", r"inner\.order: support_loss\.net\S* is learned through"),
        ("inner.steps=0", r"inner\.steps: support_loss\.net\S* is learned through"),
        ("inner.support_loss=learned_los", 'did you mean "learned_loss"'),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_place(change, message):
    with pytest.raises(RecipeError, match=message):
        build(load("maml_sinusoid", ["inner.support_loss=learned_loss", change]))


def test_a_run_that_goes_on_is_the_run_that_was_not_cut(tmp_path):
    def run(out, epochs):
        small = ["outer.tasks_per_step=2", "outer.steps_per_epoch=2", "evaluation.tasks=2"]
        small += ["evaluation.every=1", "hardware.device=cpu", f"outer.epochs={epochs}"]
        small += ["outer.schedule={block: constant}"]
        small += ["inner.support_loss={block: learned_loss, hidden: [3]}", "model.hidden=[3]"]
        words = [word for change in small for word in ("--set", change)]
        assert main(["run", "maml_sinusoid", *words, "--quiet", "--out", str(out)]) == 0
        return next(out.iterdir())

    whole, part = run(tmp_path / "whole", 2), run(tmp_path / "part", 1)
    words = ["--resume", str(part), "--set", "outer.epochs=2", "--quiet"]
    assert main(["run", *words]) == 0
    got, expected = (
        torch.load(run / "checkpoint.pt", weights_only=True)["learner"] for run in (part, whole)
    )
    assert any(name.startswith("support_loss.") for name in expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("change", "tried"), [([], False), (["inner.support_loss=null"], True)])
def test_a_run_advises_first_order_only_where_that_is_not_refused(change, tried, tmp_path, capsys):
    small = ["outer.epochs=1", "outer.steps_per_epoch=1", "outer.tasks_per_step=2"]
    small += ["evaluation.every=1", "evaluation.tasks=2", *change]
    sets = [word for entry in small for word in ("--set", entry)]
    assert main(["run", "learned_loss_sinusoid", *sets, "--quiet", "--out", str(tmp_path)]) == 0
    assert ("inner.order.block=first_order" in capsys.readouterr().out) == tried
