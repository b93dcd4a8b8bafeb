"""Resolve a device name ("auto", "cpu", "cuda:1") on this machine."""

import torch


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
