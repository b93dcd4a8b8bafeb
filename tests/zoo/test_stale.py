"""Law 15 on every model: what changes between two calls is seen by the next one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from zoo_entry import SEED, Entry, seed
from zoo_learner import each_with, learner_of, tasks_of
from zoo_reference import arguments, attention, distance

import metablocks as mb

Change = Callable[[nn.Module], None]


@pytest.mark.parametrize(
    ("entry", "which"), each_with(("one", "others"), lambda _, index: index == 0)
)
def test_the_next_call_sees_a_change(entry: Entry, which: str) -> None:
    """A learner made before the change gives what one made after it gives.

    Of the changes that a model has a place for, CI tries one, by the length of the entry's name.
    """
    found = list(_changes(entry))
    one = found.pop(len(entry.name) % len(found))
    for what, change in [one] if which == "one" else found:
        model = entry.model()
        learner = learner_of(entry, model, order=mb.FirstOrder())
        before = _gradient(learner, entry)
        change(model)
        after = _gradient(learner, entry)
        expected = _gradient(learner_of(entry, model, order=mb.FirstOrder()), entry)
        assert set(before) != set(expected) or distance(before, expected) > 1e-6, f"{what}: in vain"
        assert set(after) == set(expected), what
        assert distance(after, expected) < entry.tolerance, what


def _gradient(learner: mb.MetaLearner, entry: Entry) -> dict[str, Tensor]:
    tasks = tasks_of(entry)
    seed(SEED)
    with attention(entry):
        return learner.meta_gradient(tasks).grads


def _changes(entry: Entry) -> Iterator[tuple[str, Change]]:
    """What may be changed on a model, at a module that its forward pass calls."""
    called = _called(entry)

    def freeze(model: nn.Module) -> None:
        next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)

    yield "a frozen parameter", freeze

    def hook(model: nn.Module) -> None:
        module = model.get_submodule(next(reversed(called)))
        module.register_forward_hook(lambda module, args, output: output + output.tanh())

    yield "a forward hook", hook

    for name, module in called.items():
        if type(module).__module__.endswith(("activation", "activations")) and name:

            def replace(model: nn.Module, name: str = name) -> None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, nn.Softplus())

            yield f"another activation at {name}", replace
            break
    for value, kind in (("p", "Dropout"), ("eps", "Norm")):
        for name, module in called.items():
            if kind in type(module).__name__ and isinstance(getattr(module, value, None), float):

                def put(model: nn.Module, name: str = name, value: str = value) -> None:
                    setattr(model.get_submodule(name), value, 0.5)

                yield f"{value} of {name}", put
                break


def _called(entry: Entry) -> dict[str, nn.Module]:
    """The inner modules that give a tensor in one pass of the model, by name, the last call last."""
    model = entry.model()
    called: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or "parametrizations" in name:
            continue

        def note(module: nn.Module, args: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                called.pop(name, None)
                called[name] = module

        module.register_forward_hook(note)
    args, kwargs = arguments(entry.tasks()[0].support[0])
    with torch.no_grad():
        model(*args, **kwargs)
    return called
