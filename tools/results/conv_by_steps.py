"""Conv4, 64 filters, max-pool, 28×28: `first K`, `budget` or `memory`.

`first K`: seconds of the first compiled meta-gradient of K inner steps, and of one call after it, for one
task of 5 + 75 images. With an empty folder in `TORCHINDUCTOR_CACHE_DIR` everything is compiled; run again
with the same folder, it is what a second process waits for.

`budget`: the time of the `Adjoint` that `choose_executor` takes within half of `Unrolled`'s peak, beside
`Unrolled`'s, K = 20, one task of 25 + 25 images: the median, least and greatest of seven pairs.

`memory`: the most bytes that tensors hold in one meta-gradient by `Adjoint`, K = 1 and 64, one task of
25 + 25 images, with every carry kept and with every eighth.
"""

import statistics
import sys
import time
from itertools import accumulate

import torch
import torch.nn.functional as F

import metablocks as mb
from metablocks.models import Conv4


def learner_of(steps: int, executor: mb.Executor) -> mb.MetaLearner:
    torch.manual_seed(0)
    net = Conv4(input_shape=(1, 28, 28), outputs=5, downsample="pool")
    rule = mb.LearningRate(0.01)
    return mb.MetaLearner(net, loss=F.cross_entropy, steps=steps, rule=rule, executor=executor)


def task_of(*examples: int) -> mb.TaskBatch:
    sides = ((torch.randn(1, n, 1, 28, 28), torch.arange(n)[None] % 5) for n in examples)
    return mb.TaskBatch(*sides)


def seconds(learner: mb.MetaLearner, tasks: mb.TaskBatch) -> float:
    started = time.perf_counter()
    learner.meta_gradient(tasks)
    return time.perf_counter() - started


def first(steps: int) -> None:
    learner, tasks = learner_of(steps, mb.Loop(compile=True)), task_of(5, 75)
    begin, after = seconds(learner, tasks), min(seconds(learner, tasks) for _ in range(3))
    print(f"K = {steps}: first call {begin:.1f} s, of which compiling {begin - after:.1f}")


def budget() -> None:
    unrolled, chosen, tasks = learner_of(20, mb.Loop()), learner_of(20, mb.Loop()), task_of(25, 25)
    peak = mb.choose_executor(unrolled, tasks).costs["Loop() with Unrolled()"].memory or 0
    choice = mb.choose_executor(chosen, tasks, memory=peak // 2)
    chosen.executor, chosen.estimator = choice.executor, choice.estimator
    print(choice.reason)
    ratios = [1 / (seconds(unrolled, tasks) / seconds(chosen, tasks)) for _ in range(7)]
    figures = ", ".join(f"{f(ratios):.2f}" for f in (statistics.median, min, max))
    print(f"{choice.estimator}: {figures} times Unrolled")


def memory() -> None:
    tasks = task_of(25, 25)
    for every in (1, 8):
        held = {}
        for steps in (1, 64):
            learner = learner_of(steps, mb.Loop())
            learner.estimator = mb.Adjoint(keep_every=every)
            learner.meta_gradient(tasks)
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                learner.meta_gradient(tasks)
            events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
            sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
            held[steps] = max(accumulate(sizes, initial=0)) / 2**20
        figures = ", ".join(f"K = {steps}: {size:.1f} MiB" for steps, size in held.items())
        print(f"{learner.estimator}: {figures}, {held[64] / held[1]:.2f} times")


if __name__ == "__main__":
    torch.set_num_threads(2)
    modes = {"first": lambda: first(int(sys.argv[2])), "budget": budget, "memory": memory}
    modes[sys.argv[1]]()
