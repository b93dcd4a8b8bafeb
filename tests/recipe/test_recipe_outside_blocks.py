"""Blocks by path: only from allowed packages, and only of the slot's type."""

import pytest
import torch
from recipe_texts import broken

from metablocks.cli import main
from metablocks.errors import RecipeError
from metablocks.recipe import build, from_text, load

RULE = "{block: learning_rate, init: 0.01, learn: true}"


def text(entry: str) -> str:
    return broken((RULE, entry), (', groups: {"rule.*": {lr: 1e-4}}', ""))


def refusal(entry: str, allow: tuple[str, ...] = ("outside_blocks", "outside_blocks_broken")):
    with pytest.raises(RecipeError) as caught:
        from_text(text(entry), "x.yaml", allow=allow)
    return str(caught.value)


def test_outside_block_is_refused_unless_allowed(tmp_path, capsys):
    path = tmp_path / "outside.yaml"
    path.write_text(text('{block: "outside_blocks:Sign", rate: 0.1}'))
    assert main(["check", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.endswith("to run it, allow it: --allow outside_blocks\n")
    assert ':12:15 inner.rule[0].block: "outside_blocks:Sign" is code from outside' in err
    assert main(["check", str(path), "--allow", "outside_blocks"]) == 0
    assert "1 adapt" not in capsys.readouterr().err


def test_allowing_a_package_allows_nothing_that_merely_starts_like_it():
    assert "--allow outside_blocks" in refusal('{block: "outside_blocks:Sign"}', ("outside",))


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("reaches_out:os.system", "os"),
        ("reaches_out:os.path.join", "os"),
        ("reaches_out:run", "subprocess"),
        ("reaches_out:Sign", "outside_blocks"),
    ],
)
def test_allowing_a_package_does_not_allow_what_it_imports(path, home, tmp_path, monkeypatch):
    """Every package imports something that runs commands, with arguments from the recipe."""
    lines = "import os\nfrom subprocess import run\nfrom outside_blocks import Sign\n"
    (tmp_path / "reaches_out.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(f'{{block: "{path}", rate: 0.1}}', ("reaches_out",))
    assert f'"{path}" is code of "{home}", which "reaches_out" only imports' in message
    assert message.endswith(f"to run it, allow that too: --allow {home}")


def test_a_block_that_an_allowed_package_imports_from_another_takes_both(tmp_path, monkeypatch):
    (tmp_path / "passes_on.py").write_text("from outside_blocks import Sign\n")
    monkeypatch.syspath_prepend(tmp_path)
    allow = ["passes_on", "outside_blocks"]
    recipe = from_text(text('{block: "passes_on:Sign", rate: 0.25}'), allow=allow)
    assert type(build(recipe).learner.rule).__name__ == "Sign"


def test_outside_block_is_built_with_its_fields():
    recipe = from_text(text("{block: outside_blocks:Sign, rate: 0.25}"), allow=["outside_blocks"])
    rule = build(recipe).learner.rule
    assert (type(rule).__name__, rule.rate) == ("Sign", 0.25)
    assert from_text(recipe.to_yaml(), allow=recipe.allow).hash == recipe.hash


def test_a_factory_that_cannot_be_hashed_is_a_block():
    recipe = from_text(text("{block: outside_blocks:made, rate: 0.25}"), allow=["outside_blocks"])
    assert build(recipe).learner.rule.rate == 0.25


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{block: outside_blocks:Sign, rat: 1}",
            "x.yaml:12:7 inner.rule[0].rate: missing; it takes a finite number above 0\n"
            'x.yaml:12:36 inner.rule[0].rat: unknown field; did you mean "rate"? It takes: rate',
        ),
        (
            "{block: outside_blocks:Sign, rate: -1}",
            "x.yaml:12:42 inner.rule[0].rate: takes a finite number above 0, given -1",
        ),
        (
            "{block: outside_blocks:Sgin, rate: 1}",
            'x.yaml:12:15 inner.rule[0].block: "outside_blocks" has no "Sgin"; '
            'did you mean "Sign"?',
        ),
        (
            "{block: outside_blocks:NotARule}",
            "x.yaml:12:15 inner.rule[0]: outside_blocks:NotARule gives a outside_blocks.NotARule; "
            "the rule slot takes a metablocks.rules.base.UpdateRule",
        ),
        (
            "{block: outside_blocks:Fails}",
            "x.yaml:12:7 inner.rule[0]: outside_blocks:Fails could not be made: "
            "ZeroDivisionError: by design",
        ),
        (
            "{block: outside_blocks:VALUE}",
            'x.yaml:12:15 inner.rule[0].block: "outside_blocks:VALUE" is a int; '
            "it takes a class or function",
        ),
        (
            "{block: outside_blocks:needs, callback: print}",
            "x.yaml:12:47 inner.rule[0].callback: a Callable cannot be written in a recipe",
        ),
        (
            "{block: outside_blocks_broken:Sign}",
            'x.yaml:12:15 inner.rule[0].block: importing "outside_blocks_broken" failed: '
            "ValueError: broken by design",
        ),
        (
            "{block: 'outside blocks:Sign'}",
            'x.yaml:12:15 inner.rule[0].block: "outside blocks:Sign" is no path to a block; '
            "it takes package.module:Name",
        ),
    ],
)
def test_outside_block_that_does_not_fit_is_refused(entry, message, tmp_path, monkeypatch):
    (tmp_path / "outside_blocks_broken.py").write_text('raise ValueError("broken by design")')
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(entry) == message


@pytest.mark.parametrize("slot", ["order", "step_loss", "estimator", "executor"])
def test_a_block_of_another_slot_is_refused(slot):
    old = {
        "order": "{block: truncated, last: 1}",
        "step_loss": "{block: final}",
        "estimator": "{block: unrolled}",
        "executor": "{block: loop}",
    }[slot]
    changes = (old, "{block: 'metablocks.rules:LearningRate', init: 0.1}")
    with pytest.raises(RecipeError, match=f"the {slot} slot takes a metablocks"):
        from_text(broken(changes), allow=["metablocks"])


def test_building_leaves_the_random_state_alone_and_the_seed_decides():
    before = torch.get_rng_state()
    recipe = from_text(text("{block: learning_rate, init: 0.1}"))
    first, second = (build(recipe).learner.state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(from_text(text("{block: meta_sgd, init: 0.1}"), overrides=["seed=1"]))
    name = "model.head.weight"
    assert not torch.equal(first[name], other.learner.state_dict()[name])


def test_a_function_that_is_the_block_itself_is_one_for_another_to_return():
    allow = ["outside_blocks"]
    with pytest.raises(RecipeError) as caught:
        load("maml_sinusoid", ["inner.order=outside_blocks:every_step"], allow)
    assert str(caught.value) == (
        "--set inner.order=outside_blocks:every_step: inner.order.block: every_step is called to make "
        "the order block, with fields of the recipe, which gives no step, steps, progress. If it is "
        "the block itself, name a function that returns it: def make(): return every_step"
    )
    recipe = load("maml_sinusoid", ["inner.order=outside_blocks:make_every_step"], allow)
    assert build(recipe).learner.order(0, 5, None)
