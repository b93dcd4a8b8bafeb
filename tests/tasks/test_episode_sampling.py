"""Episodes: distinct classes, disjoint support and query, rotation by class and task."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks.errors import TaskError
from metablocks.tasks import ClassBank
from metablocks.tasks.episode_sampling import draw_episodes, gather_episodes, sample_episodes


def labelled(classes: int, examples: int, device="cpu") -> ClassBank:
    """A bank whose images say who they are: corner pixels (class, example, marker, 0)."""
    images = torch.zeros(classes, examples, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(classes, dtype=torch.uint8)[:, None]
    images[:, :, 0, 1] = torch.arange(examples, dtype=torch.uint8)
    images[:, :, 0, 3] = 255
    return ClassBank(images.to(device))


def read(inputs: torch.Tensor) -> torch.Tensor:
    """(class, example) of unturned labelled images `[tasks, examples, 1, 4, 4]`."""
    return (inputs[:, :, 0, 0, :2] * 255).round().long().cpu()


@given(
    classes=st.integers(2, 12),
    examples=st.integers(2, 9),
    index=st.integers(0, 10**6),
    data=st.data(),
)
def test_classes_are_distinct_and_support_and_query_disjoint(classes, examples, index, data):
    ways = data.draw(st.integers(2, classes))
    shots = data.draw(st.integers(1, examples - 1))
    queries = data.draw(st.integers(1, examples - shots))
    drawn = draw_episodes(
        "train", [index, index + 1], classes=classes, examples=examples, ways=ways, shots=shots,
        queries=queries,
    )  # fmt: skip
    batch = gather_episodes(labelled(classes, examples), drawn, shots=shots)
    support, query = read(batch.support[0]), read(batch.query[0])
    assert (support.shape[1], query.shape[1]) == (ways * shots, ways * queries)
    for task in range(2):
        both = [tuple(pair) for pair in [*support[task].tolist(), *query[task].tolist()]]
        assert len(set(both)) == len(both) == ways * (shots + queries)
        assert len({number for number, _ in both}) == ways


def test_a_target_numbers_one_class_in_support_and_query_class_major(device) -> None:
    drawn = draw_episodes("test", range(6), classes=30, examples=20, ways=5, shots=2, queries=3)
    batch = gather_episodes(labelled(30, 20, device), drawn, shots=2)
    for inputs, target in (batch.support, batch.query):
        each = target.shape[1] // 5
        assert target.tolist() == [[way for way in range(5) for _ in range(each)]] * 6
        found = read(inputs)[..., 0].numpy()
        assert np.array_equal(found, np.repeat(drawn.classes, each, axis=1))


def test_every_class_and_image_is_drawn_alike() -> None:
    drawn = draw_episodes("train", range(2000), classes=10, examples=5, ways=2, shots=1, queries=1)
    # 4000 draws over 10 classes (over 5 images): five standard deviations of a binomial count.
    for values, kinds in ((drawn.classes, 10), (drawn.examples[..., 0], 5)):
        counts = np.bincount(values.ravel(), minlength=kinds)
        expected = values.size / kinds
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_rotation_is_one_for_a_class_and_task_and_takes_all_four_values(device) -> None:
    sizes = {"classes": 30, "examples": 20, "ways": 5, "shots": 2, "queries": 3}
    bank = labelled(30, 20, device)
    drawn = draw_episodes("train", range(20), rotate=True, **sizes)
    plain = draw_episodes("train", range(20), rotate=False, **sizes)
    assert np.array_equal(drawn.classes, plain.classes)
    assert np.array_equal(drawn.examples, plain.examples)
    turned = gather_episodes(bank, drawn, shots=2)
    straight = gather_episodes(bank, plain, shots=2)
    sides = ((turned.support, straight.support, 2), (turned.query, straight.query, 3))
    for (images, _), (originals, _), each in sides:
        for task in range(20):
            for example in range(5 * each):
                turns = int(drawn.turns[task, example // each])
                expected = torch.rot90(originals[task, example], turns, (-2, -1))
                assert torch.equal(images[task, example], expected)
    assert set(drawn.turns.ravel()) == {0, 1, 2, 3}
    assert any(len(set(task)) > 1 for task in drawn.turns)  # not one rotation for the whole task


def test_images_are_float32_between_0_and_1_and_keep_their_channels(device) -> None:
    images = torch.randint(0, 256, (4, 3, 3, 8, 8), dtype=torch.uint8)
    images[:, :, :, 0, 0], images[:, :, :, 0, 1] = 0, 255
    bank = ClassBank(images, names=("a", "b", "c", "d")).to(device)
    assert bank.image_shape == (3, 8, 8)
    drawn = draw_episodes("train", [0], classes=4, examples=3, ways=4, shots=1, queries=2)
    inputs, _ = gather_episodes(bank, drawn, shots=1).query
    assert inputs.shape == (1, 8, 3, 8, 8)
    assert inputs.dtype == torch.float32
    assert inputs.min() == 0
    assert inputs.max() == 1
    one = images[drawn.classes[0, 0], drawn.examples[0, 0, 1]].to(device)
    assert torch.equal(inputs[0, 0], one.float() / 255)


def test_the_draws_of_a_seed_never_change() -> None:
    drawn = draw_episodes(
        "test", [7, 3], classes=9, examples=4, ways=3, shots=1, queries=2, rotate=True, seed=5
    )
    assert drawn.classes.tolist() == [[6, 0, 3], [3, 6, 8]]
    assert drawn.examples.tolist() == [
        [[0, 2, 3], [1, 0, 3], [2, 1, 0]],
        [[0, 2, 1], [2, 1, 3], [2, 0, 3]],
    ]
    assert drawn.turns.tolist() == [[2, 0, 1], [1, 2, 2]]


# --- classes with unequal numbers of images


def unequal(counts: tuple[int, ...]) -> ClassBank:
    """A labelled bank, its padding marked by 255 where the class is told."""
    images = labelled(len(counts), max(counts)).images
    for number, count in enumerate(counts):
        images[number, count:, 0, 0] = 255
    return ClassBank(images, counts=counts)


@given(counts=st.lists(st.integers(3, 9), min_size=4, max_size=8), index=st.integers(0, 10**6))
def test_each_class_draws_among_its_own_images_and_no_padding(counts, index) -> None:
    bank = unequal(tuple(counts))
    classes = np.arange(1, len(counts))  # a split that owns all classes but the first
    tasks = sample_episodes(bank, classes, "test", [index, 3], ways=3, shots=1, queries=2)
    for task in range(2):
        drawn = [
            tuple(pair)
            for inputs, _ in (tasks.support, tasks.query)
            for pair in read(inputs)[task].tolist()
        ]
        assert len(set(drawn)) == 3 * 3
        assert {number for number, _ in drawn} <= set(classes.tolist())
        assert all(example < counts[number] for number, example in drawn)


@given(index=st.integers(0, 10**6))
def test_equal_numbers_of_images_draw_alike_told_once_or_for_every_class(index: int) -> None:
    sizes = {"classes": 6, "ways": 3, "shots": 1, "queries": 3, "rotate": True}
    once = draw_episodes("train", [index], examples=5, **sizes)
    each = draw_episodes("train", [index], examples=np.full(6, 5), **sizes)
    for a, b in ((once.classes, each.classes), (once.examples, each.examples)):
        assert np.array_equal(a, b)
    assert np.array_equal(once.turns, each.turns)


def test_every_image_of_a_small_class_is_drawn_alike() -> None:
    drawn = draw_episodes(
        "train", range(2000), classes=2, examples=np.array([4, 9]), ways=2, shots=1, queries=1
    )
    for number, count in enumerate((4, 9)):
        found = np.bincount(drawn.examples[drawn.classes == number].ravel())
        # 4000 draws over the class's images: five standard deviations of a binomial count.
        assert len(found) == count
        assert np.abs(found - 4000 / count).max() < 5 * math.sqrt(4000 / count)


def test_a_class_smaller_than_the_episode_is_an_error() -> None:
    with pytest.raises(TaskError, match="need 3 images of every class, and a class has 2"):
        draw_episodes(
            "train", [0], classes=3, examples=np.array([5, 2, 5]), ways=2, shots=1, queries=2
        )


def test_the_checksum_tells_images_names_and_numbers_of_images_apart() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = images.clone()
    other[1, 2, 3, 3] = 1
    banks = [
        ClassBank(images),
        ClassBank(other),
        ClassBank(images, names=("a", "b")),
        ClassBank(images, names=("a", "b"), counts=(3, 2)),
        ClassBank(images, names=("a", "b"), counts=(2, 3)),
    ]
    assert len({bank.checksum for bank in banks}) == 5
    assert ClassBank(images.clone()).to("cpu").checksum == banks[0].checksum


SIZES = {"classes": 10, "examples": 6, "ways": 5, "shots": 1, "queries": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 1}, "ways is 1; it takes a whole number, 2 or more"),
        ({"ways": 0}, "ways is 0; it takes a whole number, 2 or more"),
        ({"ways": 11}, "ways=11, and split 'train' has 10 classes; ways is at most 10"),
        ({"shots": 0}, "shots is 0; it takes a whole number, 1 or more"),
        ({"queries": 0}, "queries is 0; it takes"),
        ({"shots": 2}, "need 7 images of every class, and a class has 6; .* is at most 6"),
        ({"seed": -1}, "seed is -1; it takes a whole number, 0 or more"),
    ],
)
def test_an_episode_the_bank_cannot_give_is_an_error(change: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        draw_episodes("train", [0], **{**SIZES, **change})


@pytest.mark.parametrize(
    ("images", "names", "message"),
    [
        (torch.zeros(2, 2, 4, 4), None, r"torch.float32 \[2, 2, 4, 4\]; it is uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"\[2, 4, 4\]; it is uint8 \[classes"),
        (torch.zeros(0, 2, 4, 4, dtype=torch.uint8), None, r"\[0, 2, 4, 4\]"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), ("a",), "1 names for 2 classes"),
    ],
)
def test_a_bank_that_is_none_is_an_error(images, names, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ClassBank(images, names)


@pytest.mark.parametrize("counts", [(1,), (0, 2), (3, 2)])
def test_counts_that_do_not_fit_a_bank_are_an_error(counts: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match="one number of images a class, for 2 classes, each from 1"):
        ClassBank(torch.zeros(2, 2, 4, 4, dtype=torch.uint8), counts=counts)


def test_images_that_are_not_square_do_not_turn() -> None:
    bank = ClassBank(torch.zeros(4, 3, 4, 6, dtype=torch.uint8))
    drawn = draw_episodes(
        "train", range(8), classes=4, examples=3, ways=2, shots=1, queries=1, rotate=True
    )
    with pytest.raises(TaskError, match=r"4×6; use rotate=False"):
        gather_episodes(bank, drawn, shots=1)
