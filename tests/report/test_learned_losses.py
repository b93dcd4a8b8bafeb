"""Learned support losses in runs and reports: what is recorded of them, and how it is drawn."""

import numpy as np
import pytest
import torch

from metablocks.recipe import build, load
from metablocks.report import figures
from metablocks.runs.learned_losses import curves
from tests.compare.made_up import finished_run

FLOAT64 = ["hardware.device=cpu", "hardware.precision=float64"]


def recorded(name, *changes):
    """The experiment of a recipe, and the arrays of its loss from 3 tasks, as figures get them."""
    made = build(load(name, [*FLOAT64, *changes]))
    arrays = curves(made, tasks=3, steps=2)
    (kind,) = {key.split("/")[0] for key in arrays}
    return made, {key.split("/", 1)[1]: values.numpy() for key, values in arrays.items()}, kind


def test_the_weights_of_right_and_wrong_labels_are_those_of_the_loss():
    made, arrays, kind = recorded("reweighting_strokes", "model.filters=2")
    assert kind == "weights"
    assert (len(arrays["right"]), len(arrays["wrong"])) == (3 * 30, 3 * 20)  # 40 % of 5 × 10
    loss = made.learner.support_loss
    expected = loss.net(torch.from_numpy(arrays["loss"])[:, None])[:, 0].sigmoid()
    np.testing.assert_allclose(arrays["weight"], expected.detach())
    task = made.source.sample("test", [0]).to(torch.float64)[0]
    adapted = made.learner.adapt(task.support, steps=2).train()
    each = torch.nn.functional.cross_entropy(
        adapted(task.support[0]), task.support[1], reduction="none"
    )
    both = np.concatenate([arrays["right"][:30], arrays["wrong"][:20]])
    np.testing.assert_allclose(np.sort(both), each.detach().sort().values, rtol=1e-9)
    run = finished_run()
    named = {figure.name: figure for figure in figures.figures_of([run], [{kind: arrays}])}
    figure = named[f"weights-seed{run.seed}"]
    assert (
        f"{np.interp(arrays['wrong'], arrays['loss'], arrays['weight']).mean():.2f} of wrong"
        in (figure.note)
    )
    assert [line.label for line in figure.panels[1].lines] == ["right labels", "wrong labels"]
    assert all(sum(line.y) == pytest.approx(1) for line in figure.panels[1].lines)


@pytest.mark.parametrize(
    ("recipe", "classes"), [("maml_sinusoid", False), ("maml_strokes", True)], ids=str
)
def test_the_curves_of_a_learned_loss_are_its_values(recipe, classes):
    small = ["model.filters=2", "tasks.ways=3"] if classes else ["model.hidden=[3]"]
    made, arrays, kind = recorded(recipe, "inner.support_loss=learned_loss", *small)
    assert kind == "curves"
    loss, error = made.learner.support_loss, arrays["error"]
    assert error[0] == -error[-1] < 0
    if classes:
        eye = torch.eye(3, dtype=torch.float64)
        expected = [loss(e * eye, torch.arange(3)) for e in error]
        np.testing.assert_allclose(arrays["mean over the classes"], torch.stack(expected).detach())
    else:
        _, low, _, high = arrays
        assert float(low.split()[1]) < float(high.split()[1])
    run = finished_run()
    names = [figure.name for figure in figures.figures_of([run], [{kind: arrays}])]
    assert f"learned_loss-seed{run.seed}" in names
    (panel,) = figures.learned_loss(run, arrays).panels
    assert [line.label for line in panel.lines] == [name for name in arrays if name != "error"]
