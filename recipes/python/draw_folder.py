"""A folder of images to try `maml_own_folder` on: drawn characters as PNG files, a folder for each class.

    python recipes/python/draw_folder.py drawn_characters
    metablocks run maml_own_folder

It makes `drawn_characters/train/train-00/00.png` and so on: 60 classes of 20 images in `train`, 20
in `validation` and 20 in `test`, as a folder of one's own would have them.
"""

import sys
from pathlib import Path

from PIL import Image

import metablocks as mb
from metablocks.tasks.base import Split


def main(
    folder: str | Path, train: int = 60, others: int = 20, images: int = 20, size: int = 28
) -> None:
    """Draw `train` classes, and `others` for validation and for test, of `images` each."""
    counts: dict[Split, int] = {"train": train, "validation": others, "test": others}
    for split, classes in counts.items():
        source = mb.tasks.Strokes(ways=classes, shots=1, queries=images - 1, size=size)
        task = source.sample(split, [0])[0]  # one task of all classes, class-major
        support, query = task.support[0], task.query[0].unflatten(0, (classes, -1))
        for number in range(classes):
            place = Path(folder, split, f"{split}-{number:02}")
            place.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate([support[number], *query[number]]):
                Image.fromarray((255 * image[0]).byte().numpy()).save(place / f"{index:02}.png")
    print(f"{sum(counts.values())} classes of {images} images in {folder}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "drawn_characters")
