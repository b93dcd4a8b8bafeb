"""A rule of one's own that is subtly wrong: it trains, and its meta-gradient is not the loss's slope."""

import torch

from metablocks import UpdateRule


class Normalised(UpdateRule):
    """u = −α g / ‖g‖. The norm is read off the numbers, and its derivative is lost."""

    def __init__(self, *, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, updates, state, step):
        size = torch.stack([g.detach().square().sum() for g in updates.values()]).sum().sqrt()
        return {name: -self.rate * g / (size + 1e-3) for name, g in updates.items()}, state
