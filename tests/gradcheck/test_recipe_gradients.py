"""The gradient check of recipes: right ones pass, wrong ones are reported by name."""

import dataclasses

import pytest
import torch
from covering_recipes import covering_first

from metablocks.cli import main
from metablocks.estimators import Unrolled
from metablocks.executors import Loop
from metablocks.gradcheck import check_gradients
from metablocks.gradcheck.shrink import MadeUp
from metablocks.recipe import from_text, load

TEXT = """\
name: A small recipe
cite: Nobody 2020
seed: 0
tasks: {block: sinusoid, shots: 5, queries: 5}
model: {block: mlp, hidden: [8]}
inner:
  steps: 2
  adapt: ["*"]
  rule:
    - {block: learning_rate, init: 0.05, learn: true}
  order: {block: second_order}
outer:
  step_loss: {block: final}
  estimator: {block: unrolled}
  optimizer: {block: adam, lr: 1e-3}
  schedule: {block: constant}
  tasks_per_step: 4
  steps_per_epoch: 3
  epochs: 6
evaluation: {tasks: 10, every: 1, inner_steps: 2}
hardware: {device: cpu, executor: {block: loop}, precision: float32}
"""


def small(*overrides):
    return from_text(TEXT, "small.yaml", overrides, ["outside_gradients", "test_recipe_gradients"])


def check(*overrides):
    return check_gradients(small(*overrides))


def gain(fault, *overrides):
    rule = f'{{block: "outside_gradients:Gain", fault: {fault}}}'
    return check(f"inner.rule=[{rule}]", *overrides)


def net(middle, *overrides):
    return check(f'model={{block: "outside_gradients:net", middle: {middle}}}', *overrides)


FIRST = "inner.order.block=first_order"


@pytest.mark.parametrize("path", covering_first())
def test_the_gradient_of_every_shipped_recipe_is_right(path, device, own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)
    report = check_gradients(load(path), device=device)
    print(report.text())
    assert report.ok, report.text()
    # Two orders below what finite differences are held to, so that a fault of 1e-5 is seen.
    assert all(row.error < 1e-7 for row in report.rows)
    assert all(row.order > 0 for row in report.rows)


COMBINATIONS = {
    "truncated": ["inner.order={block: truncated, last: 1}"],
    "annealed": ["inner.order={block: annealed, first_order_epochs: 3}"],
    "adjoint": ["outer.estimator.block=adjoint", "hardware.executor.block=vmap"],
    "every step counts": ["outer.step_loss.block=uniform", FIRST],
    "no inner step": ["inner.steps=0", "evaluation.inner_steps=0", "inner.rule[0].learn=false"],
    "kfo that adapts": [
        "inner.rule=[{block: kfo, adapt_transform: true, rate: 0.1}, {block: learning_rate, init: 0.1}]"
    ],
    "kfo network": ["inner.rule=[{block: kfo, hidden: 1}, {block: learning_rate, init: 0.1}]"],
    "momentum": ["inner.rule=[{block: momentum}, {block: lslr, init: 0.1}]"],
    "auto": ["hardware.executor.block=auto"],
    "chunks": ["hardware.executor={block: vmap, chunk: 3}"],
    "dropout": ['model={block: "outside_gradients:net", middle: dropout}', FIRST],
    "dropout, second order": ['model={block: "outside_gradients:net", middle: dropout}'],
    "dropout, vmap": [
        'model={block: "outside_gradients:net", middle: dropout}',
        "hardware.executor.block=vmap",
    ],
    "in place": ['model={block: "outside_gradients:net", middle: elu in place}'],
    "in place, vmap": [
        'model={block: "outside_gradients:net", middle: rewriting}',
        "hardware.executor.block=vmap",
    ],
    "in place, kinks": ['model={block: "outside_gradients:net", middle: relu6 in place}'],
    "in place, dropout": [
        'model={block: "outside_gradients:net", middle: dropout in place}',
        FIRST,
    ],
    "in place, adjoint": [
        'model={block: "outside_gradients:net", middle: rewriting}',
        "outer.estimator.block=adjoint",
    ],
    "kinks": ['model={block: "outside_gradients:net", middle: relu}'],
    "masks": [
        "inner.rule=[{block: mt_mask}, {block: learning_rate, init: 0.1}]",
        "hardware.executor.block=vmap",
        FIRST,
    ],
    "reptile": [
        "inner.rule[0].learn=false",
        "inner.batches={block: minibatches, size: 3}",
        "outer.estimator={block: reptile}",
        "hardware.executor.block=vmap",
        FIRST,
    ],
    "implicit, the head": [
        "inner.rule[0].learn=false",
        "outer.estimator={block: implicit, proximal: 20.0, cg_steps: 3}",
        'inner.adapt=["head.*"]',
        FIRST,
    ],
    "implicit, by a series": [
        "inner.rule[0].learn=false",
        "outer.estimator={block: implicit, proximal: 20.0, cg_steps: 3, solver: neumann}",
        'inner.adapt=["head.*"]',
        FIRST,
    ],
}


