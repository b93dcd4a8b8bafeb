"""Whatever becomes of a recipe's file or overrides: `check` is done with it, or says where it is wrong.

A file is mutated as bytes, as lines, as YAML and as a tree; then `metablocks check` ends with status 0
or 2, and with 2 every line of its complaint begins with a place. Never a traceback.
"""

import contextlib
import io
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD

from metablocks.cli import main
from metablocks.recipe import from_text
from metablocks.recipe.load import find_recipe, read_text
from metablocks.recipe.parse import join, parse, plain

PLACE = re.compile(r"(fuzz\.yaml:\d+:\d+( [^ ].*?)?|--set .+?): .", re.DOTALL)

SHIPPED = ["maml_pp_strokes", "linnet_strokes", "kfo_strokes", "reptile_sinusoid", "imaml_sinusoid"]
TEXTS = [GOOD, *(read_text(find_recipe(name)) for name in SHIPPED)]

HUGE = [1001, 2**31, 2**62, 2**63, 10**39, -(2**63), 1e39, 1e300, -1e300, 1e-320, -0.0]
"""Sizes that fit no memory at all: a few gigabytes would be taken, and filled."""

JUNK = [
    *(
        None,
        True,
        -1,
        0,
        0.5,
        "",
        "x",
        "*",
        "é\u2028\x85",
        "\0",
        "1e-3",
        float("nan"),
        float("inf"),
    ),
    *([], {}, [[]], [1, "a"], {"block": "x"}, {"block": None}, {"": {"": []}}, [None] * 30),
    *("loop", "builtins:print", "os:system", "a" * 2000),
]
WORDS = [
    *("&a ", "*a", "*a ", "!!int ", "!!python/object/apply:os.system ", "! ", "<<: ", "? ", "- "),
    *("| ", ">-\n", "{", "}", "[", "]", '"', "'", "#", "---\n", "...\n", "%YAML 1.2\n", ": ", "\t"),
    *(".nan", "1e400", "1_0", "0x1F", "null", "true", "\\", "@", "`", "\n", " ", "\0", "\ufeff"),
    *("\x85", "\u2028", "\ud800", "\U0001f600"),
]
PIECES = [b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\xc3", b"\x1b[31m"]


def deleted(draw, data):
    start = draw(st.integers(0, len(data)))
    return data[:start] + data[start + draw(st.sampled_from([1, 2, 12, len(data)])) :]


def overwritten(draw, data):
    at, new = (
        draw(st.integers(0, len(data))),
        draw(st.binary(max_size=12) | st.sampled_from(PIECES)),
    )
    return data[:at] + new + data[at + draw(st.sampled_from([0, len(new)])) :]


def swapped(draw, data):
    ends = sorted(draw(st.lists(st.integers(0, len(data)), min_size=4, max_size=4)))
    one, two, three, four = ends
    return data[:one] + data[three:four] + data[two:three] + data[one:two] + data[four:]


def written_otherwise(draw, data):
    """Line ends, byte order marks, encodings."""
    text = data.decode("utf-8", "replace")
    ways = [
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace("\n", "\r").encode(),
        lambda: b"\xef\xbb\xbf" * draw(st.integers(1, 2)) + data,
        lambda: text.encode("utf-16"),
        lambda: text.replace("a", "ä").encode("latin-1", "replace"),
        lambda: text.rstrip("\n").encode(),
        lambda: data * 2,
    ]
    return draw(st.sampled_from(ways))()


def with_other_lines(draw, data):
    lines = data.splitlines(keepends=True) or [b""]
    index = st.integers(0, len(lines) - 1)
    at, other = draw(index), draw(index)
    ways = {
        "deleted": [],
        "twice": [lines[at]] * 2,
        "another": [lines[other]],
        "indented": [b"  " + lines[at]],
        "dedented": [lines[at].removeprefix(b"  ")],
        "a tab": [b"\t" + lines[at]],
        "a comment": [b"# " + lines[at]],
    }
    lines[at : at + 1] = draw(st.sampled_from(sorted(ways.items())))[1]
    return b"".join(lines)


def with_words_inserted(draw, data):
    """In front of a value or a key, where YAML has most to say; or anywhere."""
    places = [match.end() for match in re.finditer(rb"(: |^ *|\[|, |\{)", data, re.MULTILINE)]
    at = draw(st.sampled_from(places or [0]) | st.integers(0, len(data)))
    word = draw(st.sampled_from(WORDS) | st.sampled_from("([{").map(lambda one: one * 50))
    return data[:at] + word.encode("utf-8", "surrogatepass") + data[at:]


def with_another_tree(draw, data):
    """Keys renamed, removed, moved; values of other types; nested deeper."""
    try:
        tree = plain(parse(data.decode(), "", []))
    except ValueError:  # mutated beyond reading already
        return data
    at, key = draw(st.sampled_from(entries(tree) or [([tree], 0)]))
    how = draw(st.sampled_from(["junk", "huge", "remove", "rename", "elsewhere", "wrap"]))
    if how == "junk":
        at[key] = draw(st.sampled_from(JUNK))
    elif how == "huge":
        number = draw(st.sampled_from(HUGE))
        at[key] = [number] if isinstance(at[key], list) else number
    elif how == "remove":
        del at[key]
    elif how == "rename" and isinstance(at, dict):
        at[draw(st.sampled_from(["block", "lr", "x", "", "é", "a.b", 1]))] = at.pop(key)
    elif how == "elsewhere":
        other, name = draw(st.sampled_from(entries(tree)))
        at[key] = plain_copy(other[name])
    else:
        at[key] = draw(st.sampled_from([lambda v: [v], lambda v: {"block": v}, nested]))(at[key])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw(st.booleans())).encode()


def entries(tree):
    """Every place in a tree: what holds it, and by which key or index."""
    keys = (
        list(tree) if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    )
    return [one for key in keys for one in [(tree, key), *entries(tree[key])]]


def plain_copy(value):
    """A copy, so that the dump needs no anchors for what stands twice."""
    if isinstance(value, dict):
        return {key: plain_copy(item) for key, item in value.items()}
    return [plain_copy(item) for item in value] if isinstance(value, list) else value


def nested(value, depth=30):
    return nested([value], depth - 1) if depth else value


MUTATIONS = [
    deleted,
    overwritten,
    swapped,
    written_otherwise,
    with_other_lines,
    with_words_inserted,
    with_another_tree,
]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """`metablocks check` of a file's bytes, held to what it must do; the recipe where it is one."""
    monkeypatch.chdir(tmp_path)

    def check(data, *overrides):
        (tmp_path / "fuzz.yaml").write_bytes(data)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["check", "fuzz.yaml", *(f"--set={one}" for one in overrides)])
        assert status in (0, 2)
        if status == 2:
            assert out.getvalue() == ""
            assert err.getvalue().endswith("\n")
            for line in err.getvalue()[:-1].split("\n"):
                assert PLACE.match(line), line
                assert line.isprintable(), line
            return None
        recipe = from_text(data.decode("utf-8-sig"), overrides=overrides)
        assert from_text(recipe.to_yaml()).hash == recipe.hash
        return recipe

    return check


