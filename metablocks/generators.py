"""The states of the random generators that a computation can draw from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def devices_of(tree: Any) -> list[torch.device]:
    """The devices of a tree's tensors, the CPU's first, which is always there."""
    found = {leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}
    others = sorted((device for device in found if device.type != "cpu"), key=str)
    return [torch.device("cpu"), *others]


def get_states(devices: Sequence[torch.device]) -> list[Tensor]:
    """The state of each device's generator.

    >>> states = get_states(devices_of(torch.ones(1)))
    >>> first = torch.rand(2)
    >>> set_states(devices_of(torch.ones(1)), states)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    return [
        torch.get_rng_state()
        if device.type == "cpu"
        else torch.get_device_module(device.type).get_rng_state(device)
        for device in devices
    ]


def set_states(devices: Sequence[torch.device], states: Sequence[Tensor]) -> None:
    """Put the generators back into an earlier state."""
    for device, state in zip(devices, states, strict=True):
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device.type).set_rng_state(state, device)
