"""Whatever becomes of a recipe's text: a `Recipe` or a `RecipeError`, never another exception."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD

from metablocks.errors import RecipeError
from metablocks.recipe import Recipe, from_text
from metablocks.recipe.load import read_text

LINES = GOOD.splitlines(keepends=True)
SETTINGS = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def attempt(text: str, overrides: tuple[str, ...] = ()) -> Recipe | None:
    try:
        recipe = from_text(text, "fuzz.yaml", overrides)
    except RecipeError:
        return None
    assert from_text(recipe.to_yaml()).hash == recipe.hash
    return recipe


@SETTINGS
@given(st.integers(0, len(GOOD)), st.integers(1, 12))
def test_text_with_characters_deleted(start, count):
    attempt(GOOD[:start] + GOOD[start + count :])


@SETTINGS
@given(st.data())
def test_text_with_two_characters_swapped(data):
    first, second = (data.draw(st.integers(0, len(GOOD) - 1)) for _ in range(2))
    text = list(GOOD)
    text[first], text[second] = text[second], text[first]
    attempt("".join(text))


@SETTINGS
@given(st.data())
def test_lines_deleted_doubled_or_swapped(data):
    lines = list(LINES)
    index = st.integers(0, len(LINES) - 2)
    for change in data.draw(st.lists(st.sampled_from(["del", "double", "swap"]), max_size=3)):
        at, other = data.draw(index) % len(lines), data.draw(index) % len(lines)
        if change == "del":
            del lines[at]
        elif change == "double":
            lines.insert(at, lines[at])
        else:
            lines[at], lines[other] = lines[other], lines[at]
    attempt("".join(lines))


@SETTINGS
@given(
    st.integers(0, len(GOOD)),
    st.text(st.sampled_from(" \t\n:-?{}[],#&*!|>'\"%@`~<.1e_ax\0\x85\u2028\ufeff\ud800\U0001f600"))
    | st.sampled_from(["null", "true", ".nan", "-1", "1e400", "<<: *a", "!!python/name:os", "1_0"]),
)
def test_text_with_punctuation_inserted(at, text):
    attempt(GOOD[:at] + text + GOOD[at:])


@SETTINGS
@given(st.binary(max_size=40), st.integers(0, len(GOOD)))
def test_bytes_overwritten(tmp_path, data, at):
    raw = GOOD.encode()
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(raw[:at] + data + raw[at + len(data) :])
    try:
        text = read_text(path)
    except RecipeError:
        return
    attempt(text)


PATHS = ["inner.steps", "inner.rule[0]", "inner.rule", "tasks", "model.hidden", "name", "seed"]
PATHS += ["outer.optimizer.groups", "outer.schedule.block", "hardware.executor", "inner", "cite"]


@SETTINGS
@given(
    st.sampled_from(PATHS) | st.text(".[]0aé\"'\\=", max_size=8),
    st.text(" :-{}[],#&*!|>'\"%01eax.", max_size=8)
    | st.sampled_from(
        ["null", "{}", "[]", "[[]]", "{block: mlp}", "cosine", "-1", "1e-3", '"\\0"']
    ),
)
def test_any_override(path, value):
    attempt(GOOD, (f"{path}={value}",))


@pytest.mark.parametrize("depth", [5, 100, 20000])
def test_deep_nesting(depth):
    assert attempt(f"name: {'[' * depth}{']' * depth}") is None
    assert attempt(f"name: {'{a: ' * depth}1{'}' * depth}") is None
