"""Small data sets for recipes that need files, drawn in seconds."""

import os
from pathlib import Path

from tools.fuzzing.small_images import cifar_parts, draw_mini_imagenet, write_cifar
from tools.fuzzing.small_omniglot import draw_omniglot


def draw_data_sets(parent: Path) -> Path:
    """One of each below `parent`, which is what `--data` takes; and a cache folder of its own."""
    os.environ["XDG_CACHE_HOME"] = str(parent / "cache")
    draw_omniglot(parent, {"images_background": {"A": 12, "B": 12}, "images_evaluation": {"C": 8}})
    return write_cifar(draw_mini_imagenet(parent, images=6), cifar_parts(images=6))