@pytest.mark.parametrize("overrides", COMBINATIONS.values(), ids=list(COMBINATIONS))
def test_the_gradient_of_right_blocks_is_right(overrides):
    report = check(*overrides)
    assert report.ok, report.text()
    assert all(row.error < 1e-6 for row in report.rows)


@pytest.mark.parametrize(
    ("fault", "order", "wrong"),
    [
        # A detached gradient and fast weights detached: everything behind them is off.
        ("gradient", "second_order", {"model.body", "model.head", "rule.gains.0", "rule.gains.1"}),
        ("params", "second_order", {"model.body", "model.head"}),
        ("params", "first_order", {"model.body", "model.head"}),
        # A meta-parameter that only the first step's derivative knows of: it alone is off.
        ("gain", "second_order", {"rule.gains.0", "rule.gains.2"}),
        ("gain", "first_order", {"rule.gains.0", "rule.gains.2"}),
    ],
)
def test_a_rule_that_cuts_a_derivative_is_reported_by_the_parameters_that_it_concerns(
    fault, order, wrong
):
    report = gain(fault, f"inner.order.block={order}")
    assert not report.ok
    found = {row.group for row in report.rows if not row.ok}
    assert found >= wrong
    assert fault != "gain" or not any(group.startswith("model") for group in found)
    assert all("off finite differences" in problem for problem in report.parts[0].problems)


def test_a_right_rule_from_outside_passes_and_first_order_hides_a_detached_gradient():
    assert gain("none").ok
    assert gain("none", FIRST).ok
    assert gain("gradient", FIRST).ok  # there the definition itself detaches it


def test_a_meta_parameter_without_gradient_is_named():
    for report, name in ((gain("silent"), "rule.gains.0"), (net("unused"), "model.spare")):
        assert not report.ok
        assert f"does not depend on {name}" in report.problems[0]


def test_a_module_without_a_second_derivative_is_named_and_what_would_work():
    report = net("once")
    (problem,) = report.problems
    assert problem.startswith("no second derivative in model.2 (Custom): ")
    assert "marked with @once_differentiable" in problem
    assert "order: {block: first_order}" in problem
    first = net("once", FIRST)
    assert first.ok, first.text()
    assert any("model.2 (Custom)" in note for note in first.notes)
    assert all(row.cosine is None for row in first.rows)


@pytest.mark.parametrize("order", [(), (FIRST,)], ids=["second", "first"])
@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_attention_has_its_second_derivative_without_being_asked(executor, order):
    assert net("attention", *order, f"hardware.executor.block={executor}").ok


def test_a_function_that_transforms_refuse_runs_in_a_loop_and_is_refused_by_vmap():
    assert net("old").ok
    (problem,) = net("old", "hardware.executor.block=vmap").problems
    assert "Loop()" in problem


def test_a_silently_wrong_second_derivative_is_traced_to_its_module():
    report = net("wrong")
    assert not any(row.ok for row in report.rows)
    assert any(one.startswith("model.2 (Custom): its second derivative") for one in report.problems)
    assert net("wrong", FIRST).ok


IMAGES = [
    "tasks={block: strokes, ways: 2, shots: 1, queries: 1, size: 8}",
    "model={block: conv4, filters: 2, layers: 1}",
]


@pytest.mark.parametrize("statistics", ["batch", "support", "running"])
def test_the_definition_normalises_by_what_the_recipe_says(statistics):
    report = check(*IMAGES, f"inner.norm_statistics={statistics}")
    assert report.ok, report.text()


