"""A bad recipe: exit status 2, and on stderr what is wrong, where, and what would work."""

import re

import pytest
from recipe_texts import GOOD, broken

from metablocks.errors import RecipeError
from metablocks.recipe import build, load
from metablocks.recipe.parse import parse, scalar

CASES = {  # changes of the good recipe; the place and path of each error, and a word of it
    "typo at the top": (
        ("seed: 0", "sede: 0"),
        "1:1 seed ~ missing",
        '3:1 sede ~ did you mean "seed"',
    ),
    "typo in a section": (
        ("  steps: 2", "  stesp: 2"),
        "8:1 inner.steps ~ missing",
        '9:3 inner.stesp ~ did you mean "steps"',
    ),
    "typo in a block in a list": (
        ("learn: true", "leanr: true"),
        '12:42 inner.rule[0].leanr ~ did you mean "learn"',
    ),
    "typo in an optimiser group": (
        ("{lr: 1e-4}", "{rl: 1e-4}"),
        '17:58 outer.optimizer.groups["rule.*"].rl ~ it takes: lr',
    ),
    "unknown field without a near name": (
        ("block: final}", "block: final, colour: red}"),
        "15:29 outer.step_loss.colour ~ takes no fields",
    ),
    "missing field": (
        (", final: 0.0", ""),
        "18:3 outer.schedule.final ~ missing",
    ),
    "duplicate key": (
        ("  steps: 2", "  steps: 2\n  steps: 3"),
        "10:3 inner.steps ~ twice, first on line 9",
    ),
    "duplicate key, deep": (
        ("{lr: 1e-4}", "{lr: 1e-4, lr: 1e-5}"),
        '17:68 outer.optimizer.groups["rule.*"].lr ~ twice, first on line 17',
    ),
    "text for a number": (
        ("lr: 1e-3", "lr: fast"),
        '17:32 outer.optimizer.lr ~ number at least 0, given "fast"',
    ),
    "quoted number": (
        ("init: 0.01", 'init: "0.01"'),
        '12:36 inner.rule[0].init ~ given "0.01"',
    ),
    "fraction for an integer": (
        ("shots: 5", "shots: 2.5"),
        "4:33 tasks.shots ~ whole number, 1 or more, given 2.5",
    ),
    "boolean for an integer": (
        ("  epochs: 2", "  epochs: true"),
        "21:11 outer.epochs ~ 1 or more, given true",
    ),
    "yes is not a boolean": (
        ("learn: true", "learn: yes"),
        "12:49 inner.rule[0].learn ~ write true",
    ),
    "0o17 is not a number": (
        ("seed: 0", "seed: 0o17"),
        '3:7 seed ~ 0 to 4294967295, given "0o17"',
    ),
    "not finite": (
        ("init: 0.01", "init: .inf"),
        "12:36 inner.rule[0].init ~ finite",
    ),
    "too large for a float": (
        ("init: 0.01", "init: 1e999"),
        "12:36 inner.rule[0].init ~ finite",
    ),
    "too large for a tensor's sizes": (
        ("shots: 5", "shots: 9223372036854775808"),
        "4:33 tasks.shots ~ whole number",
    ),
    "too large for the precision": (
        ("init: 0.01", "init: 1e39"),
        "12:5 inner.rule ~ torch.float32",
    ),
    "a net without an end": (
        ("block: mlp\n  hidden: [8]\n", "block: conv4\n  layers: 1000000000\n"),
        ("{block: sinusoid, ", "{block: strokes, ways: 5, "),
        "7:11 model.layers ~ 1000",
    ),
    "no value": (
        ("hidden: [8]", "hidden:"),
        "7:10 model.hidden ~ list, each a whole number, 1 or more, given null",
    ),
    "wrong entry of a list": (
        ("hidden: [8]", "hidden: [8, wide]"),
        '7:15 model.hidden[1] ~ given "wide"',
    ),
    "list of the wrong length": (
        ("shots: 5", "shots: 5, phase: [0]"),
        "4:43 tasks.phase ~ a pair (low, high)",
    ),
    "unknown choice": (
        ("precision: float64", "precision: flaot64"),
        '23:61 hardware.precision ~ did you mean "float64"',
    ),
    "range of the structure": (
        ("tasks_per_step: 4", "tasks_per_step: 0"),
        "19:19 outer.tasks_per_step ~ 1 or more, given 0",
    ),
    "range of an optimiser": (
        ("lr: 1e-3,", "lr: 1e-3, betas: [0.9, 1],"),
        "17:51 outer.optimizer.betas[1] ~ below 1, given 1",
    ),
    "a character that nobody sees": (
        ("block: loop", "block: \ue000loop"),
        '23:43 hardware.executor.block ~ "\\ue000loop"',
    ),
    "unknown block": (
        ("block: loop", "block: lop"),
        '23:43 hardware.executor.block ~ did you mean "loop"',
    ),
    "block without a name": (
        ("{block: loop}", "{}"),
        "23:25 hardware.executor ~ one of loop",
    ),
    "list for a block": (
        ("{block: loop}", "[loop]"),
        "23:35 hardware.executor ~ given a list of 1",
    ),
    "block for a list of blocks": (
        ("- {block: learning_rate, init: 0.01, learn: true}", "block: lslr"),
        "12:5 inner.rule ~ a list of blocks",
    ),
    "value for a section": (
        ("{tasks: 10, every: 1, inner_steps: 3}", "often"),
        "22:13 evaluation ~ a mapping of tasks",
    ),
    "anchor and alias": (
        ("shots: 5, queries: 5", "shots: &n 5, queries: *n"),
        "4:33 tasks.shots ~ anchor (&n)",
        "4:48 tasks.queries ~ alias (*n)",
        "4:48 tasks.queries ~ given null",
    ),
    "merge key": (
        ("{block: final}", "{block: final, <<: {a: 1}}"),
        "15:29 outer.step_loss ~ merge key",
    ),
    "tag": (
        ("seed: 0", "seed: !!int 0"),
        "3:7 seed ~ tag:yaml.org,2002:int",
    ),
    "number for a key": (
        ("{block: final}", "{block: final, 1: 2}"),
        "15:29 outer.step_loss ~ given 1",
    ),
    "invalid YAML": (
        ("hidden: [8]", "hidden: [8"),
        "8:6 ~ not valid YAML",
    ),
    "lone surrogate": (
        ("A good recipe", '"\\ud800"'),
        "1:7 name ~ control characters",
    ),
    "line separator": (
        ("cite: Nobody 2020", 'cite: "a\\Lb"'),
        "2:7 cite ~ line separators",
    ),
    "tab": (
        ("  steps: 2", "\tsteps: 2"),
        "9:1 ~ spaces only",
    ),
    "control character": (
        ("A good recipe", "A \x07 recipe"),
        "1:9 ~ U+0007",
    ),
    "second document": (
        ("seed: 0", "seed: 0\n---"),
        "4:1 ~ one document",
    ),
    "more last steps than steps": (
        ("last: 1", "last: 3"),
        "13:35 inner.order.last ~ 0 to 2",
    ),
    "more evaluation steps than per-step rates": (
        ("learn: true", "per_step: true, learn: true"),
        "22:48 evaluation.inner_steps ~ at most 2",
    ),
    "a rule that does not negate": (
        ("{block: learning_rate, init: 0.01, learn: true}", "adam"),
        (', groups: {"rule.*": {lr: 1e-4}}', ""),
        "12:7 inner.rule[0] ~ Adam does not negate it",
    ),
    "a negative rate": (
        ("init: 0.01", "init: -0.01"),
        "12:36 inner.rule[0].init ~ a negative rate goes up the slope; give 0 or more",
    ),
    "nothing to adapt": (
        ('adapt: ["*"]', "adapt: hed.*"),
        '10:10 inner.adapt ~ "hed.*"',
    ),
    "group that matches nothing": (
        ("learn: true", "learn: false"),
        '17:46 outer.optimizer.groups ~ "rule.*" matches no parameter',
    ),
    "final rate above the rate": (
        ("final: 0.0", "final: 0.1"),
        "18:36 outer.schedule.final ~ above the optimiser's rate",
    ),
    "no such device": (
        ("device: cpu", "device: tpu9"),
        "23:20 hardware.device ~ tpu9",
    ),
    "device that is not here": (
        ("device: cpu", "device: xla:7"),
        "23:20 hardware.device ~ not available here",
    ),
    "ways of a task source": (
        ("{block: sinusoid, ", "{block: strokes, ways: 0, "),
        "4:31 tasks.ways ~ a range [low, high] of whole numbers, given 0",
    ),
    "shots": (
        ("shots: 5", "shots: 0"),
        "4:33 tasks.shots ~ whole number, 1 or more, given 0",
    ),
    "default that no longer fits": (
        ("{block: sinusoid, ", "{block: strokes, ways: 5, max_strokes: 1, "),
        "4:8 tasks.min_strokes ~ max_strokes",
    ),
    "model that does not fit the tasks": (
        ("  block: mlp\n  hidden: [8]", "  block: conv4"),
        "6:3 model ~ images",
    ),
    "surgery that does not fit the model": (
        ("inner:\n", "surgery: [{block: append_linear, depth: 1, features: 3}]\ninner:\n"),
        "8:11 surgery[0] ~ append_linear leaves does not run",
    ),
    "sizes that fit no memory": (
        ("hidden: [8]", "hidden: [4611686018427387904]"),
        "6:3 model ~ mlp could not be made",
    ),
    "what a rule sets up fits no memory": (
        ("  steps: 2", "  steps: 4611686018427387904"),
        ("learn: true", "learn: true, per_step: true"),
        "9:3 inner ~ could not be set up",
    ),
    "chunk": (
        ("block: loop", "block: vmap, chunk: 0"),
        "23:56 hardware.executor.chunk ~ null or a whole number, 1 or more, given 0",
    ),
    "last": (
        ("last: 1", "last: -1"),
        "13:35 inner.order.last ~ whole number, 0 or more, given -1",
    ),
}


