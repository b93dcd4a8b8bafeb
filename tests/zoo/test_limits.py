"""The table of what PyTorch cannot do is true: each entry is tried in PyTorch alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from zoo import ENTRIES, readme
from zoo_entry import Entry
from zoo_reference import arguments, attention, distance, reference, vmapped
from zoo_state import Draws

each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
orders = pytest.mark.parametrize(
    "second",
    [pytest.param(False, marks=pytest.mark.long, id="first"), pytest.param(True, id="second")],
)


def test_the_readme_is_the_table() -> None:
    """Written by `python tests/zoo/zoo.py`."""
    assert (Path(__file__).parent / "README.md").read_text() == readme()


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@each
@orders
def test_pytorch_alone_can_or_cannot_vmap(entry: Entry, second: bool) -> None:
    """vmap(grad(...)) of `torch.func` raises where the table says so, and is the loop's elsewhere."""
    with attention(entry):
        if entry.no_vmap or (second and entry.no_second):
            with pytest.raises((RuntimeError, TypeError)):
                vmapped(entry, second=second)
            return
        gradient = vmapped(entry, second=second)
        if not entry.random:
            expected = reference(entry, second=second).grads
            assert distance(gradient, expected) < entry.tolerance


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.random], ids=lambda entry: entry.name)
def test_replayed_draws_give_the_same_gradient(entry: Entry) -> None:
    """Whatever the generators' states are; without them other draws give another gradient."""
    draws, first, other = Draws(), entry.plain_model(), entry.plain_model()
    first.register_forward_pre_hook(draws.record)
    expected = reference(entry, second=True, model=first).grads
    other(entry.tasks()[0].support[0])  # its own generator moves on
    assert distance(reference(entry, second=True, model=other, number=5).grads, expected) > 1e-3
    other.register_forward_pre_hook(draws.replay)
    assert distance(reference(entry, second=True, model=other, number=5).grads, expected) == 0


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.no_second or e.fused_attention], ids=lambda entry: entry.name
)
def test_plain_autograd_has_no_second_derivative(entry: Entry) -> None:
    """Of fused attention: outside the math backend. All have the first."""
    reference(entry, second=False)
    with pytest.raises(RuntimeError, match="not implemented"):
        reference(entry, second=True)


@each
def test_the_gradient_tells_orders_apart(entry: Entry) -> None:
    """A test that cannot fail is a bug: the gradient is finite, alive, and depends on the order.

    Some of it is zero by construction: a bias before a batch norm, say.
    """
    with attention(entry):
        first = reference(entry, second=False).grads
        assert all(g.isfinite().all() for g in first.values())
        assert sum(float(g.abs().sum()) > 1e-12 for g in first.values()) > 0.7 * len(first)
        if not entry.no_second:
            assert distance(first, reference(entry, second=True).grads) > 1e-3


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.no_vmap_evaluate], ids=lambda entry: entry.name
)
def test_pytorch_alone_cannot_vmap_a_prediction(entry: Entry) -> None:
    """In `eval()`, without gradients."""
    model = entry.model().eval()
    inputs = [task.query[0] for task in entry.tasks()]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *inputs)

    def predict(inputs: Any) -> Any:
        args, kwargs = arguments(inputs)
        return model(*args, **kwargs)

    predict(inputs[0])
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        torch.func.vmap(predict)(stacked)
