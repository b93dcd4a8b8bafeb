"""A bad recipe: exit status 2, and on stderr exactly what is wrong, where, and what would work."""

import re

import pytest
from recipe_texts import GOOD, broken

from metablocks.recipe.parse import parse, scalar

ONE_ERROR = {
    "typo at the top": (
        ("seed: 0", "sede: 0"),
        "bad.yaml:1:1 seed: missing; it takes an integer of at least 0 and at most "
        "4294967295\n"
        'bad.yaml:3:1 sede: unknown field; did you mean "seed"? It takes: name, cite, seed, tasks, '
        "model, surgery, inner, outer, evaluation, hardware",
    ),
    "typo in a section": (
        ("  steps: 2", "  stesp: 2"),
        "bad.yaml:8:1 inner.steps: missing; it takes an integer of at least 0\n"
        'bad.yaml:9:3 inner.stesp: unknown field; did you mean "steps"? '
        "It takes: steps, adapt, rule, order",
    ),
    "typo in a block in a list": (
        ("learn: true", "leanr: true"),
        "bad.yaml:12:42 inner.rule[0].leanr: unknown field; did you mean "
        '"learn"? It takes: init, granularity, per_step, learn, beyond',
    ),
    "typo in an optimiser group": (
        ("{lr: 1e-4}", "{rl: 1e-4}"),
        'bad.yaml:17:58 outer.optimizer.groups["rule.*"].rl: unknown field; '
        "it takes: lr, betas, eps, weight_decay",
    ),
    "unknown field without a near name": (
        ("block: final}", "block: final, colour: red}"),
        "bad.yaml:15:29 outer.step_loss.colour: unknown field; it takes no fields",
    ),
    "missing field": (
        (", final: 0.0", ""),
        "bad.yaml:18:3 outer.schedule.final: missing; it takes a number of at least 0",
    ),
    "duplicate key": (
        ("  steps: 2", "  steps: 2\n  steps: 3"),
        "bad.yaml:10:3 inner.steps: given twice, first on line 9",
    ),
    "duplicate key, deep": (
        ("{lr: 1e-4}", "{lr: 1e-4, lr: 1e-5}"),
        'bad.yaml:17:68 outer.optimizer.groups["rule.*"].lr: given twice, first on line 17',
    ),
    "text for a number": (
        ("lr: 1e-3", "lr: fast"),
        'bad.yaml:17:32 outer.optimizer.lr: takes a number of at least 0, given "fast"',
    ),
    "quoted number": (
        ("init: 0.01", 'init: "0.01"'),
        'bad.yaml:12:36 inner.rule[0].init: takes a number, given "0.01"',
    ),
    "fraction for an integer": (
        ("shots: 5", "shots: 2.5"),
        "bad.yaml:4:33 tasks.shots: takes an integer, given 2.5",
    ),
    "boolean for an integer": (
        ("  epochs: 2", "  epochs: true"),
        "bad.yaml:21:11 outer.epochs: takes an integer of at least 1, given true",
    ),
    "yes is not a boolean": (
        ("learn: true", "learn: yes"),
        'bad.yaml:12:49 inner.rule[0].learn: takes true or false, given "yes"; write true',
    ),
    "0o17 is not a number": (
        ("seed: 0", "seed: 0o17"),
        'bad.yaml:3:7 seed: takes an integer of at least 0 and at most 4294967295, given "0o17"',
    ),
    "not finite": (
        ("init: 0.01", "init: .inf"),
        "bad.yaml:12:36 inner.rule[0].init: takes a number, given inf; it must be finite",
    ),
    "too large for a float": (
        ("init: 0.01", "init: 1e999"),
        "bad.yaml:12:36 inner.rule[0].init: takes a number, given inf; it must be finite",
    ),
    "too large for a tensor's sizes": (
        ("shots: 5", "shots: 9223372036854775808"),
        "bad.yaml:4:33 tasks.shots: takes an integer, given 9223372036854775808; it must be at most "
        "9223372036854775807",
    ),
    "too large for the precision": (
        ("init: 0.01", "init: 1e39"),
        "bad.yaml:12:5 inner.rule: 1e+39 is out of range; torch.float32 goes up to 3.4e+38",
    ),
    "a net without an end": (
        ("block: mlp\n  hidden: [8]\n", "block: conv4\n  layers: 1000000000\n"),
        ("{block: sinusoid, ", "{block: strokes, ways: 5, "),
        "bad.yaml:7:11 model.layers: Conv4 layers is 1000000000; it takes a whole number, 1 to 1000",
    ),
    "no value": (
        ("hidden: [8]", "hidden:"),
        "bad.yaml:7:10 model.hidden: takes a list of integers, given null",
    ),
    "wrong entry of a list": (
        ("hidden: [8]", "hidden: [8, wide]"),
        'bad.yaml:7:15 model.hidden[1]: takes an integer, given "wide"',
    ),
    "list of the wrong length": (
        ("shots: 5", "shots: 5, phase: [0]"),
        "bad.yaml:4:43 tasks.phase: takes a list of 2 numbers, given a list of 1",
    ),
    "unknown choice": (
        ("precision: float64", "precision: flaot64"),
        'bad.yaml:23:61 hardware.precision: takes "float32", "float64" or "bfloat16", given "flaot64"; '
        'did you mean "float64"?',
    ),
    "range of the structure": (
        ("tasks_per_step: 4", "tasks_per_step: 0"),
        "bad.yaml:19:19 outer.tasks_per_step: takes an integer of at least 1, given 0",
    ),
    "range of an optimiser": (
        ("lr: 1e-3,", "lr: 1e-3, betas: [0.9, 1],"),
        "bad.yaml:17:51 outer.optimizer.betas[1]: takes a number of at least 0 and below 1, "
        "given 1",
    ),
    "a character that nobody sees": (
        ("block: loop", "block: \ue000loop"),
        'bad.yaml:23:43 hardware.executor.block: no executor block is called "\\ue000loop"; did you mean '
        '"loop"? There are: loop, vmap, auto, and package.module:Name with --allow package',
    ),
    "unknown block": (
        ("block: loop", "block: lop"),
        'bad.yaml:23:43 hardware.executor.block: no executor block is called "lop"; did you mean '
        '"loop"? There are: loop, vmap, auto, and package.module:Name with --allow package',
    ),
    "block without a name": (
        ("{block: loop}", "{}"),
        "bad.yaml:23:25 hardware.executor: has no block; it takes block: one of loop, vmap, auto",
    ),
    "list for a block": (
        ("{block: loop}", "[loop]"),
        "bad.yaml:23:35 hardware.executor: takes a block, {block: name, …}, given a list of 1; "
        "there are: loop, vmap, auto",
    ),
    "block for a list of blocks": (
        ("- {block: learning_rate, init: 0.01, learn: true}", "block: lslr"),
        "bad.yaml:12:5 inner.rule: takes a list of blocks, such as "
        "[{block: learning_rate, …}], given a mapping",
    ),
    "value for a section": (
        ("{tasks: 10, every: 1, inner_steps: 3}", "often"),
        "bad.yaml:22:13 evaluation: takes a mapping of tasks, every, inner_steps, ensemble, "
        'given "often"',
    ),
    "anchor and alias": (
        ("shots: 5, queries: 5", "shots: &n 5, queries: *n"),
        "bad.yaml:4:33 tasks.shots: an anchor (&n); a recipe has no references\n"
        "bad.yaml:4:48 tasks.queries: an alias (*n); write the value out\n"
        "bad.yaml:4:48 tasks.queries: takes an integer, given null",
    ),
    "merge key": (
        ("{block: final}", "{block: final, <<: {a: 1}}"),
        "bad.yaml:15:29 outer.step_loss: a merge key (<<); write the fields out",
    ),
    "tag": (
        ("seed: 0", "seed: !!int 0"),
        "bad.yaml:3:7 seed: a tag (tag:yaml.org,2002:int); a recipe holds plain values only",
    ),
    "number for a key": (
        ("{block: final}", "{block: final, 1: 2}"),
        "bad.yaml:15:29 outer.step_loss: a key is a word, given 1",
    ),
    "invalid YAML": (
        ("hidden: [8]", "hidden: [8"),
        "bad.yaml:8:6: not valid YAML: expected ',' or ']', but got ':' "
        "(while parsing a flow sequence)",
    ),
    "lone surrogate": (
        ("A good recipe", r'"\ud800"'),
        "bad.yaml:1:7 name: text with control characters or line separators",
    ),
    "line separator": (
        ("cite: Nobody 2020", 'cite: "a\\Lb"'),
        "bad.yaml:2:7 cite: text with control characters or line separators",
    ),
    "tab": (("  steps: 2", "\tsteps: 2"), "bad.yaml:9:1: a tab; YAML takes spaces only"),
    "control character": (
        ("A good recipe", "A \x07 recipe"),
        "bad.yaml:1:9: the character U+0007 is not allowed in YAML",
    ),
    "second document": (
        ("seed: 0", "seed: 0\n---"),
        "bad.yaml:4:1: a second document; a recipe is one document",
    ),
    "more last steps than steps": (
        ("last: 1", "last: 3"),
        "bad.yaml:13:35 inner.order.last: TruncatedOrder last is 3, but the learner "
        "takes 2 inner steps; last can be 0 to 2",
    ),
    "more evaluation steps than per-step rates": (
        ("learn: true", "per_step: true, learn: true"),
        "bad.yaml:22:48 evaluation.inner_steps: 3, but a per-step block of this recipe is made for "
        "2 (inner.steps); take at most 2, or give the block beyond: last, to go on with its last row",
    ),
    "nothing to adapt": (
        ('adapt: ["*"]', "adapt: hed.*"),
        'bad.yaml:10:10 inner.adapt: pattern "hed.*" matches no parameter; the names are: '
        "body.linear0.weight, body.linear0.bias, head.weight, head.bias",
    ),
    "group that matches nothing": (
        ("learn: true", "learn: false"),
        'bad.yaml:17:46 outer.optimizer.groups: groups pattern "rule.*" matches no parameter; '
        "the names are: model.body.linear0.weight, model.body.linear0.bias, model.head.weight, "
        "model.head.bias",
    ),
    "final rate above the rate": (
        ("final: 0.0", "final: 0.1"),
        "bad.yaml:18:36 outer.schedule.final: final is 0.1, above the optimiser's rate 0.0001; "
        "it takes less",
    ),
}