def test_ranges_of_ways_and_shots_become_numbers(tmp_path):
    (tmp_path / "train").mkdir()
    folders = (
        f"{{block: folders, root: {tmp_path}, size: 8, ways: [2, 3], shots: [1, 2], queries: 1}}"
    )
    report = check(f"tasks={folders}", IMAGES[1])
    assert report.ok, report.text()
    assert "2-way 1-shot tasks" in report.text()


def test_kinks_that_stay_are_told():
    assert net("relu").notes[0] == "model.2 (ReLU) has kinks, and is kept as it is"


class Halved(Unrolled):
    """An estimator that forgets half of the gradient."""

    def __call__(self, *args):
        result = super().__call__(*args)
        return result._replace(grads={name: g / 2 for name, g in result.grads.items()})


@dataclasses.dataclass(frozen=True)
class Summing(Loop):
    """An executor that adds where it should take the mean."""

    def __call__(self, fn, shared, buffers, tasks):
        totals, rows = super().__call__(fn, shared, buffers, tasks)
        return tuple(
            {n: 2 * g for n, g in t.items()} if isinstance(t, dict) else t for t in totals
        ), rows


@pytest.mark.parametrize(
    ("place", "block"), [("outer.estimator", "Halved"), ("hardware.executor", "Summing")]
)
def test_an_estimator_or_executor_that_is_not_the_plain_loop_is_named(place, block):
    report = check(f'{place}={{block: "test_recipe_gradients:{block}"}}')
    assert not report.ok
    assert f"{block}()" in report.parts[0].problems[-1]
    assert "= Unrolled() under Loop(): " in report.parts[0].problems[-1]


def test_orders_and_cosines_are_measured():
    second = {row.group: row for row in check().rows}
    first = {row.group: row for row in check(FIRST).rows}
    assert {row.order for row in second.values()} == {2}
    assert {row.order for row in first.values()} == {1}
    assert all(0 < row.cosine < 1 for name, row in second.items() if name.startswith("model"))
    one_step = check("inner.steps=1", "evaluation.inner_steps=1").rows
    assert {row.group: row.order for row in one_step}["rule.rate.*"] == 1  # −⟨g_0, ∇L_q⟩


def test_policies_are_checked_before_and_after_they_turn():
    report = check(
        "inner.order={block: annealed, first_order_epochs: 2}",
        "outer.step_loss={block: annealed, epochs: 4}",
    )
    assert [part.epoch for part in report.parts] == [0, 2, 4]
    assert [{row.order for row in part.rows} for part in report.parts] == [{1}, {2}, {2}]


def test_zero_gradients_are_told_with_the_reason():
    report = check_gradients(load("maml_cnn2_strokes", ["hardware.device=cpu"]))
    assert any("a norm takes away the bias in front of it" in note for note in report.notes)
    still = net("zero head", *COMBINATIONS["no inner step"])
    assert any(
        "where training starts, and no longer once the others have moved: model.1.weight" in note
        for note in still.notes
    )


def test_made_up_tasks_are_a_function_of_their_number():
    source = MadeUp(ways=3, shots=1, queries=2, shape=(1, 8, 8))
    one, all_ = source.sample("train", [1]), source.sample("train", range(3))
    assert torch.equal(one.support[0][0], all_.support[0][1])
    assert not torch.equal(one.query[0], source.sample("test", [1]).query[0])


def test_checking_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    net("dropout")
    gain("params")
    assert torch.equal(before, torch.get_rng_state())


def test_the_command_prints_the_table_and_its_status_is_the_verdict(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    assert main(["check", str(path), "--gradients"]) == 0
    out = capsys.readouterr().out
    assert "\n  model.body " in out
    assert out.endswith("at worst\n")
    rule = 'inner.rule=[{block: "outside_gradients:Gain", fault: gain}]'
    argv = ["check", str(path), "--gradients", "--allow", "outside_gradients", "--set", rule]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "WRONG: rule.gains.0: off finite differences" in out
    assert out.splitlines()[-1].startswith("WRONG: ")
    assert main(["check", str(path), "--gradients", "--set", "inner.steps=-1"]) == 2
