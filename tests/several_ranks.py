"""Trainings over 1, 2 and 3 processes: `python several_ranks.py OUT`, which only the tests start.

The processes are forked, so that nothing is imported twice, and meet in a file. Each saves what it has
computed in `OUT/<name>-<rank>-of-<count>.pt`.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import GradientError, ProcessError
from metablocks.meta_steps import accuracy

STEPS = 15
FEW = 4


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)]
    return mb.per_step_batch_norm(nn.Sequential(*layers), 2)


def images(count: int) -> mb.TaskBatch:
    torch.manual_seed(2)
    support, query = (torch.randn(count, n, 1, 4, 4) for n in (3, 2))
    return mb.TaskBatch(
        (support, torch.randint(3, (count, 3))), (query, torch.randint(3, (count, 2)))
    )


def learner_of(executor: mb.Executor, model: nn.Module | None = None) -> mb.MetaLearner:
    return mb.MetaLearner(
        model or net(),
        loss=F.cross_entropy,
        steps=2,
        rule=mb.LearningRate(0.1, granularity="tensor", learn=True),
        executor=executor,
    )


def own(tasks: mb.TaskBatch, executor: mb.Executor) -> mb.TaskBatch | list[mb.Task]:
    """The tasks of this process."""
    if not isinstance(executor, mb.Distributed):
        return tasks
    part = executor.part(range(len(tasks)))
    return tasks[part.start : part.stop] if part else []


def train(executor: mb.Executor, count: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Parameters and batch norm's statistics after training on `count` tasks a step; the last results."""
    tasks = images(4 * count)
    learner = learner_of(executor)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
    for step in range(steps):
        first = step % 4 * count
        batch = own(tasks[first : first + count], executor)
        result = learner.backward(batch, metric=accuracy)
        optimizer.step()
        optimizer.zero_grad()
    results = {"loss": result.loss, "query_losses": result.query_losses, "scores": result.scores}
    return {**learner.state_dict(), **results}


def drawing(executor: mb.Executor, count: int) -> dict[str, torch.Tensor]:
    """Parameters after training with dropout and mini-batches, and the generator's state."""
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)]
    rule = mb.LearningRate(0.1)
    blocks = {"steps": 2, "rule": rule, "batches": mb.Minibatches(2), "executor": executor}
    learner = mb.MetaLearner(nn.Sequential(*layers), loss=F.cross_entropy, **blocks)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
    tasks = images(count)
    for _ in range(FEW):
        learner.backward(own(tasks, executor))
        optimizer.step()
        optimizer.zero_grad()
    return {**learner.state_dict(), "random": torch.get_rng_state()}


class Sampled(mb.tasks.Sinusoid):
    """Sinusoids that note which tasks of a split were asked for."""

    def __init__(self) -> None:
        super().__init__(shots=3, queries=2)
        self.asked: dict[str, list[int]] = {"train": [], "validation": []}

    def sample(self, split, indices):
        self.asked[split] += indices
        return super().sample(split, indices)


def fitted(executor: mb.Executor) -> dict[str, object]:
    """What `fit` and `train_maml` return of two tasks a step, and the tasks that they asked for."""
    sources = [Sampled(), Sampled()]

    def regression() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    learner = mb.MetaLearner(
        regression(), loss=F.mse_loss, steps=2, rule=mb.LearningRate(0.1), executor=executor
    )
    sizes = {"epochs": 2, "tasks_per_step": 2, "progress": False}
    epochs = mb.fit(
        learner,
        sources[0],
        optimizer=torch.optim.SGD(learner.parameters(), lr=0.05),
        steps_per_epoch=FEW,
        validation=sources[0],
        metric=lambda prediction, target: -(prediction - target).abs().max(),
        keep_best=True,
        **sizes,
    )
    maml, history = mb.train_maml(
        regression(), sources[1], iterations=FEW, validation=sources[1], executor=executor, **sizes
    )
    numbers = [history.losses, history.validation_losses, [epoch.loss for epoch in epochs]]
    numbers += [[epoch.score for epoch in epochs], *(epoch.scores.tolist() for epoch in epochs)]
    results = {f"numbers {n}": torch.tensor(each) for n, each in enumerate(numbers)}
    weights = {
        f"{i}.{n}": t for i, l in enumerate((learner, maml)) for n, t in l.state_dict().items()
    }
    return {"results": results | weights, "asked": [source.asked for source in sources]}


class Parts(nn.Module):
    """A net of which each task uses the part that its first input names."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.ones(2))
        self.other = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.parts.sum() if x[0, 0] == 0 else self.other)


def reach(executor: mb.Distributed, rank: int) -> str:
    """A parameter that the tasks of one process use, and one that none uses."""

    def task(part: float) -> mb.Task:
        x = torch.full((3, 1), part)
        return mb.Task((x, x), (x, x))

    def learner() -> mb.MetaLearner:
        rule = mb.LearningRate(0.1)
        return mb.MetaLearner(Parts(), loss=F.mse_loss, steps=1, rule=rule, executor=executor)

    learner().meta_gradient([[task(0.0)], [task(1.0)], []][rank])
    try:
        learner().meta_gradient([[task(1.0)], [task(1.0)], []][rank])
    except GradientError as error:
        return str(error)
    return ""


def one_ends(executor: mb.Distributed, rank: int) -> str:
    if rank == 1:
        os._exit(0)
    try:
        train(executor, 5, 1)
    except ProcessError as error:
        return str(error)
    return ""


def checks(count: int, rank: int) -> dict[str, object]:
    results: dict[str, object] = {"five": train(mb.Distributed(mb.Vmap()), 5)}
    if count == 2:
        results["loop"] = train(mb.Distributed(mb.Loop(workers=2)), 5, FEW)
        results["traced"] = train(mb.Distributed(mb.Vmap(compile="trace")), 5, FEW)
    if count == 3:
        results["drawing five"] = drawing(mb.Distributed(), 5)
        results["drawing two"] = drawing(mb.Distributed(), 2)
        results["fitted"] = fitted(mb.Distributed(mb.Vmap()))
        results["two"] = train(mb.Distributed(mb.Vmap(chunk=1)), 2)
        results["reach"] = reach(mb.Distributed(), rank)
        results["one ends"] = one_ends(mb.Distributed(), rank)
    return results


def fork(count: int, work: Callable[[int], object]) -> list[int]:
    """The exit statuses of `work(rank)` in so many children."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            try:
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    import torch._dynamo
    import torch._functorch.partitioners
    import torch._inductor.fx_passes.dedupe_symint_uses  # which the first call of each would import

    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for count in (1, 2, 3):

        def work(rank: int, count: int = count) -> None:
            place = f"file://{out}/meet-{count}"
            dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
            torch.save(checks(count, rank), out / f"{rank}-of-{count}.pt")

        print(fork(count, work))