def test_good_recipe_passes_so_the_broken_ones_fail_for_their_own_reason(check):
    status, out, err = check(GOOD)
    assert (status, err) == (0, "")
    assert out.startswith("A good recipe (Nobody 2020)\n")


@pytest.mark.parametrize("case", CASES)
def test_a_bad_recipe_is_refused_at_its_place_with_what_would_work(check, case):
    changes = [change for change in CASES[case] if isinstance(change, tuple)]
    expected = [line.split(" ~ ") for line in CASES[case] if isinstance(line, str)]
    status, out, err = check(broken(*changes))
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert [line.split(": ")[0] for line in lines] == [f"bad.yaml:{place}" for place, _ in expected]
    assert all(word in line for line, (_, word) in zip(lines, expected, strict=True))


def test_a_rule_that_learns_without_a_step_is_refused_when_built(check):
    status, out, err = check(broken(("  steps: 2", "  steps: 0"), ("last: 1", "last: 0")))
    assert (status, out) == (2, "")
    assert err.startswith(
        "bad.yaml:9:10 inner.steps: 0, but the rule learns rate.*, which no loss "
    )


TWO_RULES = "inner.rule=[{block: learning_rate, init: -1.0}, {block: meta_sgd, init: 0.02}]"


@pytest.mark.parametrize(
    ("name", "override", "path"),
    [
        ("reptile_sinusoid", TWO_RULES, "inner.rule[1]"),
        (
            "imaml_sinusoid",
            TWO_RULES,
            "inner.rule[1]",
        ),  # behind Proximal, which Implicit puts first
        ("imaml_sinusoid", "inner.rule=[{block: meta_sgd, init: 0.02}]", "inner.rule[0]"),
        ("maml_sinusoid", "inner.rule[0].init=[0.1, 0.1]", "inner.rule[0].init"),
        ("maml_sinusoid", 'inner.rule[0].init={"heat.*": 0.1}', "inner.rule[0].init"),
        ("maml_sinusoid", "inner.rule[0].init=fast", "inner.rule[0].init"),
        ("reptile_sinusoid", "inner.adapt=head.*", "inner.adapt"),
        ("reptile_sinusoid", "inner.steps=0", "inner.steps"),
        ("reptile_sinusoid", "outer.step_loss=uniform", "outer.step_loss"),
        ("reptile_sinusoid", "inner.order={block: truncated, last: 1}", "inner.order"),
        ("maml_sinusoid", 'outer.clip={block: norm, maximum: 1, only: "x.*"}', "outer.clip.only"),
    ],
)
def test_what_blocks_refuse_of_each_other_is_placed_by_its_field(name, override, path):
    with pytest.raises(RecipeError) as caught:
        build(load(name, [override]))
    assert str(caught.value).startswith(f"--set {override}: {path}: ")


