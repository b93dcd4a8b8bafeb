"""Small data sets for recipes that need files, drawn in seconds."""

import os
from pathlib import Path

import torch
from hypothesis import strategies as st
from PIL import Image

from tools.fuzzing.small_images import (
    cifar_parts,
    draw_birds,
    draw_emnist,
    draw_mini_imagenet,
    draw_omniglot,
    draw_tiered_imagenet,
    write_cifar,
)
from tools.fuzzing.values import RANGES


def draw_data_sets(parent: Path) -> Path:
    """One of each below `parent`, which is what `--data` takes; and a cache folder of its own."""
    os.environ["XDG_CACHE_HOME"] = str(parent / "cache")
    draw_omniglot(parent, {"images_background": {"A": 12, "B": 12}, "images_evaluation": {"C": 8}})
    draw_folders(parent / "folders", images=6)
    torch.save(draw_tensors(), parent / "tensors.pt")
    RANGES["root"] = st.just(str(parent / "folders"))
    RANGES["folder"] = st.just(str(draw_emnist(parent, classes=26, images=260)))
    RANGES["file"] = st.just(str(parent / "tensors.pt"))
    draw_tiered_imagenet(draw_birds(parent, images=6), images=6)
    return write_cifar(draw_mini_imagenet(parent, images=6), cifar_parts(images=6))


def draw_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Random images by split and class, 8 of each of 4 classes."""
    random = torch.Generator().manual_seed(0)
    return {
        split: {f"{split} {n}": torch.rand(8, 1, 8, 8, generator=random) for n in range(4)}
        for split in ("train", "validation", "test")
    }


def draw_folders(root: Path, images: int = 4) -> Path:
    """Images of mixed sizes by split and class, `images` or one more, in a shade for each class."""
    places = [(split, name) for split in ("train", "val", "test") for name in ("ant", "bee", "cat")]
    for number, (split, name) in enumerate(places):
        folder = root / split / f"{split} {name}"
        folder.mkdir(parents=True)
        for image in range(images + number % 2):
            color = (20 * number, 40 * image, 5)
            Image.new("RGB", (6 + image, 8), color).save(folder / f"{image}.png")
    return root
