"""Few-shot episodes: the draws of N-way K-shot tasks, and examples arranged as tasks.

A task draws `ways` distinct classes; each class gives `shots` support and `queries` query examples,
all distinct.

Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, "Matching Networks for One Shot
Learning", NeurIPS 2016 (the episode); Santoro et al. 2016 (rotated characters).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from metablocks.checks import Such
from metablocks.tasks.base import Split, generator
from metablocks.types import TaskBatch

Ints = NDArray[np.int64]
Ways = Annotated[int, Ge(2)]
ORDERED = Such(lambda pair: pair[0] <= pair[1], "a range [low, high] of whole numbers")
WaysOrRange = Ways | Annotated[tuple[Ways, Ways], ORDERED]


def ends(value: int | tuple[int, int]) -> tuple[int, int]:
    """The ends of a range; of a number, the number twice.

    >>> ends((3, 8)), ends(5)
    ((3, 8), (5, 5))
    """
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class EpisodeDraws:
    """The classes, images and rotations of a batch of tasks, as int64 arrays on the host.

    `classes` `[tasks, ways]`: class numbers; `examples` `[tasks, ways, shots + queries]`: image
    numbers inside the class; `turns` `[tasks, ways]`: quarter turns, 0 if nothing rotates.
    """

    classes: Ints
    examples: Ints
    turns: Ints


def draw_episodes(
    split: Split,
    indices: Sequence[int],
    *,
    classes: int,
    examples: Any,
    ways: int,
    shots: int,
    queries: int,
    rotate: bool = False,
    seed: int = 0,
) -> EpisodeDraws:
    """Draw tasks number `indices`, each from `generator(seed, split, index)` and nothing else.

    `examples`: those of every class, or `[classes]` of each. Equal numbers draw the same tasks in
    both forms. There are as many classes and examples as a task takes: `ClassTasks` has checked it.

    >>> episodes = draw_episodes("test", [0, 1], classes=50, examples=20, ways=5, shots=1,
    ...                          queries=15)
    >>> episodes.classes.shape, episodes.examples.shape
    ((2, 5), (2, 5, 16))
    """
    most = int(np.max(examples))
    counts = np.broadcast_to(np.asarray(examples), classes)
    drawn: list[tuple[Any, Any, Any]] = []
    for index in indices:
        rng = generator(seed, split, index)
        chosen = rng.choice(classes, ways, replace=False)
        # A random order of all examples of each class; its head is a draw without repeats. Numbers
        # that a smaller class has no example for come last, and the head never reaches them.
        order = rng.random((ways, most))
        order[np.arange(most) >= counts[chosen, None]] = np.inf
        head = order.argsort(axis=1)[:, : shots + queries]
        drawn.append((chosen, head, rng.integers(4, size=ways)))
    classes_drawn, images, turns = map(np.stack, zip(*drawn, strict=True))
    return EpisodeDraws(classes_drawn, images, turns if rotate else np.zeros_like(turns))


def episode_tasks(images: Tensor, shots: int) -> TaskBatch:
    """Tasks of `images` `[tasks, ways, examples, ...]`, `shots` of them support.

    Inputs are `[tasks, ways * examples, ...]`, uint8 divided by 255 to float32, booleans float32 0 and
    1; targets are int64 `[tasks, ways * examples]`, class-major.
    """
    ways = torch.arange(images.shape[1], device=images.device)

    def side(part: slice) -> tuple[Tensor, Tensor]:
        inputs = images[:, :, part].flatten(1, 2).contiguous()
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(torch.float32).div_(255.0)
        elif inputs.dtype == torch.bool:
            inputs = inputs.to(torch.float32)
        size = inputs.shape[1] // len(ways)
        return inputs, ways.repeat_interleave(size).repeat(len(inputs), 1)

    return TaskBatch(support=side(slice(0, shots)), query=side(slice(shots, None)))


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Turn `images` `[tasks, ways, ..., H, W]` by `turns` `[tasks, ways]` quarter turns each."""
    # All four turns of a uint8 batch cost less than the copies and syncs of masked selections.
    every = torch.stack([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])
    row = torch.arange(turns.numel(), device=turns.device) + turns.flatten() * turns.numel()
    return every.flatten(0, 2).index_select(0, row).view(images.shape)