def examples(count):
    """`count` examples, and as many times more as the profile asks for (`thorough`: 20 times)."""
    times = settings.default.max_examples // settings.get_profile("default").max_examples
    return settings(max_examples=count * times, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_file_mutated_once_is_checked_or_refused_with_its_places(check, mutation):
    @examples(15)
    @given(st.sampled_from(TEXTS), st.data())
    def holds(text, data):
        check(mutation(data.draw, text.encode()))

    holds()


@examples(40)
@given(st.data())
def test_a_file_mutated_again_and_again_is_checked_or_refused_with_its_places(check, data):
    text = data.draw(st.sampled_from(TEXTS)).encode()
    for mutation in data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=2, max_size=5)):
        text = mutation(data.draw, text)
    check(text)


@examples(20)
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(WORDS)).map(lambda w: "".join(w).encode("utf-8", "replace"))
)
def test_a_file_of_anything_is_refused_with_its_places(check, data):
    assert check(data) is None


PATHS = sorted({path for text in TEXTS for path in from_text(text).places})


@st.composite
def overrides(draw):
    """`path=value`: paths that recipes have, or broken ones; values of all kinds, as YAML or not."""
    path = draw(st.sampled_from(PATHS))
    other = draw(st.sampled_from(PATHS))
    broken = [
        *(
            path + "[0]",
            path + "[-1]",
            path + ".block",
            path + ".x",
            path.replace(".", ".."),
            other[1:],
        ),
        *(
            f"{path}[99999999]",
            f"{path}.{other}",
            "",
            " ",
            "=",
            "[0]",
            '["',
            "[]",
            join(path, "é.\n"),
        ),
    ]
    where = draw(st.sampled_from([path] * len(broken) + broken))
    junk = st.sampled_from([*JUNK, *HUGE]).map(lambda v: yaml.safe_dump(v, default_flow_style=True))
    words = st.lists(st.sampled_from([*WORDS, "1", "a"]), max_size=6).map("".join)
    equals = draw(st.sampled_from(["="] * 9 + ["", "==", " = "]))
    return (
        where
        + equals
        + draw(junk | words | st.sampled_from(["mlp", "first_order", "{block: kfo}"]))
    )


@examples(60)
@given(st.sampled_from(TEXTS), st.lists(overrides(), min_size=1, max_size=3))
def test_any_overrides_are_applied_or_refused_with_their_places(check, text, some):
    check(text.encode(), *some)


@pytest.mark.parametrize("depth", [5, 100, 20000])
def test_deep_nesting(check, depth):
    assert check(f"name: {'[' * depth}{']' * depth}".encode()) is None
    assert check(f"name: {'{a: ' * depth}1{'}' * depth}".encode()) is None
    assert check(GOOD.encode(), f"name={'[' * depth}{']' * depth}") is None
