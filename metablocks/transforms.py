"""Derivatives that leave no graph behind."""

from collections.abc import Callable
from typing import Any

import torch


def vjp_once(function: Callable[..., tuple[Any, Any]], *primals: Any) -> tuple[Any, Any, Any]:
    """`torch.func.vjp` with `has_aux=True`: `(outputs, pull, aux)`, `pull` being called once.

    The graph is given back while `pull` runs, and `pull` is differentiable where gradients are
    enabled when it runs, and only there; `torch.func.grad` always makes the graph of the gradient,
    at several times the memory.

    >>> value, pull, _ = vjp_once(lambda x: (x**3, ()), torch.tensor(2.0))
    >>> pull(torch.ones_like(value))
    (tensor(12.),)
    """
    vjp: Any = torch.func.vjp
    outputs, pull, aux = vjp(function, *primals, has_aux=True)

    def pull_once(cotangents: Any) -> Any:
        return pull(cotangents, retain_graph=torch.is_grad_enabled())

    return outputs, pull_once, aux
