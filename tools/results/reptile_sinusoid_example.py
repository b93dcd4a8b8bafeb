"""Reptile's published sine example in plain autograd, judged as `reptile_sinusoid` is.

    python tools/results/reptile_sinusoid_example.py

Fifty even points of a sine on [−5, 5], 5 inner steps on shuffled batches of ten of them, ε from 0.1 to 0
over 30 000 tasks, PyTorch's own initial weights. Nothing of metablocks is used.
"""

import math

import torch
from torch import Tensor, nn

GRID = torch.linspace(-5, 5, 50)[:, None]
RATE, ITERATIONS, STEPS, TASKS = 0.02, 30_000, 32, 600


def sine() -> tuple[Tensor, Tensor]:
    """Amplitude U[0.1, 5] and phase U[0, 2π]."""
    return torch.empty(()).uniform_(0.1, 5), torch.empty(()).uniform_(0, 2 * math.pi)


def descend(net: nn.Module, x: Tensor, y: Tensor) -> None:
    params = list(net.parameters())
    grads = torch.autograd.grad((net(x) - y).square().mean(), params)
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p -= RATE * g


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    for iteration in range(ITERATIONS):
        before = [p.detach().clone() for p in net.parameters()]
        amplitude, phase = sine()
        for rows in torch.randperm(len(GRID)).split(10):
            descend(net, GRID[rows], amplitude * torch.sin(GRID[rows] + phase))
        epsilon = 0.1 * (1 - iteration / ITERATIONS)
        with torch.no_grad():
            for p, start in zip(net.parameters(), before, strict=True):
                p.copy_(start + epsilon * (p - start))
    trained = [p.detach().clone() for p in net.parameters()]
    errors = torch.zeros(TASKS, STEPS + 1)
    for task in range(TASKS):
        with torch.no_grad():
            for p, start in zip(net.parameters(), trained, strict=True):
                p.copy_(start)
        amplitude, phase = sine()
        x, fresh = GRID[torch.randperm(len(GRID))].split([10, 40])
        for step in range(STEPS + 1):
            with torch.no_grad():
                error = (net(fresh) - amplitude * torch.sin(fresh + phase)).square().mean()
            errors[task, step] = error
            descend(net, x, amplitude * torch.sin(x + phase))
    print("| inner steps | query MSE |\n|---:|---:|")
    for step, column in enumerate(errors.T):
        half = 1.96 * column.std() / TASKS**0.5
        print(f"| {step} | {column.mean():.4f} ± {half:.4f} |")


if __name__ == "__main__":
    main()
