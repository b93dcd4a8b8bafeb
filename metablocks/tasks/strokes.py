"""Strokes: an endless supply of handwriting-like characters, drawn by a formula, no data needed.

A class (a character) is two to four pen strokes. A stroke is a smooth curve through a few control
points: a walk whose heading turns at random. An example is the same character in another hand:
control points displaced, the whole slanted, turned, scaled and shifted, another pen width. The ink
at pixel (i, j), at distance in units of the pen width s, is

    ink = clip(1.8 v − 0.25, 0, 1),   v[i, j] = Σ_p w_p exp(−(i − y_p)²/2s²) exp(−(j − x_p)²/2s²)

over points p along the curves, w_p being the length of curve that p stands for, over √(2π) s: the
middle of a straight line gets v = 1. The sum is one matrix product an image.

Curves: Catmull, Rom, "A class of local interpolating splines", 1974. Characters made of stroke
programs: Lake, Salakhutdinov, Tenenbaum 2015. The numbers are this file's own.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from metablocks.checks import (
    Count,
    CountFrom0,
    Decay,
    Device,
    Interval,
    NonNegative,
    Positive,
    check,
    checked,
)
from metablocks.errors import TaskError
from metablocks.tasks.base import Kind, Split, generator, task_numbers
from metablocks.tasks.episode_sampling import WaysOrRange, ends, episode_tasks
from metablocks.types import Task, TaskBatch, TaskList

Floats = NDArray[np.float32]

CONTROLS = 5  # control points of a stroke
POINTS = 32  # points at which a stroke is inked
_CLASS = 1  # last counter of a class's generator; a task's has none, so the two never coincide
_WAYS = 2  # last counter of the generator of a task's ways
_LABELS = 3  # last counter of the generator of a task's wrong labels
_CLASSES = 2**31  # class numbers are drawn below this


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Strokes:
    """Tasks of made-up characters; every class of every split is a new one.

    `sample` returns inputs float32 in [0, 1], ink 1, `[tasks, ways * examples, 1, size, size]`, and
    targets int64 `[tasks, ways * examples]`, class-major; for a range of `ways` a `TaskList` of tasks
    with ways of their own, and `outputs` is the highest. Obeys the law of `TaskSource`; a class
    is a function of (seed, split, class number) alone, so no split shares a class with another.

    - `ways`: classes of a task; a range [low, high], from which each task draws its own, for
      `Loop`.
    - `shots`: support examples of each class.
    - `queries`: query examples of each class.
    - `size`: side of the image, in pixels.
    - `min_strokes`, `max_strokes`: the fewest and the most strokes of a character.
    - `jitter`: standard deviation of a control point's displacement, as a share of half the image.
    - `pose`: how much examples differ in slant, turn, size and place; 0 not at all.
    - `pen`: range of the pen width, in 28ths of the image.
    - `wrong_labels`: share of the support examples of each task, drawn by chance and rounded to
      whole ones, whose label is another of its classes; query labels are right.

    Raises `TaskError` for a field out of its range.

    >>> import metablocks as mb
    >>> tasks = mb.tasks.Strokes(ways=5, shots=1, queries=15).sample("train", range(2))
    >>> tasks.support[0].shape, tasks.query[1].shape
    (torch.Size([2, 5, 1, 28, 28]), torch.Size([2, 75]))
    """

    kind: ClassVar[Kind] = "classification"

    ways: WaysOrRange
    shots: Count
    queries: Count
    size: Annotated[int, Ge(8)] = 28
    min_strokes: Count = 2
    max_strokes: Count = 4
    jitter: NonNegative = 0.04
    pose: NonNegative = 1.0
    pen: Interval = (0.45, 0.65)
    wrong_labels: Decay = 0.0
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if self.min_strokes > self.max_strokes:
            words = f"is {self.min_strokes}, above max_strokes, {self.max_strokes}"
            raise TaskError.about("Strokes", "min_strokes", words)
        check("Strokes", "pen", self.pen[0], Positive, TaskError)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.size, self.size)

    @property
    def outputs(self) -> int:
        return ends(self.ways)[1]

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch | TaskList:
        """Tasks number `indices` of a split."""
        # One drawing call a task: a matrix product may round by the number of its factors, and a
        # task must not depend on its neighbours.
        return TaskList.gather([self._task(split, index) for index in task_numbers(indices)])

    def _task(self, split: Split, index: int) -> Task:
        """One task, wrong labels among those of its support set."""
        images = self._images(split, index)
        task = episode_tasks(images[None, :, :, None], self.shots)[0]
        if not self.wrong_labels:
            return task
        inputs, labels = task.support
        rng = generator(self.seed, split, index, _LABELS)
        shifts = np.zeros(len(labels), dtype=np.int64)
        wrong = rng.choice(len(labels), round(self.wrong_labels * len(labels)), replace=False)
        shifts[wrong] = rng.integers(1, len(images), size=len(wrong))
        labels = (labels + torch.from_numpy(shifts).to(labels.device)) % len(images)
        return Task((inputs, labels), task.query)

    def character(self, split: Split, number: int) -> tuple[Floats, int]:
        """Control points `[max_strokes, 5, 2]` (x, y in about [-1, 1]) of a class, and its strokes.

        A function of (seed, split, number, max_strokes, min_strokes). Only the first so many
        strokes are inked.

        >>> points, strokes = Strokes(ways=5, shots=1, queries=1).character("test", 7)
        >>> points.shape, 2 <= strokes <= 4
        ((4, 5, 2), True)
        """
        rng = generator(self.seed, split, number, _CLASS)
        count = int(rng.integers(self.min_strokes, self.max_strokes + 1))
        return _control_points(rng, self.max_strokes, count), count

    def _images(self, split: Split, index: int) -> Tensor:
        """The images of one task, `[ways, shots + queries, size, size]`, on the device."""
        rng = generator(self.seed, split, index)
        ways = self.ways
        if not isinstance(ways, int):
            low, high = ways
            ways = int(generator(self.seed, split, index, _WAYS).integers(low, high + 1))
        classes = rng.choice(_CLASSES, ways, replace=False)
        characters = [self.character(split, int(number)) for number in classes]
        controls = np.stack([points for points, _ in characters])
        inked = np.arange(self.max_strokes) < np.array([[count] for _, count in characters])
        examples = self.shots + self.queries
        points = _write(rng, controls, examples, self.jitter, self.pose)
        thin, bold = self.pen
        pen = (thin + (bold - thin) * rng.random((ways, examples))) * (self.size / 28)
        pixels = (points + 1) * (self.size / 2) - 0.5
        weights = _lengths(pixels) * inked[:, None, :, None]
        flat = (ways * examples, self.max_strokes * POINTS)
        images = rasterise(
            torch.from_numpy(pixels.reshape(*flat, 2)).to(self.device),
            torch.from_numpy(weights.reshape(flat)).to(self.device),
            torch.from_numpy(pen.reshape(-1).astype(np.float32)).to(self.device),
            self.size,
        )
        return images.view(ways, examples, self.size, self.size)


def rasterise(points: Tensor, lengths: Tensor, pen: Tensor, size: int) -> Tensor:
    """Ink of points on curves: `[images, size, size]` in [0, 1].

    `points` `[images, points, 2]`: x and y in pixels, pixel centres at whole numbers; `lengths`
    `[images, points]`: the length of curve, in pixels, that each point stands for; `pen`
    `[images]`: standard deviation of the pen's profile, in pixels. One dtype, one device.

    >>> x = torch.linspace(-20, 30, 200)
    >>> line = torch.stack([x, torch.full_like(x, 4.0)], dim=-1)[None]
    >>> image = rasterise(line, torch.full((1, 200), 0.25), torch.ones(1), 9)
    >>> image[0, 4].min().item(), image[0, 8].max().item()
    (1.0, 0.0)
    """
    # Everything in units of √2 pen widths, while the tensors are small.
    unit = math.sqrt(2) * pen[:, None, None]
    centres = torch.arange(size, dtype=points.dtype, device=points.device)[:, None] / unit
    places = points.transpose(1, 2).contiguous() / unit  # [images, 2, points]
    # Far from the pen e⁻³⁰ will do for zero: numbers near float32's smallest are slow to multiply.
    along_x = (centres - places[:, 0:1]).square_().neg_().clamp_(min=-30).exp_()
    along_y = (centres - places[:, 1:2]).square_().neg_().clamp_(min=-30).exp_()
    shares = lengths[:, None, :] / (math.sqrt(math.pi) * unit)
    density = along_y.mul_(shares) @ along_x.transpose(1, 2)
    return (1.8 * density - 0.25).clamp(0, 1)


def _control_points(rng: np.random.Generator, strokes: int, inked: int) -> Floats:
    """A random character `[strokes, CONTROLS, 2]`, its inked strokes centred, within [-0.75, 0.75]."""
    # A walk: the heading turns a little, mostly the same way, so that a stroke bends like a letter.
    heading = rng.uniform(0, 2 * math.pi, (strokes, 1))
    bend = rng.normal(0, 0.6, (strokes, 1)) + rng.normal(0, 0.4, (strokes, CONTROLS - 1))
    angle = heading + np.cumsum(bend, axis=1)
    stride = rng.uniform(0.25, 0.6, (strokes, CONTROLS - 1))
    steps = stride[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    walk = np.concatenate([np.zeros((strokes, 1, 2)), np.cumsum(steps, axis=1)], axis=1)
    walk -= walk.mean(axis=1, keepdims=True)
    # Later strokes start on the first one, or lie somewhere in the middle.
    place = rng.uniform(-0.6, 0.6, (strokes, 2))
    place[0] = 0
    joins = rng.integers(CONTROLS, size=strokes)
    joined = rng.random(strokes) < 0.6
    joined[0] = False
    start = np.where(joined[:, None], walk[0, joins] - walk[:, 0], place)
    character = walk + start[:, None]
    low = character[:inked].min(axis=(0, 1))
    high = character[:inked].max(axis=(0, 1))
    character = (character - (low + high) / 2) * (1.5 / (high - low).max())
    centred: Floats = character.astype(np.float32)
    return centred


def _write(
    rng: np.random.Generator, controls: Floats, examples: int, jitter: float, pose: float
) -> Floats:
    """Examples of characters `[ways, strokes, CONTROLS, 2]`, each in another hand.

    Returns points on the curves, `[ways, examples, strokes, POINTS, 2]`, float32.
    """
    ways, strokes = controls.shape[:2]
    count = (ways, examples)
    noise = rng.standard_normal((*count, strokes, CONTROLS, 2), dtype=np.float32)
    whole = rng.standard_normal((*count, strokes, 1, 2), dtype=np.float32)
    moved = controls[:, None] + jitter * (noise + whole)
    turn, slant, wide, high, right, down = pose * rng.standard_normal((6, *count), dtype=np.float32)
    cos, sin = np.cos(0.12 * turn), np.sin(0.12 * turn)
    linear = np.empty((*count, 2, 2), dtype=np.float32)
    shear = 0.15 * slant
    stretch_x, stretch_y = np.exp(0.1 * wide), np.exp(0.1 * high)
    linear[..., 0, 0] = cos * stretch_x
    linear[..., 0, 1] = (cos * shear - sin) * stretch_y
    linear[..., 1, 0] = sin * stretch_x
    linear[..., 1, 1] = (sin * shear + cos) * stretch_y
    shift = 0.06 * np.stack([right, down], axis=-1)
    # The curve and the pose are both linear in the control points: curve first, on few numbers.
    posed = np.einsum("weij,wescj->wesci", linear, moved) + shift[:, :, None, None]
    curve: Floats = np.einsum("pc,wesci->wespi", _spline(), posed, optimize=True)
    return np.ascontiguousarray(curve)


def _lengths(points: Floats) -> Floats:
    """Length of curve that each point `[..., POINTS, 2]` stands for: half of both its segments."""
    steps = np.diff(points, axis=-2)
    segments = np.sqrt(steps[..., 0] ** 2 + steps[..., 1] ** 2)
    lengths = np.zeros(points.shape[:-1], dtype=np.float32)
    lengths[..., :-1] += segments / 2
    lengths[..., 1:] += segments / 2
    return lengths


@functools.cache
def _spline() -> Floats:
    """Catmull–Rom through CONTROLS points as a matrix `[POINTS, CONTROLS]`; rows sum to 1.

    The curve passes through every control point; the end points count twice.
    """
    u = np.linspace(0, CONTROLS - 1, POINTS)
    segment = np.minimum(u.astype(np.int64), CONTROLS - 2)
    t = u - segment
    blend = 0.5 * np.stack(
        [-(t**3) + 2 * t**2 - t, 3 * t**3 - 5 * t**2 + 2, -3 * t**3 + 4 * t**2 + t, t**3 - t**2]
    )
    matrix = np.zeros((POINTS, CONTROLS))
    for offset in range(4):
        column = np.clip(segment + offset - 1, 0, CONTROLS - 1)
        np.add.at(matrix, (np.arange(POINTS), column), blend[offset])
    spline: Floats = matrix.astype(np.float32)
    return spline
