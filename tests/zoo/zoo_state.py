"""What a call may not move: a model's tensors, attributes and flags, and all random generators."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Copies of everything, by path."""
    state: dict[str, Any] = {
        "torch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
        **_walked(np.random.get_state(), "NumPy's generator"),
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"{name} is"] = id(parameter)
        state[f"{name}.requires_grad"] = parameter.requires_grad
        state[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            state.update(_walked(value, f"{name}.{attribute}"))
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths of what is not bit-identical, or is in one of the two alone."""
    return [
        path
        for path in sorted({*before, *after})
        if path not in before or path not in after or not _same(before[path], after[path])
    ]


def generators(module: nn.Module) -> list[Any]:
    """The states of the global generators and of the module's own."""
    own = [v.get_state() for v in vars(module).values() if isinstance(v, torch.Generator)]
    return [torch.get_rng_state(), random.getstate(), np.random.get_state(), *own]


def set_generators(module: nn.Module, states: list[Any]) -> None:
    """Put them back."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    own = [v for v in vars(module).values() if isinstance(v, torch.Generator)]
    for generator, state in zip(own, states[3:], strict=True):
        generator.set_state(state)


class Draws:
    """The generators' states at each pass of one model, to be given to the passes of another.

    Which draws a task gets is for the learner to say. What they do to the gradient is not: with the
    same draws in the same passes it is plain autograd's.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, list[Any]]] = []

    def record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the first model."""
        self.passes.append((args[0], generators(module)))

    def replay(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the second: the states at the next pass on the same input."""
        same = [i for i, (x, _) in enumerate(self.passes) if torch.equal(x, args[0])]
        assert same, "there was no such pass, or one less"
        set_generators(module, self.passes.pop(same[0])[1])


def _walked(value: Any, path: str = "", seen: tuple[int, ...] = ()) -> dict[str, Any]:
    """Leaves by path, through dicts, lists, tuples, sets and the attributes of plain objects."""
    if isinstance(value, Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, torch.Generator):
        return {path: value.get_state()}
    if isinstance(value, np.ndarray):
        return {path: torch.from_numpy(value.copy())}
    if isinstance(value, PLAIN):
        return {path: value}
    if id(value) in seen or isinstance(value, nn.Module | type) or callable(value):
        return {path: id(value)}
    parts = vars(value) if hasattr(value, "__dict__") and not isinstance(value, dict) else value
    if isinstance(parts, dict):
        named = [(f"[{key}]", part) for key, part in parts.items()]
    elif isinstance(parts, list | tuple):
        named = [(f"[{index}]", part) for index, part in enumerate(parts)]
    elif isinstance(parts, set | frozenset):
        return {path: frozenset(map(str, parts))}
    else:
        return {path: id(value)}
    leaves: dict[str, Any] = {f"{path} is": type(value).__name__, f"len({path})": len(named)}
    for key, part in named:
        leaves |= _walked(part, path + key, (*seen, id(value)))
    return leaves


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
