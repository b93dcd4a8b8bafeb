"""How far the meta-gradient in bfloat16 is from the one in float64, by inner steps and by pass.

    python tools/results/bfloat16.py [K …]      # prints the table of bfloat16.md

conv4 of 64 filters with max-pooling and batch statistics, two 5-way 1-shot tasks of drawn characters
(`Strokes`, 75 queries each), inner rate 0.1, as it is initialised and after 60 first-order meta-steps
of one inner step. The loop is written by hand; autocast is on around single passes, the gradients of
them included. Cosine and relative error are those of all parameters' gradients as one vector, beside
float64; time is CPU time beside float32, of all passes and of the query pass alone in bfloat16.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metablocks as mb
from metablocks.models import Conv4

RATE, TASKS = 0.1, 2
Chosen = Callable[[int, int], bool]
"""Of a pass and the number of steps K, if it is in bfloat16; the pass K is that of the query set."""

WAYS: dict[str, Chosen] = {
    "all passes": lambda index, steps: True,
    "inner steps alone": lambda index, steps: index < steps,
    "last inner step alone": lambda index, steps: index == steps - 1,
    "query pass alone": lambda index, steps: index == steps,
}


def meta_gradient(
    model: nn.Module, tasks: mb.TaskBatch, steps: int, *, second: bool, chosen: Chosen
) -> Tensor:
    """The mean over tasks of the final query loss's gradient, one vector in float64."""
    initial = dict(model.named_parameters())
    dtype = next(iter(initial.values())).dtype

    def loss(fast: dict[str, Any], batch: Any, index: int) -> Tensor:
        low = chosen(index, steps)
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            return F.cross_entropy(functional_call(model, fast, (batch[0].to(dtype),)), batch[1])

    total: Any = 0.0
    for task in (tasks[number] for number in range(len(tasks))):
        fast: dict[str, Any] = initial
        for index in range(steps):
            grads = torch.autograd.grad(
                loss(fast, task.support, index), list(fast.values()), create_graph=second
            )
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        grads = torch.autograd.grad(loss(fast, task.query, steps), list(initial.values()))
        total = total + torch.cat([g.double().flatten() for g in grads]) / len(tasks)
    return total


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Conv4(input_shape=(1, 28, 28), outputs=5, filters=64, downsample="pool")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model.train()


def trained(model: nn.Module, source: Any, meta_steps: int = 60) -> nn.Module:
    """The same after some meta-steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(meta_steps):
        tasks = source.sample("train", range(2 * step, 2 * step + 2))
        gradient = meta_gradient(model, tasks, 1, second=False, chosen=lambda *_: False)
        parts = gradient.float().split([p.numel() for p in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    return model


def main(counts: list[int]) -> None:
    source = mb.tasks.Strokes(ways=5, shots=1, queries=15)
    tasks = source.sample("test", range(TASKS))
    print("| net | order | K | float32 | " + " | ".join(WAYS) + " | time |")
    print("|---|---|---:|" + "---:|" * (len(WAYS) + 2))
    fresh = net()
    for name, model in (("as initialised", fresh), ("trained", trained(net(), source))):
        for second in (True, False):
            for steps in counts:
                cells, times = [], []
                for chosen in (lambda *_: False, *WAYS.values()):
                    start = time.process_time()
                    given = meta_gradient(model, tasks, steps, second=second, chosen=chosen)
                    times.append(time.process_time() - start)
                    if not cells:
                        exact = meta_gradient(
                            model.double(), tasks, steps, second=second, chosen=chosen
                        )
                        model.float()
                    cosine = float(F.cosine_similarity(given, exact, dim=0))
                    cells.append(
                        f"{cosine:.4f}, {float((given - exact).norm() / exact.norm()):.1e}"
                    )
                order = "second" if second else "first"
                row = [
                    name,
                    order,
                    str(steps),
                    *cells,
                    f"{times[1] / times[0]:.2f}, {times[-1] / times[0]:.2f}",
                ]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1, 2, 3, 5, 10])