CONSTRUCTORS = {  # other words follow, a constructor's own or this machine's devices
    "no such device": (
        ("device: cpu", "device: tpu9"),
        'bad.yaml:23:20 hardware.device: "tpu9" is no device; it takes auto, cpu',
    ),
    "device that is not here": (
        ("device: cpu", "device: xla:7"),
        "bad.yaml:23:20 hardware.device: xla:7 is not available here; this machine has auto, cpu",
    ),
    "ways of a task source": (
        ("{block: sinusoid, ", "{block: strokes, ways: 0, "),
        "bad.yaml:4:31 tasks.ways: ",
    ),
    "shots": (("shots: 5", "shots: 0"), "bad.yaml:4:33 tasks.shots: "),
    "default that no longer fits": (
        ("{block: sinusoid, ", "{block: strokes, ways: 5, max_strokes: 1, "),
        "bad.yaml:4:",
    ),
    "model that does not fit the tasks": (
        ("  block: mlp\n  hidden: [8]", "  block: conv4"),
        "bad.yaml:6:3 model: ",
    ),
    "surgery that does not fit the model": (
        ("inner:\n", "surgery: [{block: append_linear, depth: 1, features: 3}]\ninner:\n"),
        "bad.yaml:8:11 surgery[0]: the model that append_linear leaves does not run: ",
    ),
    "sizes that fit no memory": (
        ("hidden: [8]", "hidden: [4611686018427387904]"),
        "bad.yaml:6:3 model: mlp could not be made: RuntimeError: Storage size calculation overflowed",
    ),
    "what a rule sets up fits no memory": (
        ("  steps: 2", "  steps: 4611686018427387904"),
        ("learn: true", "learn: true, per_step: true"),
        "bad.yaml:9:3 inner: the learner could not be set up: RuntimeError: ",
    ),
    "chunk": (("block: loop", "block: vmap, chunk: 0"), "bad.yaml:23:56 hardware.executor.chunk: "),
    "last": (("last: 1", "last: -1"), "bad.yaml:13:35 inner.order.last: "),
}


def test_good_recipe_passes_so_the_broken_ones_fail_for_their_own_reason(check):
    status, out, err = check(GOOD)
    assert (status, err) == (0, "")
    assert out.startswith("A good recipe (Nobody 2020)\n")


@pytest.mark.parametrize("case", ONE_ERROR)
def test_bad_recipe_says_what_where_and_what_would_work(check, case):
    *changes, message = ONE_ERROR[case]
    status, out, err = check(broken(*changes))
    assert (status, out) == (2, "")
    assert err == f"{message}\n"


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_what_a_constructor_refuses_is_placed_at_the_field(check, case):
    *changes, start = CONSTRUCTORS[case]
    status, out, err = check(broken(*changes))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(start)


def test_a_rule_that_learns_without_a_step_is_refused_when_built(check):
    status, out, err = check(broken(("  steps: 2", "  steps: 0"), ("last: 1", "last: 0")))
    assert (status, out) == (2, "")
    assert err == (
        "bad.yaml:9:10 inner.steps: 0, but the rule learns rate.*, which no loss depends on without "
        "an inner step; take 1 or more, or a rule that learns nothing\n"
    )


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
