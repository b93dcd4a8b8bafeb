"""An update rule of one's own: the sign of the gradient times the root of its size, at a learned rate.

    u = −α g / √(|g| + ε)

A rule takes the gradients of a step by name and returns what is added to the parameters. It is an
`nn.Module`: what it registers as a parameter is meta-learned beside the model. Its laws (gradients
against finite differences, loop = vmap, nothing left behind, …) run by

    cd recipes/python && metablocks verify own_rule:SignedRoot

and in one's own pytest as in `test_own_rule.py`. In a recipe it stands as `{block: own_rule:SignedRoot}`,
for `metablocks run mine.yaml --allow own_rule`.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb


class SignedRoot(mb.UpdateRule):
    """u = −α g / √(|g| + ε), α learned."""

    def __init__(self, *, rate: float = 0.01, eps: float = 1e-3) -> None:
        super().__init__()
        self.initial_rate = rate
        self.eps = eps

    def setup(self, params: mb.Tensors, steps: int) -> Self:
        like = next(iter(params.values()))
        rate = torch.full((), self.initial_rate, dtype=like.dtype, device=like.device)
        self.rate = nn.Parameter(rate)
        return self

    def forward(self, updates: mb.Tensors, state: Any, step: mb.StepInfo) -> tuple[mb.Tensors, Any]:
        # Away from 0 this is −α sign(g) √|g|; ε makes it smooth enough for a second derivative at 0.
        return {n: -self.rate * g / (g.abs() + self.eps).sqrt() for n, g in updates.items()}, state


def main(steps: int = 300) -> float:
    """Meta-learn a sinusoid with the rule; return the last query loss."""
    torch.manual_seed(0)
    source = mb.tasks.Sinusoid(shots=5, queries=10)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    learner = mb.MetaLearner(
        model, loss=F.mse_loss, steps=3, rule=mb.Chain(mb.ClipNorm(10.0), SignedRoot())
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for step in range(steps):
        result = learner.backward(source.sample("train", range(10 * step, 10 * step + 10)))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:4d}  query loss {float(result.loss):.3f}")
    return float(result.loss)


if __name__ == "__main__":
    main()
