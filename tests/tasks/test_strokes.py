"""Strokes: characters are functions of their number; a task is learnable, and not by pixels alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metablocks.errors import TaskError
from metablocks.tasks import Strokes
from metablocks.tasks.strokes import CONTROLS, POINTS, _spline, rasterise

FIELDS = {"ways": 5, "shots": 1, "queries": 15}


def nearest_neighbour_accuracy(source: Strokes, tasks: int) -> float:
    batch = source.sample("test", range(tasks))
    distances = torch.cdist(batch.query[0].flatten(2), batch.support[0].flatten(2))
    predicted = batch.support[1].gather(1, distances.argmin(dim=-1))
    return (predicted == batch.query[1]).double().mean().item()


def test_the_nearest_pixels_are_a_hint_and_no_solution(device) -> None:
    # Chance is 0.2. Measured 0.68 over 100 tasks; the spread of a mean of 40 is about 0.02.
    assert 0.5 < nearest_neighbour_accuracy(Strokes(**FIELDS, device=device), 40) < 0.85


def test_without_jitter_pose_and_pen_range_all_examples_of_a_class_are_one_image() -> None:
    source = Strokes(**FIELDS, jitter=0.0, pose=0.0, pen=(0.5, 0.5))
    batch = source.sample("train", [0])
    support, query = batch.support[0][0], batch.query[0][0].view(5, 15, 1, 28, 28)
    torch.testing.assert_close(query, support[:, None].expand_as(query), atol=1e-5, rtol=0)
    assert not torch.allclose(support[0], support[1], atol=0.5)


def test_examples_of_a_class_differ(device) -> None:
    images = Strokes(**FIELDS, device=device).sample("train", [0]).query[0][0].flatten(1)
    distances = torch.cdist(images, images) + 1e3 * torch.eye(75, device=device)
    assert distances.min() > 0.5


@given(number=st.integers(0, 2**31 - 1), seed=st.integers(0, 99))
def test_a_character_depends_on_seed_split_and_number_alone(number: int, seed: int) -> None:
    source = Strokes(**FIELDS, seed=seed)
    points, strokes = source.character("train", number)
    again, same = Strokes(ways=20, shots=5, queries=1, size=64, seed=seed).character(
        "train", number
    )
    assert np.array_equal(points, again)
    assert strokes == same
    assert 2 <= strokes <= 4
    assert np.abs(points[:strokes]).max() <= 0.75 + 1e-6
    others = [
        source.character("test", number)[0],
        source.character("train", number + 1)[0],
        Strokes(**FIELDS, seed=seed + 1).character("train", number)[0],
    ]
    assert all(np.abs(points - other).max() > 1e-3 for other in others)


def test_characters_have_the_numbers_of_strokes_asked_for() -> None:
    source = Strokes(**FIELDS, min_strokes=1, max_strokes=3)
    assert {source.character("train", number)[1] for number in range(40)} == {1, 2, 3}


def test_images_are_mostly_paper_with_full_ink_in_the_lines(device) -> None:
    for size in (28, 42):
        source = Strokes(**FIELDS, size=size, device=device)
        images = source.sample("train", range(4)).query[0]
        assert images.shape == (4, 75, 1, size, size)
        assert images.min() == 0
        assert images.max() == 1
        assert 0.03 < images.mean() < 0.2
        assert (images.flatten(2).max(dim=-1).values > 0.8).all()  # no example is left blank


def test_a_line_is_inked_by_its_length_whatever_its_points() -> None:
    def line(points: int) -> torch.Tensor:
        x = torch.linspace(2, 25, points, dtype=torch.float64)
        where = torch.stack([x, torch.full_like(x, 13.0)], dim=-1)[None]
        lengths = torch.full((1, points), 23 / (points - 1), dtype=torch.float64)
        lengths[:, [0, -1]] /= 2
        return rasterise(where, lengths, torch.full((1,), 0.8, dtype=torch.float64), 28)[0]

    # Trapezoids, points 0.6 apart at most, pen 0.8: they differ at the cut ends of the line only.
    torch.testing.assert_close(line(40), line(400), atol=2e-2, rtol=0)
    assert (line(40)[13, 5:22] == 1).all()
    assert (line(40)[18:] == 0).all()


def test_rasterising_is_the_sum_of_the_splats_of_all_points() -> None:
    points = torch.rand(2, 5, 2, dtype=torch.float64) * 8
    lengths = torch.rand(2, 5, dtype=torch.float64)
    pen = torch.tensor([0.7, 1.3], dtype=torch.float64)
    expected = torch.zeros(2, 9, 9, dtype=torch.float64)
    for image in range(2):
        for i in range(9):
            for j in range(9):
                for (x, y), length in zip(points[image], lengths[image], strict=True):
                    d = ((i - y) ** 2 + (j - x) ** 2) / (2 * pen[image] ** 2)
                    share = length / (math.sqrt(2 * math.pi) * pen[image])
                    expected[image, i, j] += share * torch.exp(-d)
    expected = (1.8 * expected - 0.25).clamp(0, 1)
    # Gaussians are cut at e⁻³⁰: far below this.
    torch.testing.assert_close(rasterise(points, lengths, pen, 9), expected, atol=1e-10, rtol=0)


def test_the_curve_passes_through_its_control_points() -> None:
    spline = _spline()
    assert spline.shape == (POINTS, CONTROLS)
    np.testing.assert_allclose(spline.sum(axis=1), 1, atol=1e-6)  # float32
    np.testing.assert_allclose(spline[[0, -1]], np.eye(CONTROLS)[[0, -1]], atol=1e-6)
    straight = spline @ np.arange(CONTROLS)
    assert (np.diff(straight) > 0).all()


def test_each_task_has_ways_of_its_own() -> None:
    source = Strokes(ways=(3, 5), shots=1, queries=2, size=8)
    tasks = source.sample("test", range(20))
    assert source.outputs == 5
    assert {len(task.support[1].unique()) for task in tasks} == {3, 4, 5}
    (alone,) = source.sample("test", [7])
    assert torch.equal(alone.support[0], tasks[7].support[0])
    assert all(torch.equal(task.support[1], task.query[1][::2]) for task in tasks)


@pytest.mark.parametrize("ways", [4, (2, 5)])
def test_so_many_support_labels_are_wrong_and_nothing_else_changes(ways, device) -> None:
    fields = {"ways": ways, "shots": 5, "queries": 1, "size": 8, "device": device}
    clean = Strokes(**fields).sample("train", range(6))
    noisy = Strokes(**fields, wrong_labels=0.4).sample("train", range(6))
    for right, wrong in zip(map(clean.__getitem__, range(6)), noisy, strict=True):
        assert torch.equal(right.support[0], wrong.support[0])
        assert all(map(torch.equal, right.query, wrong.query))
        ways_here = len(right.support[1].unique())
        differs = right.support[1] != wrong.support[1]
        assert differs.sum() == round(0.4 * 5 * ways_here)
        assert wrong.support[1].min() >= 0
        assert wrong.support[1].max() < ways_here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 0}, "Strokes ways is 0; it takes a whole number, 2 or more"),
        ({"shots": 0}, "shots is 0; it takes a whole number, 1 or more"),
        ({"size": 4}, "size is 4; it takes a whole number, 8 or more"),
        ({"min_strokes": 0}, "min_strokes is 0"),
        ({"min_strokes": 5}, "min_strokes is 5, above max_strokes, 4"),
        ({"jitter": -0.1}, "jitter is -0.1; it takes a finite number"),
        ({"pose": math.nan}, "pose is nan"),
        ({"pen": (0.0, 1.0)}, r"pen is 0.0; it takes a finite number above 0"),
        ({"pen": (1.0, 0.5)}, "pen is .*low <= high"),
        ({"ways": (5, 3)}, "ways is .*range"),
        ({"wrong_labels": 1.0}, "wrong_labels is 1.0"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_would_work(change: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Strokes(**{**FIELDS, **change})
