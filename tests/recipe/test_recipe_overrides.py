"""Overrides: what `--set path=value` gives, clears and refuses."""

import pytest
from recipe_texts import GOOD

from metablocks.cli import main
from metablocks.errors import RecipeError
from metablocks.recipe import from_text

GIVES = [
    (["inner.steps=3"], "inner.steps", 3),
    (["inner.steps=3", "inner.steps=4"], "inner.steps", 4),
    (["outer.optimizer.lr=5e-4"], "outer.optimizer.lr", 5e-4),
    (["inner.rule[0].init=0.1"], "inner.rule[0].init", 0.1),
    (["inner.rule[0].init=1"], "inner.rule[0].init", 1.0),
    (["inner.rule[0].granularity=tensor"], "inner.rule[0].granularity", "tensor"),
    (["inner.adapt=head.*"], "inner.adapt", "head.*"),
    (['inner.adapt=["*", "!head.*"]'], "inner.adapt", ["*", "!head.*"]),
    (["model.hidden=[3, 4]"], "model.hidden", [3, 4]),
    (["name=a = b"], "name", "a = b"),
    (['cite=""'], "cite", ""),
    (['outer.optimizer.groups["rule.*"].lr=1e-5'], 'outer.optimizer.groups["rule.*"].lr', 1e-5),
    (['outer.optimizer.groups["rule.*"].eps=1e-5'], 'outer.optimizer.groups["rule.*"].lr', 1e-4),
    (["outer.optimizer.groups=null"], "outer.optimizer.groups", None),
    (["hardware.executor=vmap"], "hardware.executor.block", "vmap"),
    (["hardware.executor=vmap", "hardware.executor.chunk=2"], "hardware.executor.chunk", 2),
    (["inner.order.block=first_order"], "inner.order", {"block": "first_order"}),
    (["inner.order.block=annealed", "inner.order.first_order_epochs=1"], "inner.order.last", None),
    (["inner.order.block=truncated"], "inner.order.last", 1),
    (["inner.rule=[lslr]", "inner.rule[0].init=0.5"], "inner.rule[0].init", 0.5),
    (["tasks={block: linear, shots: 1, queries: 2}"], "tasks.queries", 2),
]

REFUSED = [
    ("inner.stpes=3", 'inner.stpes: unknown field; did you mean "steps"?'),
    ("iner.steps=3", 'iner: unknown field; did you mean "inner"?'),
    ("inner.rule[0].leanr=true", 'inner.rule[0].leanr: unknown field; did you mean "learn"?'),
    ("outer.step_loss.epochs=2", "outer.step_loss.epochs: unknown field; it takes no fields"),
    ("inner.rule[1].init=3", "inner.rule has 1 entry; there is no [1]"),
    ("inner.rule.init=3", 'inner.rule is a list; it has no field "init"; say which entry: '),
    ("inner[0]=3", "inner is not a list; it has no [0]"),
    ("name.x=2", 'name is one value; it has no field "x"'),
    ("inner.steps", "no = in it; it takes path=value, such as inner.steps=3"),
    ("=3", '"" is no path; it takes fields and entries'),
    ("inner..steps=3", '"inner..steps" is no path; it takes fields and entries'),
    (".inner=3", '".inner" is no path; it takes fields and entries'),
    ("inner.rule[0]init=3", '"inner.rule[0]init" is no path; it takes fields and entries'),
    ('a["\\x"]=3', r'"a["\x"]" is no path; it takes fields and entries'),
    ('a["\\u2028"]=3', r'"a["\u2028"]" is no path; it takes fields and entries'),
    ("[0]=3", '"[0]" is no path; it takes fields and entries'),
    ("seed=", "no value after ="),
    ("seed= # none", "no value after ="),
    ("seed=[1", "not valid YAML: "),
    ("seed=!!int 3", "a tag (tag:yaml.org,2002:int); a recipe holds plain values only"),
    ("seed=0o17", 'seed: takes a whole number, 0 to 4294967295, given "0o17"'),
    ("inner.rule[0].learn=on", 'inner.rule[0].learn: takes true or false, given "on"; write true'),
    ("inner.rule=[meta_sgd]", "inner.rule[0].init: missing; it takes a finite number"),
    ("outer.clip=norm", "outer.clip.maximum: missing; it takes a finite number above 0"),
    ("tasks.shots=0", "tasks.shots: "),
    ("inner.order={block: truncated, last: 9}", "inner.order.last: TruncatedOrder last is 9, "),
]


