"""A rule of one's own that is right: each gradient by a power of its size, at a learned rate."""

import torch
from torch import nn

from metablocks import UpdateRule


class PowerRate(UpdateRule):
    """u = −α |g|^{p−1} g, with α learned; smooth for p > 1."""

    def __init__(self, *, init: float = 0.1, power: float = 2.0) -> None:
        super().__init__()
        self.value = init
        self.power = power

    def setup(self, params, steps):
        like = next(iter(params.values()))
        self.rate = nn.Parameter(torch.full((), self.value, dtype=like.dtype, device=like.device))
        return self

    def forward(self, updates, state, step):
        return {n: -self.rate * g.abs() ** (self.power - 1) * g for n, g in updates.items()}, state
