"""A training of many meta-steps: `python long_training.py CASE STEPS`, which only the tests start.

Prints a line of JSON: what the process holds after each tenth of the meta-steps.
"""

import json
import sys
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.memory import release_memory
from metablocks.meta_steps import accuracy

WIDE = {"workers": 2, "channels_last": "query"}
CASES = {
    "loop": (mb.Loop, {}, mb.Unrolled()),
    "loop in threads": (mb.Loop, {"workers": 2}, mb.Unrolled()),
    "wide loop": (mb.Loop, WIDE, mb.Unrolled()),
    "vmap": (mb.Vmap, {}, mb.Unrolled()),
    "vmap in chunks": (mb.Vmap, {"chunk": 2}, mb.Unrolled()),
    "adjoint": (mb.Loop, {}, mb.Adjoint()),
    "traced loop": (mb.Loop, {"compile": "trace"}, mb.Unrolled()),
    "traced wide loop": (mb.Loop, {"compile": "trace", **WIDE}, mb.Unrolled()),
    "traced vmap": (mb.Vmap, {"compile": "trace"}, mb.Unrolled()),
    "traced adjoint": (mb.Vmap, {"compile": "trace"}, mb.Adjoint()),
    "compiled loop": (mb.Loop, {"compile": True}, mb.Unrolled()),
    "compiled vmap": (mb.Vmap, {"compile": True}, mb.Unrolled()),
}
SHAPES = [(3, 3, 4), (2, 3, 4), (3, 4, 3)]  # tasks, examples of support and query sets


def learner_of(case: str) -> mb.MetaLearner:
    executor, settings, estimator = CASES[case]
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
    return mb.MetaLearner(
        nn.Sequential(*layers),
        loss=F.cross_entropy,
        steps=2,
        rule=mb.LearningRate(0.1, granularity="tensor", learn=True),
        executor=executor(**settings),
        estimator=estimator,
    )


def tasks_of(shape: tuple[int, int, int]) -> mb.TaskBatch:
    """New tasks of a shape."""
    count, *sizes = shape
    support, query = ((torch.randn(count, n, 1, 4, 4), torch.randint(3, (count, n))) for n in sizes)
    return mb.TaskBatch(support, query)


def held() -> dict[str, int]:
    """Resident memory in bytes, and numbers of threads and open files."""
    release_memory(torch.device("cpu"))
    process = Path("/proc/self")
    pages = int((process / "statm").read_text().split()[1])
    return {
        "memory": 4096 * pages,
        "threads": len([*(process / "task").iterdir()]),
        "of Python": threading.active_count(),
        "files": len([*(process / "fd").iterdir()]),
    }


def train(case: str, steps: int) -> list[dict[str, int]]:
    """What the process holds after each tenth of a training, whose tasks change their shapes."""
    learner = learner_of(case)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.001)
    series = []
    for step in range(1, steps + 1):
        learner.backward(tasks_of(SHAPES[step % len(SHAPES)]), metric=accuracy)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            tasks = tasks_of(SHAPES[0])
            learner.evaluate(tasks, metric=accuracy)
            learner.adapt(tasks[0].support)(tasks[0].query[0])
        if step % (steps // 10) == 0:
            series.append(held())
    return series


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train(sys.argv[1], int(sys.argv[2]))))
