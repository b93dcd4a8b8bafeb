"""Few-shot episodes: a bank of images by class, and N-way K-shot tasks gathered from it.

A task draws `ways` distinct classes; each class gives `shots` support and `queries` query images,
all distinct. The images live once, as uint8, on the device; a batch of tasks is one gather there.

Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, "Matching Networks for One Shot
Learning", NeurIPS 2016 (the episode); Santoro et al. 2016 (rotated characters).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from metablocks.checks import Count, CountFrom0, checked
from metablocks.errors import TaskError
from metablocks.tasks.base import Split, generator, task_numbers
from metablocks.types import TaskBatch

Ints = NDArray[np.int64]
Ways = Annotated[int, Ge(2)]


@dataclass(frozen=True)
class ClassBank:
    """Images by class, `[classes, examples, height, width]` uint8, on the device tasks come from.

    Colour images are `[classes, examples, channels, height, width]`. `names` names the classes,
    for people; nothing is computed from it. If classes hold unequal numbers of images, `counts`
    says how many each has: `images[c, :counts[c]]` are class c's, the rest is padding that no task
    draws.

    Raises `TaskError` if the images are not such a tensor or the names or counts do not fit.

    >>> bank = ClassBank(torch.zeros(10, 20, 28, 28, dtype=torch.uint8))
    >>> bank.classes, bank.examples, bank.image_shape
    (10, 20, (1, 28, 28))
    """

    images: Tensor
    names: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or 0 in images.shape:
            raise TaskError(
                f"ClassBank: images is {images.dtype} {list(images.shape)}; it is uint8 [classes, "
                "examples, height, width] or [classes, examples, channels, height, width]"
            )
        if self.names is not None and len(self.names) != self.classes:
            raise TaskError(
                f"ClassBank: {len(self.names)} names for {self.classes} classes; one name a class"
            )
        if self.counts is not None and (
            len(self.counts) != self.classes
            or not all(1 <= count <= self.examples for count in self.counts)
        ):
            raise TaskError(
                f"ClassBank: counts={self.counts}; counts is one number of images a class, for "
                f"{self.classes} classes, each from 1 to {self.examples}"
            )

    @property
    def classes(self) -> int:
        return self.images.shape[0]

    @property
    def examples(self) -> int:
        """Images of each class; of the largest, if classes are unequal."""
        return self.images.shape[1]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)`, the channel of grey images included."""
        shape = tuple(self.images.shape[2:])
        return shape if len(shape) == 3 else (1, *shape)

    @cached_property
    def checksum(self) -> str:
        """SHA-256, in hex, of names, shape, counts (if classes are unequal) and images."""
        described = [self.names, list(self.images.shape), *([self.counts] if self.counts else [])]
        digest = hashlib.sha256(json.dumps(described).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> "ClassBank":
        """The same bank on `device`."""
        images = self.images.to(device)
        return self if images is self.images else ClassBank(images, self.names, self.counts)


@dataclass(frozen=True)
class EpisodeDraws:
    """The classes, images and rotations of a batch of tasks, as int64 arrays on the host.

    `classes` `[tasks, ways]`: class numbers; `examples` `[tasks, ways, shots + queries]`: image
    numbers inside the class; `turns` `[tasks, ways]`: quarter turns, 0 if nothing rotates.
    """

    classes: Ints
    examples: Ints
    turns: Ints


def check_examples(block: str, shots: int, queries: int, examples: int) -> None:
    """Raise `TaskError` for more shots and queries than a class has examples."""
    if shots + queries > examples:
        raise TaskError(
            f"{block}: shots={shots} and queries={queries} need {shots + queries} images of every "
            f"class, and a class has {examples}; shots + queries is at most {examples}",
            block=block,
            field="shots",
        )


@checked(TaskError)
def draw_episodes(
    split: Split,
    indices: Sequence[int],
    *,
    classes: int,
    examples: Any,
    ways: Ways,
    shots: Count,
    queries: Count,
    rotate: bool = False,
    seed: CountFrom0 = 0,
) -> EpisodeDraws:
    """Draw tasks number `indices`, each from `generator(seed, split, index)` and nothing else.

    `examples`: images of every class, or `[classes]` of each. Equal numbers draw the same tasks in
    both forms.

    >>> episodes = draw_episodes("test", [0, 1], classes=50, examples=20, ways=5, shots=1,
    ...                          queries=15)
    >>> episodes.classes.shape, episodes.examples.shape
    ((2, 5), (2, 5, 16))
    """
    fewest, most = int(np.min(examples)), int(np.max(examples))
    check_examples("episodes", shots, queries, fewest)
    if ways > classes:
        raise TaskError(
            f"episodes: ways={ways}, and split {split!r} has {classes} classes; "
            f"ways is at most {classes}"
        )
    counts = np.broadcast_to(np.asarray(examples), classes)
    drawn: list[tuple[Any, Any, Any]] = []
    for index in task_numbers(indices):
        rng = generator(seed, split, index)
        chosen = rng.choice(classes, ways, replace=False)
        # A random order of all images of each class; its head is a draw without repeats. Numbers
        # that a smaller class has no image for come last, and the head never reaches them.
        order = rng.random((ways, most))
        order[np.arange(most) >= counts[chosen, None]] = np.inf
        head = order.argsort(axis=1)[:, : shots + queries]
        drawn.append((chosen, head, rng.integers(4, size=ways)))
    classes_drawn, images, turns = map(np.stack, zip(*drawn, strict=True))
    return EpisodeDraws(classes_drawn, images, turns if rotate else np.zeros_like(turns))


def gather_episodes(bank: ClassBank, episodes: EpisodeDraws, *, shots: int) -> TaskBatch:
    """Fetch the images of `episodes` from `bank`, on the bank's device.

    See `episode_tasks` for the shapes. Support and query of a class share its rotation.

    Raises `TaskError` if images that are not square shall turn.
    """
    device = bank.images.device
    rows = torch.from_numpy(episodes.classes[..., None] * bank.examples + episodes.examples)
    flat = bank.images.flatten(0, 1).index_select(0, rows.flatten().to(device))
    images = flat.view(*rows.shape, *bank.image_shape)  # [tasks, ways, examples, C, H, W]
    if episodes.turns.any():
        images = turn(images, torch.from_numpy(episodes.turns).to(device))
    return episode_tasks(images, shots)


def episode_tasks(images: Tensor, shots: int) -> TaskBatch:
    """Tasks of `images` `[tasks, ways, examples, ...]`, `shots` of them support.

    Inputs are `[tasks, ways * examples, ...]`, uint8 divided by 255 to float32; targets are int64
    `[tasks, ways * examples]`, class-major.
    """
    ways = torch.arange(images.shape[1], device=images.device)

    def side(part: slice) -> tuple[Tensor, Tensor]:
        inputs = images[:, :, part].flatten(1, 2).contiguous()
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(torch.float32).div_(255.0)
        size = inputs.shape[1] // len(ways)
        return inputs, ways.repeat_interleave(size).repeat(len(inputs), 1)

    return TaskBatch(support=side(slice(0, shots)), query=side(slice(shots, None)))


def sample_episodes(
    bank: ClassBank,
    classes: Ints,
    split: Split,
    indices: Sequence[int],
    *,
    ways: int,
    shots: int,
    queries: int,
    rotate: bool = False,
    seed: int = 0,
) -> TaskBatch:
    """Tasks number `indices` of a split that owns `classes` of `bank`: drawn, then gathered.

    >>> bank = ClassBank(torch.zeros(10, 4, 3, 8, 8, dtype=torch.uint8))
    >>> tasks = sample_episodes(bank, np.arange(5, 10), "test", [0, 1], ways=2, shots=1, queries=3)
    >>> tasks.query[0].shape
    torch.Size([2, 6, 3, 8, 8])
    """
    drawn = draw_episodes(
        split,
        indices,
        classes=len(classes),
        examples=bank.examples if bank.counts is None else np.array(bank.counts)[classes],
        ways=ways,
        shots=shots,
        queries=queries,
        rotate=rotate,
        seed=seed,
    )
    return gather_episodes(bank, replace(drawn, classes=classes[drawn.classes]), shots=shots)


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Turn `images` `[tasks, ways, ..., H, W]` by `turns` `[tasks, ways]` quarter turns each."""
    height, width = images.shape[-2:]
    if height != width:
        raise TaskError(
            f"rotation by quarter turns needs square images, and these are {height}×{width}; "
            "use rotate=False"
        )
    # All four turns of a uint8 batch cost less than the copies and syncs of masked selections.
    every = torch.stack([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])
    row = torch.arange(turns.numel(), device=turns.device) + turns.flatten() * turns.numel()
    return every.flatten(0, 2).index_select(0, row).view(images.shape)
