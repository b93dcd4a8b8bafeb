"""Draws of episodes: distinct classes and examples, all drawn alike, the same for ever."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks.errors import TaskError
from metablocks.tasks import Classes
from metablocks.tasks.episode_sampling import draw_episodes


@given(
    counts=st.lists(st.integers(3, 9), min_size=4, max_size=8),
    index=st.integers(0, 10**6),
    shots=st.integers(1, 2),
)
def test_classes_and_examples_are_distinct_and_each_class_draws_among_its_own(counts, index, shots):
    sizes = {"classes": len(counts), "ways": 3, "shots": shots, "queries": 1}
    drawn = draw_episodes("test", [index, 3], examples=np.array(counts), **sizes)
    assert drawn.examples.shape == (2, 3, shots + 1)
    for task in range(2):
        assert len(set(drawn.classes[task])) == 3
        for number, examples in zip(drawn.classes[task], drawn.examples[task], strict=True):
            assert len(set(examples)) == shots + 1
            assert max(examples) < counts[number]


def test_every_class_and_example_is_drawn_alike() -> None:
    drawn = draw_episodes("train", range(2000), classes=10, examples=5, ways=2, shots=1, queries=1)
    # 4000 draws over 10 classes (over 5 examples): five standard deviations of a binomial count.
    for values, kinds in ((drawn.classes, 10), (drawn.examples[..., 0], 5)):
        counts = np.bincount(values.ravel(), minlength=kinds)
        expected = values.size / kinds
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_every_example_of_a_small_class_is_drawn_alike() -> None:
    drawn = draw_episodes(
        "train", range(2000), classes=2, examples=np.array([4, 9]), ways=2, shots=1, queries=1
    )
    for number, count in enumerate((4, 9)):
        found = np.bincount(drawn.examples[drawn.classes == number].ravel())
        # 4000 draws over the class's examples: five standard deviations of a binomial count.
        assert len(found) == count
        assert np.abs(found - 4000 / count).max() < 5 * math.sqrt(4000 / count)


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


@given(index=st.integers(0, 10**6))
def test_equal_numbers_of_examples_draw_alike_told_once_or_for_every_class(index: int) -> None:
    sizes = {"classes": 6, "ways": 3, "shots": 1, "queries": 3, "rotate": True}
    once = draw_episodes("train", [index], examples=5, **sizes)
    each = draw_episodes("train", [index], examples=np.full(6, 5), **sizes)
    for a, b in ((once.classes, each.classes), (once.examples, each.examples)):
        assert np.array_equal(a, b)
    assert np.array_equal(once.turns, each.turns)


def test_what_is_no_image_does_not_turn() -> None:
    classes = {"train": {name: torch.rand(5, 3) for name in "abcd"}}  # 3 numbers, 3 examples a task
    with pytest.raises(TaskError, match=r"inputs are \[3\]; take rotate=False"):
        Classes(classes, ways=2, shots=1, queries=2, rotate=True).sample("train", [0])


def test_images_that_are_not_square_do_not_turn() -> None:
    classes = {"train": {name: torch.zeros(3, 1, 4, 6) for name in "abcd"}}
    with pytest.raises(TaskError, match=r"inputs are \[1, 4, 6\]; take rotate=False"):
        Classes(classes, ways=2, shots=1, queries=1, rotate=True).sample("train", range(8))
