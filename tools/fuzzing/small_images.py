"""Small data sets in the layouts of published ones.

Pixels of mini-ImageNet and CIFAR-100 say who they are: every one of an image is (2 · the class's
number in the split's list, STEP · the position that the image should have in the bank, 7 or 9). Classes
hold 5 or 6 images, or as many as is asked for.
"""

import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from metablocks.tasks.class_splits import CIFAR_FS, MINI_IMAGENET, class_names

STEP = 12
TABLES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}


def counted(name: str) -> int:
    """Images of a class of either data set: 5 or 6."""
    return 5 + sum(name.encode()) % 2


def draw_mini_imagenet(parent: Path, layout: str = "folders", images: int | None = None) -> Path:
    """Write a `mini_imagenet`; its images are the same in every layout.

    `folders`: a folder a class; `splits`: those below train, val and test; `tables`: the CSV files
    and one folder of images.
    """
    root = parent / "mini_imagenet"
    numbers = {name: number for number, name in enumerate(class_names(MINI_IMAGENET))}
    for split, table in TABLES.items():
        rows = ["filename,label"]
        for name in MINI_IMAGENET[split]:
            below = {"folders": name, "splits": f"{Path(table).stem}/{name}", "tables": "images"}
            folder = root / below[layout]
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(images or counted(name)):
                file = f"{name}{number:08d}.png"
                color = (2 * numbers[name], STEP * number, 7)
                Image.new("RGB", (84, 84), color).save(folder / file, compress_level=1)
                rows.append(f"{file},{name}")
        if layout == "tables":
            (root / table).write_text("\n".join(rows) + "\n")
    return parent


def draw_birds(parent: Path, images: int = 4) -> Path:
    """Write a `CUB_200_2011`, in a shade for each class."""
    names = ["001.Black_footed_Albatross", *(f"{number:03d}.Bird" for number in range(2, 201))]
    for number, name in enumerate(names):
        _draw_class(parent / "CUB_200_2011" / "images" / name, number, images)
    return parent


def draw_tiered_imagenet(parent: Path, images: int = 4, lists: bool = False) -> Path:
    """Write a `tiered_imagenet`, in a shade for each class, a folder a split or with `lists`."""
    root, number = parent / "tiered_imagenet", 0
    for below, count in (("train", 351), ("val", 97), ("test", 160)):
        names = [f"n{number + place:08d}" for place in range(count)]
        for name in names:
            folder = root / ("images" if lists else below) / name
            _draw_class(folder, number, images)
            number += 1
        if lists:
            (root / f"{below}.csv").write_text("".join(f"{name},n00000000\n" for name in names))
    return parent


def _draw_class(folder: Path, number: int, images: int) -> None:
    folder.mkdir(parents=True)
    for image in range(images):
        color = (number % 256, 64 * (number // 256) + image, 7)
        Image.new("RGB", (2, 2), color).save(folder / f"{image}.png", compress_level=1)


def draw_emnist(parent: Path, images: int = 36, classes: int = 9) -> Path:
    """Write torchvision's `EMNIST` of letters, `images` in each half, in a shade for each class."""
    folder = parent / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    labels = np.arange(images) % classes + 1
    shades = np.broadcast_to(labels[:, None, None], (images, 28, 28))
    for part in ("train", "test"):
        for kind, array in (("images-idx3", shades), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = head + array.astype(np.uint8).tobytes()
            (folder / f"emnist-letters-{part}-{kind}-ubyte").write_bytes(content)
    return parent


def cifar_parts(images: int | None = None) -> dict[str, dict[str, object]]:
    """The three pickles of a small CIFAR-100: three images a class in `train`, the rest in `test`."""
    order = class_names(CIFAR_FS)
    labels = sorted(order)  # numbered as CIFAR-100 numbers them, not as the bank does
    parts: dict[str, dict[str, object]] = {"meta": {"fine_label_names": labels}}
    for part, blue, positions in (("train", 7, range(3)), ("test", 9, range(3, images or 6))):
        rows, numbers = [], []
        for position in positions:
            for label, name in enumerate(labels):
                if position < (images or counted(name)):
                    color = [2 * order.index(name), STEP * position, blue]
                    rows.append(np.repeat(np.array(color, dtype=np.uint8), 32 * 32))
                    numbers.append(label)
        parts[part] = {"data": np.stack(rows), "fine_labels": numbers}
    return parts


def write_cifar(
    parent: Path, parts: dict[str, dict[str, object]] | None = None, protocol: int = 4
) -> Path:
    """Write an unpacked `cifar-100-python`."""
    folder = parent / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (parts or cifar_parts()).items():
        (folder / name).write_bytes(pickle.dumps(value, protocol=protocol))
    return parent


def draw_omniglot(parent: Path, halves: dict[str, dict[str, int]]) -> Path:
    """Write an unpacked `omniglot-py` of `{half: {alphabet: characters}}` by 20 drawers each."""
    rng = np.random.default_rng(0)
    character = 0
    for half, alphabets in halves.items():
        for alphabet, characters in alphabets.items():
            for number in range(1, characters + 1):
                character += 1
                folder = parent / "omniglot-py" / half / alphabet / f"character{number:02d}"
                folder.mkdir(parents=True)
                base = rng.integers(10, 55, size=(3, 2))
                for drawer in range(1, 21):
                    _draw_character(rng, base).save(folder / f"{character:04d}_{drawer:02d}.png")
    return parent


def _draw_character(rng: np.random.Generator, base: np.ndarray) -> Image.Image:
    """One drawing: a few thick dark lines of the character, moved by the drawer."""
    paper = np.ones((105, 105), dtype=bool)
    for row, column in base + rng.integers(-4, 5, size=(1, 2)):
        paper[row : row + 3, column : column + 40] = False
        paper[row : row + 40, column : column + 3] = False
    return Image.fromarray(paper).convert("1")
