"""A whole meta-iteration: tasks drawn from image files, the meta-gradient, a step of Adam.

Ours draw by `mb.tasks.Folders`, which keeps what it has decoded; the others as people write it, by
torchvision's `ImageFolder` behind a `DataLoader` that is given the episodes. Both read the same PNG
files of 105×105, as Omniglot's are, resize them to 28×28, and turn every class of a task by a multiple
of 90°.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import metablocks as mb
from metablocks.torchvision_import import torchvision_module
from recipes.python import draw_folder
from tools.benchmarks.contenders import Gradients, Run
from tools.benchmarks.lineup import Case, Contender
from tools.benchmarks.problem import Problem

PARTS = ("tasks and images", "meta-gradient", "optimiser")
SIZE, IMAGES = 28, 20


def draw_images(folder: Path, case: Case) -> None:
    """Draw characters into `folder`, which is not there yet: as many images of each as Omniglot has."""
    draw_folder.main(folder, train=4 * case.ways, others=2, images=IMAGES, size=105)


class Iteration:
    """A contender's meta-iteration; each call takes the next tasks. `times` has a row of parts a call."""

    def __init__(
        self, gradient: Run, contender: Contender, case: Case, problem: Problem, folder: Path
    ) -> None:
        if contender.processes:
            raise ValueError("the processes beside the first would keep their first tasks")
        self.gradient, self.problem = gradient, problem
        self.batches = (ours if contender.role == "ours" else peers)(folder, case)
        self.optimizer = torch.optim.Adam(problem.trainable.values(), lr=1e-3)
        self.times: list[tuple[float, ...]] = []

    def __call__(self, clock: Callable[[], float]) -> Gradients:
        start = clock()
        have = self.problem.tasks.support[0]
        self.problem.tasks = next(self.batches).to(have.device).to(have.dtype)
        drawn = clock()
        gradients = self.gradient()
        computed = clock()
        for name, parameter in self.problem.trainable.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append((drawn - start, computed - drawn, clock() - computed))
        return gradients


def ours(folder: Path, case: Case) -> Iterator[mb.TaskBatch]:
    """Batches of tasks of a source."""
    source = mb.tasks.Folders(
        folder,
        size=SIZE,
        grey=True,
        ways=case.ways,
        shots=case.shots,
        queries=case.queries,
        rotate=True,
    )
    start = 0
    while True:
        yield source.sample("train", range(start, start + case.tasks))
        start += case.tasks


class Episodes:
    """Lists of the images of a task, class by class, without end: a `batch_sampler`."""

    def __init__(self, labels: list[int], case: Case) -> None:
        of_class = [torch.tensor(labels).eq(n).nonzero().flatten() for n in range(max(labels) + 1)]
        self.of_class, self.case = of_class, case

    def __iter__(self) -> Iterator[list[int]]:
        examples = self.case.shots + self.case.queries
        while True:
            classes = torch.randperm(len(self.of_class))[: self.case.ways].tolist()
            images = [self.of_class[n] for n in classes]
            yield torch.cat([i[torch.randperm(len(i))[:examples]] for i in images]).tolist()


def peers(folder: Path, case: Case) -> Iterator[mb.TaskBatch]:
    """Batches of tasks of a `DataLoader`, whose batch is a task."""
    transforms = torchvision_module("transforms")
    images = torchvision_module("datasets").ImageFolder(
        str(folder / "train"),
        transforms.Compose(
            [transforms.Grayscale(), transforms.Resize((SIZE, SIZE)), transforms.ToTensor()]
        ),
    )
    loader = torch.utils.data.DataLoader(images, batch_sampler=Episodes(images.targets, case))
    episodes = iter(loader)
    while True:
        tasks = [_task(next(episodes)[0], case) for _ in range(case.tasks)]
        inputs, targets, queries, truths = (torch.stack(t) for t in zip(*tasks, strict=True))
        yield mb.TaskBatch((inputs, targets), (queries, truths))


def _task(images: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Support inputs and targets, query inputs and targets of a task, every class turned."""
    by_class = images.unflatten(0, (case.ways, -1))
    turns = torch.randint(4, (case.ways,)).tolist()
    turned = torch.stack([i.rot90(n, (-2, -1)) for i, n in zip(by_class, turns, strict=True)])
    labels = torch.arange(case.ways)[:, None].expand(turned.shape[:2])
    return tuple(
        part.flatten(0, 1)
        for chosen in (slice(case.shots), slice(case.shots, None))
        for part in (turned[:, chosen], labels[:, chosen])
    )
