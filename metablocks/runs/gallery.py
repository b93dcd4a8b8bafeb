"""Example tasks of images: support and query by class, each with what was predicted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES = 10
SUPPORTS = 2
QUERIES = 8
LIMITS = (
    f"; of each task at most {CLASSES} classes, of each class {SUPPORTS} of the support set and "
    f"{QUERIES} queries, the wrong ones first"
)
_BORDER = 2
_RIGHT, _WRONG, _SUPPORT = (0, 120, 60), (190, 20, 40), (255, 255, 255)

Image = NDArray[np.uint8]


class ClassRow(NamedTuple):
    """One class of a task: its images `[height, width, 3]`, and the class predicted for each query."""

    number: int
    support: list[Image]
    query: list[tuple[Image, int]]


def class_rows(example: Mapping[str, Any]) -> list[ClassRow]:
    """The classes of an example as `test.npz` has it, of each the wrongly predicted queries first."""
    rows = []
    for number in sorted({*example["support_y"].tolist()})[:CLASSES]:
        support = example["support"][example["support_y"] == number][:SUPPORTS]
        mine = example["query_y"] == number
        pairs = zip(example["query"][mine], example["prediction"][mine].tolist(), strict=True)
        query = sorted(pairs, key=lambda pair: pair[1] == number)[:QUERIES]
        pictures = [(_picture(image), predicted) for image, predicted in query]
        rows.append(ClassRow(number, [_picture(image) for image in support], pictures))
    return rows


def mosaic(rows: Sequence[ClassRow]) -> tuple[Image, list[tuple[float, float, str]]]:
    """One picture of a task, a row a class, and words with their places: classes, wrong predictions.

    Support stands to the left of a gap. Queries have a green frame if predicted rightly, a red one if
    not.
    """
    height, width, _ = rows[0].support[0].shape
    tall, wide = height + 2 * _BORDER, width + 2 * _BORDER
    left = max(len(row.support) for row in rows)
    across = left + max(len(row.query) for row in rows)
    gap = wide // 2
    canvas = np.full((tall * len(rows), wide * across + gap, 3), 255, np.uint8)
    texts = []
    for place, row in enumerate(rows):
        tiles = [(image, _SUPPORT, column * wide) for column, image in enumerate(row.support)]
        texts.append((0.25 * wide, (place + 0.85) * tall, str(row.number)))
        for column, (image, predicted) in enumerate(row.query, left):
            right, x = predicted == row.number, column * wide + gap
            tiles.append((image, _RIGHT if right else _WRONG, x))
            if not right:
                texts.append((x + wide / 2, (place + 0.85) * tall, f"→ {predicted}"))
        for image, colour, x in tiles:
            y = place * tall
            canvas[y : y + tall, x : x + wide] = colour
            canvas[y + _BORDER : y + tall - _BORDER, x + _BORDER : x + wide - _BORDER] = image
    return canvas, texts


def _picture(image: Image) -> Image:
    """`[channels, height, width]` as `[height, width, 3]`."""
    turned = image.transpose(1, 2, 0)
    return np.repeat(turned, 3, 2) if turned.shape[2] == 1 else turned