def test_every_place_is_where_its_text_stands():
    lines = GOOD.splitlines()
    count = 0
    pending = [parse(GOOD, "x", [])]
    while pending:
        node = pending.pop()
        below = node.value
        if isinstance(below, dict | list):
            pending.extend(below.values() if isinstance(below, dict) else below)
            for key, child in below.items() if isinstance(below, dict) else ():
                text = lines[child.key.line - 1][child.key.column - 1 :]
                assert text.startswith((f"{key}:", f'"{key}":'))
        else:
            text = lines[node.place.line - 1][node.place.column - 1 :]
            word = re.match(r'"(.*?)"|(.*?)(?:[,}\]]|$)', text)
            assert scalar(word[1] or word[2]) == below
            count += 1
    assert count == 31


def test_all_errors_are_reported_at_once_in_file_order(check):
    text = broken(
        ("seed: 0", "seed: -1"),
        ("shots: 5", "shots: 0"),
        ("learn: true", "learn: yes"),
        ("lr: 1e-3", "lr: fast"),
        ("  epochs: 2", "  epoch: 2"),
        ("block: loop", "block: lop"),
    )
    status, _, err = check(text, "--set", "inner.stpes=3")
    assert status == 2
    assert [line.split(": ")[0] for line in err.splitlines()] == [
        "bad.yaml:3:7 seed",
        "bad.yaml:4:33 tasks.shots",
        "bad.yaml:12:49 inner.rule[0].learn",
        "bad.yaml:14:1 outer.epochs",
        "bad.yaml:17:32 outer.optimizer.lr",
        "bad.yaml:21:3 outer.epoch",
        "bad.yaml:23:43 hardware.executor.block",
        "--set inner.stpes=3",
    ]
