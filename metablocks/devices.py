"""Resolve a device name ("auto", "cpu", "cuda:1"), and compute in float64 where a device has none.

The rule for devices without float64 (Apple's `mps`, some of Intel's): blocks compute in float32 there,
and laws have float32's tolerances; statistics, distances and finite differences are float64 on the CPU.
"""

from functools import cache

import torch
from torch import Tensor


def find_device(name: str) -> torch.device:
    """`auto` is the accelerator, or the CPU where there is none; other words are torch's own.

    >>> find_device("cpu")
    device(type='cpu')

    Raises `ValueError` for a word that is no device, and for a device that is not here.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return torch.device(here.type if here else "cpu")
    count = torch.accelerator.device_count() if here else 0
    choices = ", ".join(["auto", "cpu", *(f"{here.type}:{n}" for n in range(count) if here)])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'"{name}" is no device; it takes {choices}') from None
    if device.type == "cpu":
        return device
    if here is None or device.type != here.type or (device.index or 0) >= count:
        raise ValueError(f"{name} is not available here; this machine has {choices}")
    return device


@cache
def has_float64(device: torch.device | str) -> bool:
    """True if the device computes in float64, which is tried.

    >>> has_float64("cpu")
    True
    """
    try:
        torch.ones((), dtype=torch.float64, device=device).add_(1)
    except torch.OutOfMemoryError:  # which says nothing of the dtype
        raise
    except (TypeError, RuntimeError):
        return False
    return True


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the CPU if that device has no float64.

    >>> in_float64(torch.ones(2))
    tensor([1., 1.], dtype=torch.float64)
    """
    place = tensor.device if has_float64(tensor.device) else "cpu"
    return tensor.to(place).to(torch.float64)
