"""Which device a recipe's word means, on machines with and without an accelerator."""

import pytest
import torch
from recipe_texts import GOOD

from metablocks.errors import RecipeError
from metablocks.recipe import build, from_text
from metablocks.recipe.build import _device
from metablocks.recipe.parse import Place

PLACE = Place("x.yaml", 23, 20)


@pytest.fixture
def accelerators(monkeypatch):
    def have(kind, count):
        found = torch.device(kind) if kind else None
        monkeypatch.setattr("torch.accelerator.is_available", lambda: found is not None)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: found)
        monkeypatch.setattr("torch.accelerator.device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("kind", "count", "word", "device"),
    [
        (None, 0, "auto", "cpu"),
        (None, 0, "cpu", "cpu"),
        ("cuda", 2, "auto", "cuda"),
        ("cuda", 2, "cuda", "cuda"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        ("cuda", 2, "cpu", "cpu"),
        ("mps", 1, "auto", "mps"),
        ("xpu", 1, "xpu:0", "xpu:0"),
    ],
)
def test_a_device_that_is_here_is_found(accelerators, kind, count, word, device):
    accelerators(kind, count)
    problems = []
    assert _device(word, PLACE, problems) == torch.device(device)
    assert problems == []


@pytest.mark.parametrize(
    ("kind", "count", "word", "has"),
    [
        (None, 0, "cuda", "auto, cpu"),
        ("cuda", 2, "cuda:2", "auto, cpu, cuda:0, cuda:1"),
        ("mps", 1, "cuda", "auto, cpu, mps:0"),
        ("cuda", 1, "meta", "auto, cpu, cuda:0"),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_what_is(accelerators, kind, count, word, has):
    accelerators(kind, count)
    problems = []
    _device(word, PLACE, problems)
    assert [str(problem) for problem in problems] == [
        f"x.yaml:23:20 hardware.device: {word} is not available here; this machine has {has}"
    ]


def test_the_argument_stands_in_for_the_recipes_device(accelerators):
    accelerators(None, 0)
    recipe = from_text(GOOD, overrides=["hardware.device=cuda"])
    assert build(recipe, device="cpu").device == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"^--device cuda:3: cuda:3 is not available here"):
        build(recipe, device="cuda:3")
