"""The optimisers of `torch.optim` inside a task, each held to it: `pytest recipes/python`.

Those that ship are chains: SGD is `Chain(WeightDecay(d), Momentum(μ), LearningRate(α))`, Adam
`Chain(Adam(), LearningRate(α))`, AdamW `Chain(Adam(), WeightDecay(d), LearningRate(α))`, and Adamax,
RMSprop and Adagrad stand for Adam. The others are rules of a few lines. A derivative flows through all
of it, so that they can be learned through; √v̂ has none at v̂ = 0, hence the eps inside of it, where
`torch.optim` adds it.
"""

import pytest
import torch
from torch import nn

import metablocks as mb

STEPS = 6


class Adadelta(mb.UpdateRule):
    """Zeiler 2012: u = g √(Δ + ε) / √(v + ε), v and Δ the running means of g² and u²."""

    def __init__(self, rho=0.9, eps=1e-6):
        super().__init__()
        self.rho, self.eps = rho, eps

    def init(self, params):
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return zeros, zeros

    def forward(self, updates, state, step):
        (squares, moves), rho = state, self.rho
        squares = {n: rho * squares[n] + (1 - rho) * g * g for n, g in updates.items()}
        given = {
            n: g * ((moves[n] + self.eps) / (squares[n] + self.eps)).sqrt()
            for n, g in updates.items()
        }
        moves = {n: rho * moves[n] + (1 - rho) * u * u for n, u in given.items()}
        return given, (squares, moves)


class Moments(mb.UpdateRule):
    """Running means of g and g², as NAdam and RAdam have them."""

    def __init__(self, beta1=0.9, beta2=0.999, eps=1e-8):
        super().__init__()
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def init(self, params):
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return zeros, zeros

    def forward(self, updates, state, step):
        (first, second), b1, b2 = state, self.beta1, self.beta2
        first = {n: b1 * first[n] + (1 - b1) * g for n, g in updates.items()}
        second = {n: b2 * second[n] + (1 - b2) * g * g for n, g in updates.items()}
        return self.direction(updates, first, second, step.index + 1), (first, second)

    def root(self, second, t):
        """√v̂, of step t."""
        return (second / (1 - self.beta2**t) + self.eps**2).sqrt()


class NAdam(Moments):
    """Dozat 2016: Adam with Nesterov's momentum, which torch lets grow with the step."""

    def momentum(self, t):
        return self.beta1 * (1 - 0.5 * 0.96 ** (0.004 * t))

    def direction(self, gradients, first, second, t):
        now, then, all_ = self.momentum(t), self.momentum(t + 1), 1.0
        for k in range(1, t + 1):
            all_ *= self.momentum(k)
        return {
            n: ((1 - now) / (1 - all_) * g + then / (1 - all_ * then) * first[n])
            / self.root(second[n], t)
            for n, g in gradients.items()
        }


class RAdam(Moments):
    """Liu et al. 2020: Adam with its variance rectified, and without it in the first steps."""

    def direction(self, gradients, first, second, t):
        most = 2 / (1 - self.beta2) - 1
        length = most - 2 * t * self.beta2**t / (1 - self.beta2**t)
        means = {n: m / (1 - self.beta1**t) for n, m in first.items()}
        if length <= 5:
            return means
        share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        return {n: m * share**0.5 / self.root(second[n], t) for n, m in means.items()}


class Rprop(mb.UpdateRule):
    """Riedmiller, Braun 1993: the sign of g, by a size that grows while the sign stays.

    Sizes are constants: a derivative by a sign is zero. It negates, and takes no rate behind it.
    """

    negates = True

    def __init__(self, rate=0.01, shrink=0.5, grow=1.2):
        super().__init__()
        self.rate, self.shrink, self.grow = rate, shrink, grow

    def init(self, params):
        sizes = {name: torch.full_like(p, self.rate) for name, p in params.items()}
        return sizes, {name: torch.zeros_like(p) for name, p in params.items()}

    def forward(self, updates, state, step):
        sizes, before = state
        turned = {n: (g * before[n]).sign() for n, g in updates.items()}
        factors = {
            n: 1 + (self.grow - 1) * (s > 0) + (self.shrink - 1) * (s < 0)
            for n, s in turned.items()
        }
        sizes = {n: (size * factors[n]).clamp(1e-6, 50) for n, size in sizes.items()}
        held = {n: torch.where(turned[n] < 0, 0.0, g) for n, g in updates.items()}
        return {n: -g.sign() * sizes[n] for n, g in held.items()}, (sizes, held)


@pytest.mark.parametrize(
    ("rule", "optimizer", "fields"),
    [
        (lambda: mb.Chain(Adadelta(), mb.LearningRate(0.5)), "Adadelta", {"lr": 0.5}),
        (lambda: mb.Chain(NAdam(eps=1e-12), mb.LearningRate(0.1)), "NAdam",
         {"lr": 0.1, "eps": 1e-12}),
        (lambda: mb.Chain(RAdam(0.9, 0.9, 1e-12), mb.LearningRate(0.1)), "RAdam",
         {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-12}),
        (Rprop, "Rprop", {"lr": 0.01}),
    ],
    ids=["Adadelta", "NAdam", "RAdam", "Rprop"],
)  # fmt: skip
def test_a_rule_takes_the_steps_of_torch_optim(rule, optimizer, fields):
    torch.manual_seed(0)
    start = {"w": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    x, y = torch.randn(2, 8, 3, dtype=torch.float64)

    def loss(params, batch):
        inputs, target = batch
        return (
            (torch.tanh(inputs @ params["w"].T @ params["w"] + params["b"]) - target)
            .square()
            .mean()
        )

    ours = mb.adapt(loss, start, (x, y), rule=rule().setup(start, steps=STEPS), steps=STEPS)
    theirs = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    steps = getattr(torch.optim, optimizer)(theirs.values(), **fields)
    for k in range(STEPS):
        steps.zero_grad()
        loss(theirs, (x, y)).backward()
        steps.step()
        for name, parameter in theirs.items():
            torch.testing.assert_close(
                ours.params[k + 1][name], parameter.detach(), rtol=1e-7, atol=1e-9
            )