@pytest.mark.parametrize(("overrides", "path", "value"), GIVES)
def test_override_gives_the_value(overrides, path, value):
    recipe = from_text(GOOD, overrides=overrides)
    assert recipe.at(path) == value
    assert type(recipe.at(path)) is type(value)


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_override_is_refused_with_a_reason(override, message, tmp_path, capsys):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert main(["check", str(path), "--set", override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"--set {override}: {message}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "seed=--- 3\n--- 4",
            r"--set seed=--- 3\n--- 4: a second document; a recipe is one document",
        ),
        (
            'a["\n"]=3',
            r'--set a["\n"]=3: "a["\n"]" is no path; it takes fields and entries, such as ',
        ),
        ("seed=\u2028", r"--set seed=\u2028: no value after ="),
    ],
)
def test_an_override_of_several_lines_is_refused_in_one(override, line):
    with pytest.raises(RecipeError) as caught:
        from_text(GOOD, overrides=[override])
    assert str(caught.value).startswith(line)
    assert str(caught.value).isprintable()


def test_every_bad_override_is_reported():
    with pytest.raises(RecipeError) as caught:
        from_text(GOOD, overrides=["seed", "inner.stpes=3", "inner.steps=x"])
    assert {line.partition(": ")[0] for line in str(caught.value).splitlines()} == {
        "--set seed",
        "--set inner.stpes=3",
        "--set inner.steps=x",
    }


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("inner.order.block=first_order", "cleared last, which belonged to truncated"),
        ("inner.order=first_order", "cleared last, which belonged to truncated"),
        (
            "inner.rule[0].block=meta_sgd",
            "cleared learn, which belonged to learning_rate; kept init",
        ),
    ],
)
def test_replacing_a_block_keeps_what_both_take_and_says_what_it_clears(
    override, note, tmp_path, capsys
):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert main(["show", str(path), "--set", override]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: --set {override}: {note}\n"
    assert " last:" not in out or "rule" in override
    assert "init: 0.01 " in out


def test_a_kept_field_keeps_its_place():
    recipe = from_text(GOOD, "x.yaml", overrides=["outer.optimizer.block=sgd"])
    assert recipe.at("outer.optimizer.lr") == 1e-3
    assert recipe.origins["outer.optimizer.lr"] == "x.yaml:17"
    assert recipe.notes == ()


def test_a_value_that_the_new_block_does_not_take_is_cleared():
    tasks = "tasks={block: omniglot, ways: 5, shots: [1, 3], queries: 5}"
    recipe = from_text(GOOD, overrides=[tasks, "tasks.block=strokes", "tasks.shots=4"])
    (_, note) = recipe.notes
    assert note.endswith(": cleared shots, which belonged to omniglot; kept ways, queries")
    assert recipe.at("tasks.ways") == 5


def test_a_block_replaced_by_itself_keeps_its_fields():
    recipe = from_text(GOOD, overrides=["inner.order.block=truncated"])
    assert (recipe.notes, recipe.at("inner.order.last")) == ((), 1)


def test_origins_name_line_override_and_default():
    recipe = from_text(GOOD, "x.yaml", overrides=["inner.steps=3"])
    origins = recipe.origins
    assert origins["inner.steps"] == "--set"
    assert origins["inner.rule[0].init"] == "x.yaml:12"
    assert origins["inner.rule[0].per_step"] == "default of LearningRate"
    assert origins["outer.optimizer.weight_decay"] == "default of adam"
    assert origins['outer.optimizer.groups["rule.*"].lr'] == "x.yaml:17"
