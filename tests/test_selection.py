"""Patterns that select parameters."""

import pytest
from torch import nn

from metablocks.errors import SelectionError
from metablocks.selection import select, select_parameters

NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ("*", NAMES),
        ("head.*", NAMES[3:]),
        ("!head.*", NAMES[:3]),
        (["!*.bias"], [NAMES[0], NAMES[2], NAMES[3]]),
        (["*", "!*.bias"], [NAMES[0], NAMES[2], NAMES[3]]),
        (["head.*", "body.1.*"], [NAMES[2], NAMES[3], NAMES[4]]),
        (["!body.*", "body.1.weight"], [NAMES[2], NAMES[3], NAMES[4]]),
        ("body.[01].weight", [NAMES[0], NAMES[2]]),
    ],
)
def test_patterns_select(patterns, selected):
    assert list(select(patterns, NAMES)) == selected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("haed.*", 'pattern "haed.*" matches no parameter'),
        ("head.weigth", 'did you mean "head.weight"? The names are: '),
        ("head", 'did you mean "head.*"? The names are: '),
        (["*", "!tail.*"], 'pattern "!tail.*" matches no parameter'),
        (["head.*", "!head.*"], "leave no parameter selected"),
        ([], "no pattern given"),
    ],
)
def test_patterns_that_select_nothing_are_refused(patterns, message):
    with pytest.raises(SelectionError) as caught:
        select(patterns, NAMES)
    assert message in str(caught.value)


def test_frozen_parameters_are_never_selected():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert select_parameters("*", model) == ("1.weight", "1.bias")
    with pytest.raises(SelectionError, match=r"'0\.\*' selects 0\.bias, 0\.weight, all frozen"):
        select_parameters("0.*", model)
    with pytest.raises(SelectionError, match="no trainable parameter"):
        select_parameters("*", model.requires_grad_(False))


def test_a_tied_parameter_is_selected_whole_or_not_at_all():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert "a.weight" in select_parameters("*", model)
    assert select_parameters(["a.weight", "b.weight"], model) == ("a.weight",)
    assert select_parameters("c.*", model) == ("c.weight", "c.bias")
    with pytest.raises(SelectionError, match=r"a\.weight and b\.weight are one tied parameter"):
        select_parameters("a.*", model)
