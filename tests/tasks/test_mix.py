"""Sources made of sources."""

import pytest
import torch

from metablocks import TaskBatch
from metablocks.errors import TaskError
from metablocks.laws import sources
from metablocks.tasks import BySplit, Linear, Mix, Strokes
from metablocks.types import TaskList


def strokes(**options):
    return Strokes(**{"ways": 3, "shots": 1, "queries": 2, "size": 8, **options})


def test_a_mix_takes_each_task_from_one_source_by_its_weight():
    parts = [strokes(seed=1), strokes(seed=2), strokes(seed=3)]
    mixed = Mix(parts, weights=[1, 0, 3]).sample("train", range(200))
    whole = [part.sample("train", range(200)).query[0] for part in parts]
    taken = torch.stack([(mixed.query[0] == w).flatten(1).all(1) for w in whole]).double()
    assert torch.equal(taken.sum(0), torch.ones(200))
    share = taken[2].mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 200) ** 0.5
    assert not taken[1].any()


def test_mixes_in_mixes_choose_apart():
    """A mix inside has the seed and the index of the one around it, and chooses by other draws."""
    a, b, c = (strokes(pen=(width, width)) for width in (0.3, 0.5, 0.8))
    parts = [source.sample("train", range(400)).query[0] for source in (a, b, c)]
    by_split = BySplit(train=Mix([b, c]), validation=a, test=a)
    for mix, expected in (
        (Mix([a, Mix([b, c])]), (0.5, 0.25, 0.25)),
        (Mix([Mix([a, b]), c]), (0.25, 0.25, 0.5)),
        (Mix([a, by_split]), (0.5, 0.25, 0.25)),
        (Mix([a, Mix([b, Mix([b, c])])]), (0.5, 0.375, 0.125)),
    ):
        drawn = mix.sample("train", range(400)).query[0]
        for part, share in zip(parts, expected, strict=True):
            taken = float((drawn == part).flatten(1).all(1).double().mean())
            assert abs(taken - share) < 4 * (share * (1 - share) / 400) ** 0.5


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e308])
def test_weights_of_any_size_are_shares(scale):
    parts = [strokes(seed=1), strokes(seed=2)]
    scaled, plain = Mix(parts, weights=[scale, scale]), Mix(parts)
    drawn = [mix.sample("train", range(30)).query[0] for mix in (scaled, plain)]
    assert torch.equal(*drawn)


def test_tasks_of_unequal_size_come_as_a_list():
    mix = Mix([strokes(), strokes(shots=4)])
    tasks = mix.sample("train", range(8))
    assert isinstance(tasks, TaskList)
    assert {task.support[0].shape[0] for task in tasks} == {3, 12}
    assert isinstance(mix.sample("train", [0]), TaskBatch)
    for law in (sources.fits_its_description, sources.samples_purely, sources.splits_are_apart):
        law(mix)
    sources.is_a_function_of_the_index(mix, range(6))


def test_a_source_for_each_split():
    train, test = strokes(), strokes(ways=2, shots=5)
    source = BySplit(train=train, validation=train, test=test)
    assert source.outputs == 3
    assert torch.equal(source.sample("test", [4]).query[0], test.sample("test", [4]).query[0])
    sources.fits_its_description(source)
    sources.splits_are_apart(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mix([]), "Mix sources is .*; it takes a list of task sources, at least one"),
        (lambda: Mix([strokes(), 3]), "Mix sources is .*; it takes a list of task sources"),
        (lambda: Mix([strokes()], weights=[1, 2]), "a number for each of the 1 sources"),
        (lambda: Mix([strokes()], weights=[0]), "not all 0"),
        (lambda: Mix([strokes()], weights=[-1]), "Mix weights is"),
        (
            lambda: Mix([strokes(), strokes(ways=4)]),
            r"outputs of sources\[0\] is 3 and of sources\[1\] 4; one",
        ),
        (
            lambda: Mix([strokes(), Linear(shots=1, queries=1)]),
            r"kind of sources\[0\] is classification and of sources\[1\] regression",
        ),
        (
            lambda: BySplit(train=strokes(), validation=strokes(size=9), test=strokes()),
            r"input_shape of train is \(1, 8, 8\) and of validation \(1, 9, 9\)",
        ),
        (lambda: Mix([strokes()]).sample("val", [0]), "unknown split 'val'"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()
