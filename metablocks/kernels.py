"""Kernels that can be differentiated twice, where a second derivative is taken, and only there.

Fused attention and the recurrent layers of oneDNN and cuDNN have a first derivative alone; PyTorch has
another kernel for each. Its switches belong to the whole process: the first thread to ask turns them,
the last one to leave turns them back.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.backends import cudnn, mkldnn


class _Local(threading.local):
    wanted = False


_local = _Local()


def twice_differentiable(wanted: bool = True) -> AbstractContextManager[None]:
    """Run a block with kernels that have a second derivative, if `wanted`.

    Law: values and first derivatives stay, up to rounding.

    >>> with twice_differentiable():
    ...     torch.backends.cuda.flash_sdp_enabled(), second_derivative_wanted()
    (False, True)
    """
    return nullcontext() if not wanted or _local.wanted else _wanted


def second_derivative_wanted() -> bool:
    """True if this thread is in `twice_differentiable`."""
    return _local.wanted


def unfused(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer's `forward`, run by PyTorch's own operations."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _recurrent:
            return forward(*args, **kwargs)

    return run


class _Off:
    """Switches turned off while any thread is inside."""

    def __init__(self, *switches: tuple[Callable[[], bool], Callable[[bool], Any]]) -> None:
        self.switches = switches
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[tuple[Callable[[bool], Any], bool]] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = [(turn, is_on()) for is_on, turn in self.switches]
                for turn, on in self.before:
                    if on:
                        turn(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for turn, on in self.before:
                    turn(on)


class _Wanted:
    """A block of this thread whose second derivative is taken."""

    def __enter__(self) -> None:
        _attention.__enter__()
        _local.wanted = True

    def __exit__(self, *_: object) -> None:
        _local.wanted = False
        _attention.__exit__()


_of_gpus = (
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
)
_attention = _Off(
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    *(_of_gpus if torch.version.cuda or torch.version.hip else ()),
)
_wanted = _Wanted()
_recurrent = _Off(
    (lambda: bool(mkldnn.enabled), torch._C._set_mkldnn_enabled),
    (lambda: bool(cudnn.enabled), torch._C._set_cudnn_enabled),
)
