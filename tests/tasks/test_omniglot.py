"""Omniglot: read by content, split, drawn and refused; on a small data set in its layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metablocks.errors import DataError, TaskError
from metablocks.tasks import Omniglot
from metablocks.tasks.class_tasks import numbered
from metablocks.tasks.omniglot import divide
from metablocks.tasks.omniglot_drawings import _reduce

FIELDS = {"ways": 5, "shots": 1, "queries": 3}


# --- reading


def test_unpacked_and_zipped_give_one_bank(small_unpacked: Path, small_zipped: Path) -> None:
    unpacked = Omniglot(**FIELDS, data=small_unpacked)
    zipped = Omniglot(**FIELDS, data=small_zipped)
    assert torch.equal(unpacked.bank.images, zipped.bank.images)
    assert unpacked.bank.counts == zipped.bank.counts
    assert unpacked.checksum == zipped.checksum
    assert len(unpacked.checksum) == 64


def test_one_half_unpacked_and_one_zipped_is_as_good(
    zipped_copy: Path, small_unpacked: Path
) -> None:
    root = zipped_copy / "omniglot-py"
    (root / "images_evaluation.zip").unlink()
    shutil.copytree(
        small_unpacked / "omniglot-py" / "images_evaluation", root / "images_evaluation"
    )
    mixed = Omniglot(**FIELDS, data=zipped_copy)
    assert mixed.checksum == Omniglot(**FIELDS, data=small_unpacked).checksum


def test_classes_are_ordered_by_half_alphabet_and_character(small_zipped: Path) -> None:
    bank = Omniglot(**FIELDS, data=small_zipped).bank
    names = list(bank.counts)
    assert names[0] == "images_background/Glyphs/character01"
    assert names[7] == "images_background/Runes/character01"
    assert names[-1] == "images_evaluation/Marks/character08"
    assert names == sorted(names)
    assert bank.images.shape == (21 * 20, 1, 28, 28)


def test_an_image_is_the_exact_area_average_of_ink(small_unpacked: Path) -> None:
    bank = Omniglot(**FIELDS, data=small_unpacked).bank
    path = small_unpacked / "omniglot-py/images_background/Runes/character03/0003_07.png"
    ink = 1.0 - np.asarray(Image.open(path), dtype=np.float64)
    fine = ink.repeat(4, axis=0).repeat(4, axis=1)  # 420 = 28 · 15
    expected = 255 * fine.reshape(28, 15, 28, 15).mean(axis=(1, 3))
    stored = bank.images[numbered(bank.counts)["images_background/Runes/character03"][6], 0]
    assert np.abs(stored.numpy() - expected).max() <= 0.5 + 1e-9  # rounding, nothing else


def test_full_ink_is_255_and_paper_0() -> None:
    assert (_reduce(np.ones((1, 105, 105), dtype=np.uint8)) == 255).all()
    assert (_reduce(np.zeros((1, 105, 105), dtype=np.uint8)) == 0).all()


def test_ink_is_one_and_paper_zero_in_a_task(small_zipped: Path, device: torch.device) -> None:
    inputs, _ = Omniglot(**FIELDS, data=small_zipped, device=device).sample("test", [0]).query
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert inputs.mean() < 0.3


def test_changed_drawings_are_another_bank(unpacked_copy: Path) -> None:
    before = Omniglot(**FIELDS, data=unpacked_copy).checksum
    path = unpacked_copy / "omniglot-py/images_background/Runes/character01/0001_01.png"
    Image.new("1", (105, 105), 1).save(path)
    assert Omniglot(**FIELDS, data=unpacked_copy).checksum != before


# --- what is wrong with the data


def without_drawing(root: Path) -> None:
    (root / "images_background/Runes/character02/0002_09.png").unlink()


def with_a_drawing_too_many(root: Path) -> None:
    folder = root / "images_background/Runes/character02"
    shutil.copy(folder / "0002_09.png", folder / "0002_21.png")


def with_a_drawing_of_another_size(root: Path) -> None:
    Image.new("1", (90, 105)).save(root / "images_evaluation/Marks/character01/0014_03.png")


def with_an_empty_half(root: Path) -> None:
    shutil.rmtree(root / "images_evaluation")
    (root / "images_evaluation").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without_drawing,
            r"Runes/character02 has drawings by 01, .* 08, 10, .* drawers 01 to 20",
        ),
        (with_a_drawing_too_many, "has drawings by 01, .* 20, 21; Omniglot has one"),
        (with_a_drawing_of_another_size, r"0014_03\.png: .* 90×105, not 105×105"),
        (with_an_empty_half, r"images_evaluation: holds no drawing"),
    ],
)
def test_wrong_data_is_an_error_that_names_the_file(
    unpacked_copy: Path, cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(unpacked_copy / "omniglot-py")
    with pytest.raises(DataError, match=message):
        Omniglot(**FIELDS, data=unpacked_copy).sample("train", [0])
    assert not list(cache.glob("*"))  # nothing half-read is kept


# --- what is wrong with the fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 0}, "Omniglot ways is 0; it takes a whole number, 2 or more"),
        ({"ways": 51}, "ways is 51, .*train 1150, validation 50, test 423; ways is at most 50"),
        ({"shots": 0}, "shots is 0; it takes a whole number, 1 or more"),
        ({"queries": 20}, "need 21 examples of every class, and a class has 20"),
        ({"rotate": 90}, "rotate is 90; it takes True or False"),
        ({"split": "shufled"}, 'split is .shufled.; did you mean "shuffled"'),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_field_is_an_error_when_the_source_is_built(change: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Omniglot(**{**FIELDS, **change})


def test_more_ways_than_a_small_data_set_has_is_an_error_at_first_use(small_zipped: Path) -> None:
    source = Omniglot(ways=6, shots=1, queries=1, data=small_zipped)
    with pytest.raises(TaskError, match="train 11, validation 5, test 5; ways is at most 5"):
        _ = source.checksum


def test_unlabelled_tasks_take_more_ways_and_shots_than_there_are_classes_and_drawings(
    small_zipped: Path,
) -> None:
    fields = {"ways": 60, "shots": 15, "queries": 9, "unlabelled": True, "query_transform": abs}
    task = Omniglot(**fields, data=small_zipped).sample("validation", [0])
    assert task.support[0].shape[1] == 60 * 15
    assert task.query[1][0].bincount().tolist() == [9] * 60


# --- splits and rotation


@pytest.mark.parametrize("split", ["shuffled", "original"])
def test_the_splits_part_the_characters_whatever_the_seed(small_zipped: Path, split: str) -> None:
    ways = {"ways": 3, "shots": 1, "queries": 3}
    one = Omniglot(**ways, split=split, data=small_zipped, seed=0)
    two = Omniglot(**ways, split=split, data=small_zipped, seed=1, rotate=False)
    assert sorted(name for pool in one.pools.values() for name in pool.names) == list(
        one.bank.counts
    )
    for name, pool in one.pools.items():
        assert pool.names == two.pools[name].names
    if split == "original":
        assert list(one.pools["test"].names) == list(one.bank.counts)[13:]
        assert len(one.pools["validation"].names) == 3


def full_names() -> list[str]:
    return [f"images_background/A/character{n:04d}" for n in range(964)] + [
        f"images_evaluation/B/character{n:04d}" for n in range(659)
    ]


def test_the_whole_data_set_is_split_in_the_published_sizes() -> None:
    def sizes(division) -> list[int]:
        return [len(classes) for classes in divide(full_names(), division).values()]

    assert sizes("shuffled") == [1150, 50, 423]
    assert sizes("original") == [914, 50, 659]


def test_the_split_depends_on_names_and_not_on_their_order() -> None:
    names = full_names()
    mixed = [names[n] for n in np.random.default_rng(0).permutation(len(names))]
    here, there = divide(names, "shuffled"), divide(mixed, "shuffled")
    for split, numbers in here.items():
        assert {names[n] for n in numbers} == {mixed[n] for n in there[split]}


def test_tasks_use_the_characters_of_their_split_only(small_zipped: Path) -> None:
    source = Omniglot(**FIELDS, rotate=False, data=small_zipped)
    flat, names = source.bank.images.flatten(1).float() / 255, list(source.bank.counts)
    for split, pool in source.pools.items():
        inputs, _ = source.sample(split, range(5)).query
        nearest = torch.cdist(inputs.flatten(0, 1).flatten(1), flat).argmin(dim=1) // 20
        assert {names[number] for number in nearest} <= set(pool.names)


def test_rotation_is_for_training_only_and_one_for_a_class(
    small_zipped: Path, device: torch.device
) -> None:
    turning = Omniglot(**FIELDS, data=small_zipped, device=device)
    straight = Omniglot(**FIELDS, rotate=False, data=small_zipped, device=device)
    for split in ("validation", "test"):
        a, b = turning.sample(split, range(4)), straight.sample(split, range(4))
        assert torch.equal(a.query[0], b.query[0])
        assert torch.equal(a.support[0], b.support[0])
    a, b = turning.sample("train", range(12)), straight.sample("train", range(12))
    seen = set()
    for task in range(12):
        for way in range(5):
            turns = [
                turn
                for turn in range(4)
                if torch.equal(
                    a.support[0][task, way], b.support[0][task, way].rot90(turn, (-2, -1))
                )
            ]
            assert turns
            seen.add(turns[0])
            rows = slice(3 * way, 3 * way + 3)
            queries = b.query[0][task, rows].rot90(turns[0], (-2, -1))
            assert torch.equal(a.query[0][task, rows], queries)
    assert seen == {0, 1, 2, 3}
