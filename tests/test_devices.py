"""Which device a word means, on machines with and without an accelerator."""

import pytest
import torch

from metablocks.cli import main
from metablocks.devices import find_device
from metablocks.errors import RecipeError
from metablocks.recipe import build, load


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
    assert find_device(word) == torch.device(device)


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
    with pytest.raises(ValueError, match=f"^{word} is not available here; this machine has {has}$"):
        find_device(word)


@pytest.mark.parametrize("word", ["tpu9", "", "cuda:x"])
def test_what_is_no_device_is_refused_with_what_is(accelerators, word):
    accelerators("cuda", 2)
    with pytest.raises(
        ValueError, match=f'^"{word}" is no device; it takes auto, cpu, cuda:0, cuda:1$'
    ):
        find_device(word)


def test_the_argument_stands_in_for_the_recipes_device(accelerators):
    accelerators(None, 0)
    recipe = load("maml_sinusoid", ["hardware.device=cuda"])
    assert build(recipe, device="cpu").device == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"^--device cuda:3: cuda:3 is not available here"):
        build(recipe, device="cuda:3")


@pytest.mark.parametrize("word", ["cuda", "tpu9"])
def test_check_and_verify_refuse_it_in_the_same_words(accelerators, word, capsys):
    accelerators(None, 0)
    with pytest.raises(ValueError, match=word) as refusal:
        find_device(word)
    assert main(["check", "maml_sinusoid", "--set", f"hardware.device={word}"]) == 2
    assert (
        capsys.readouterr().err
        == f"--set hardware.device={word}: hardware.device: {refusal.value}\n"
    )
    assert main(["verify", "vmap", "--device", word]) == 2
    assert capsys.readouterr().err.endswith(f"argument --device: {refusal.value}\n")
