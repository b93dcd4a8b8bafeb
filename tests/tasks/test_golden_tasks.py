"""The tasks of the image sets never change: digests of tasks drawn from the small made data sets."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from metablocks.tasks import CifarFS, MiniImagenet, Omniglot
from metablocks.tasks.base import SPLITS
from tools.fuzzing.small_images import cifar_parts, draw_mini_imagenet, write_cifar

FIELDS = {"ways": 3, "shots": 1, "queries": 3}


def digest(source) -> str:
    """SHA-256 of some tasks of every split, the first 16 digits."""
    tasks = [source.sample(split, [0, 41, 7]) for split in SPLITS]
    leaves = pytree.tree_leaves([(task.support, task.query) for task in tasks])
    content = b"".join(leaf.cpu().contiguous().numpy().tobytes() for leaf in leaves)
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (Omniglot, {}, "3836a79fd1ddc3a9"),
        (Omniglot, {"seed": 3, "split": "original"}, "18d0a1406a21bb68"),
        (Omniglot, {"rotate": False, "queries": 19}, "272313f23bc56569"),
        (MiniImagenet, {}, "59835bcaad9decab"),
        (MiniImagenet, {"seed": 3, "queries": 4}, "7a4a11f9fc7167e9"),
        (CifarFS, {}, "15cc9932e75ad29f"),
        (CifarFS, {"seed": 3, "queries": 4}, "791197320888d6ee"),
    ],
)
def test_an_index_gives_the_task_that_it_always_gave(
    source, options: dict, expected: str, small_data: Path, device: torch.device
) -> None:
    assert digest(source(**{**FIELDS, **options}, data=small_data, device=device)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Omniglot, "4ab49f46a3ae2e53"),
        (MiniImagenet, "9f2c4d999b9cbbe8"),
        (CifarFS, "0060b63c1789cd3d"),
    ],
)
def test_the_checksum_of_classes_of_one_size_never_changes(
    source, expected: str, equal_data: Path
) -> None:
    assert source(**FIELDS, data=equal_data).checksum[:16] == expected


@pytest.fixture(scope="module")
def equal_data(small_unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets whose classes hold as many images each, as the whole data sets do."""
    parent = tmp_path_factory.mktemp("equal")
    shutil.copytree(small_unpacked, parent, dirs_exist_ok=True)
    return write_cifar(draw_mini_imagenet(parent, images=4), cifar_parts(images=4))
