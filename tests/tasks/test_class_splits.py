"""The class lists: sizes, no class shared, and the same as the published ones."""

import json
import re
from pathlib import Path

import pytest

from metablocks.errors import DataError
from metablocks.tasks.base import SPLITS
from metablocks.tasks.class_splits import CIFAR_FS, MINI_IMAGENET, ClassSplits, class_names
from metablocks.tasks.image_sets import check_present

LISTS = Path(__file__).parents[2].parent / "shared" / "data" / "splits.json"
BOTH = pytest.mark.parametrize("splits", [CIFAR_FS, MINI_IMAGENET], ids=["cifar_fs", "mini"])


@BOTH
def test_the_splits_are_64_16_20_and_share_no_class(splits: ClassSplits) -> None:
    assert [len(splits[split]) for split in SPLITS] == [64, 16, 20]
    assert len(set(class_names(splits))) == 100


def test_mini_imagenet_is_named_by_wordnet_ids_and_cifar_fs_by_labels() -> None:
    assert all(re.fullmatch(r"n\d{8}", name) for name in class_names(MINI_IMAGENET))
    assert all(re.fullmatch(r"[a-z_]+", name) for name in class_names(CIFAR_FS))


@pytest.mark.skipif(not LISTS.is_file(), reason="the published lists: …/shared/data absent")
def test_the_lists_are_the_published_ones() -> None:
    published = json.loads(LISTS.read_text())
    for name, splits in (("cifar_fs", CIFAR_FS), ("mini_imagenet", MINI_IMAGENET)):
        assert {split: list(names) for split, names in splits.items()} == published[name]


def test_missing_classes_are_listed_to_five_and_counted_beyond() -> None:
    with pytest.raises(DataError) as caught:
        check_present("here", CIFAR_FS, CIFAR_FS["train"][7:])
    assert str(caught.value) == (
        "here: holds 57 of the 64 classes of train; missing: apple, aquarium_fish, bear, bee, "
        "bottle and 2 more"
    )
