"""`metablocks new` and notes on schedules."""

import pytest
from recipe_texts import GOOD

from metablocks.cli import main
from metablocks.recipe import from_text, load
from metablocks.recipe.record import differing, leaves
from metablocks.recipe.template import template


def test_a_new_recipe_is_the_quickstart_with_a_meaning_above_every_field(capsys):
    assert main(["new"]) == 0
    text = capsys.readouterr().out
    assert text == template()
    recipe = from_text(text)
    changes = differing(load("quickstart").values, recipe.values)
    assert [path for path, *_ in changes] == ["name"]
    lines = [line.strip() for line in text.splitlines()]
    for path, _ in leaves(recipe.values):
        if not path.endswith("block"):
            field = path.rpartition(".")[2]
            above = [lines[n - 1] for n, line in enumerate(lines) if line.startswith(f"{field}:")]
            assert above, path
            assert all(line.startswith("# ") for line in above), path


ANNEALED = "outer.step_loss={block: annealed, epochs: %s}"


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (
            ["inner.order={block: annealed, first_order_epochs: 2}"],
            "inner.order.first_order_epochs: 2, but training ends after epoch 2 (outer.epochs)",
        ),
        (["inner.order={block: annealed, first_order_epochs: 1}"], None),
        (
            [ANNEALED % 3],
            "outer.step_loss.epochs: 3, but training ends after epoch 2 (outer.epochs)",
        ),
        ([ANNEALED % 2], None),
        (
            ["evaluation.ensemble=3"],
            "evaluation.ensemble: 3, but only 2 epochs are validated (evaluation.every)",
        ),
        (
            ["evaluation.ensemble=2", "evaluation.every=2"],
            "evaluation.ensemble: 2, but only 1 epoch is validated (evaluation.every)",
        ),
        (["evaluation.ensemble=2"], None),
        (
            ["evaluation.inner_steps=1"],
            "evaluation.inner_steps: 1, but in training a task takes 2 (inner.steps)",
        ),
        (["evaluation.inner_steps=2"], None),
    ],
)
def test_a_schedule_that_does_not_fit_the_training_is_noted_at_its_place(overrides, note):
    notes = [line for line in from_text(GOOD, overrides=overrides).notes if "cleared" not in line]
    if note is None:
        assert notes == []
    else:
        (line,) = notes
        assert line.startswith(f"--set {overrides[0]}: {note}")
