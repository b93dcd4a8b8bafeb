"""`metablocks check` takes one meta-step and one evaluation."""

import pytest
from recipe_texts import GOOD, broken

from metablocks.cli import main


def test_it_says_what_came_of_a_meta_step_and_an_evaluation(check):
    status, out, err = check(GOOD)
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("  tried ")]
    assert "a meta-step on 2 tasks, loss " in line
    assert "; an evaluation of 2, mse " in line
    assert "made-up" not in line


RULE = ("{block: learning_rate, init: 0.01, learn: true}", '{block: "outside_blocks:FailsLater"}')
SOURCE = ("block: sinusoid", 'block: "outside_blocks:NoValidation"')


@pytest.mark.parametrize(
    ("change", "what"), [(RULE, "the first meta-step"), (SOURCE, "the evaluation")]
)
def test_a_block_that_fails_in_either_is_found(check, change, what):
    text = broken(change, (', groups: {"rule.*": {lr: 1e-4}}', ""))
    status, out, err = check(text, "--allow", "outside_blocks")
    assert (status, out) == (2, "")
    assert err == f"bad.yaml:9:3 inner: {what} fails: KeyError: 'by design'\n"


def test_a_loss_that_is_not_finite_is_said(check):
    text = broken(("init: 0.01", "init: 1e30"), ("precision: float64", "precision: float32"))
    status, out, _ = check(text)
    assert status == 0
    assert "a meta-step on 2 tasks, loss not finite" in out
    assert "at meta-step 1, which was not taken" in out


def test_published_images_are_looked_for_and_not_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("METABLOCKS_DATA", str(tmp_path / "data"))
    command = ["check", "maml_omniglot_5w1s", "--device", "cpu", "--set", "model.filters=2"]
    assert main(command) == 0
    searched = f"{tmp_path / 'data'}, {tmp_path / 'cache' / 'metablocks'}"
    out = capsys.readouterr().out
    assert f"Omniglot is not here (searched {searched}); a run downloads it" in out
    place = tmp_path / "data" / "omniglot-py"
    for half in ("images_background", "images_evaluation"):
        (place / half).mkdir(parents=True)
    assert main(command) == 0
    assert f"Omniglot is in {place}, to be read by --data {place}" in capsys.readouterr().out
