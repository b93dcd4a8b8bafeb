"""Options of all sources of classes: ranges of ways and shots, transforms, unlabelled tasks."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import metablocks as mb
from metablocks.errors import TaskError
from metablocks.generators import seeded
from metablocks.laws import sources
from metablocks.tasks import Classes, Episodes
from metablocks.tasks.base import SPLITS
from metablocks.tasks.transforms import TRANSFORMS
from metablocks.torchvision_import import torchvision_module
from metablocks.types import TaskList

EPISODES = {"ways": 2, "shots": 1, "queries": 2}


def data(classes=6, examples=8):
    random = torch.Generator().manual_seed(0)
    return {
        split: {
            f"{split}{n}": torch.rand(examples, 1, 6, 6, generator=random) for n in range(classes)
        }
        for split in SPLITS
    }


def noisy(x):
    return x + 0.1 * torch.rand_like(x)


def hold_all(source):
    sources.fits_its_description(source)
    sources.is_a_function_of_the_index(source, [0, 4, 2])
    sources.samples_purely(source)
    sources.splits_are_apart(source)


def sizes(task):
    """The support and query examples of each class of a task."""
    return [torch.bincount(side[1]).tolist() for side in (task.support, task.query)]


@pytest.mark.parametrize("balanced", [True, False])
def test_ways_and_shots_are_drawn_from_ranges(balanced):
    source = Classes(data(), ways=(3, 5), shots=[1, 4], queries=2, balanced=balanced)
    assert source.outputs == 5
    tasks = source.sample("train", range(60))
    assert isinstance(tasks, TaskList)
    drawn = [sizes(task) for task in tasks]
    assert {len(support) for support, _ in drawn} == {3, 4, 5}
    assert {shots for support, _ in drawn for shots in support} == {1, 2, 3, 4}
    assert all(query == [2] * len(support) for support, query in drawn)
    assert all(len(set(support)) == 1 for support, _ in drawn) == balanced
    for task in tasks:  # no example twice
        inputs = torch.cat([task.support[0], task.query[0]]).flatten(1)
        assert len(inputs.unique(dim=0)) == len(inputs)
    hold_all(source)


def test_ways_stop_at_the_classes_that_there_are():
    source = Classes(data(classes=3), ways=(2, 9), shots=1, queries=1)
    assert {len(sizes(task)[0]) for task in source.sample("test", range(20))} == {2, 3}


def test_a_learner_trains_on_tasks_of_unequal_size():
    source = Classes(data(), ways=(2, 4), shots=(1, 3), queries=2, balanced=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, source.outputs))
    _, history = mb.train_maml(
        model, source, inner_lr=0.1, inner_steps=1, iterations=2, tasks_per_step=3, progress=False
    )
    assert history


def test_support_and_query_have_transforms_of_their_own():
    plain = Classes(data(), **EPISODES).sample("train", range(3))
    v2 = torchvision_module("transforms.v2")
    flipped = Classes(
        data(), **EPISODES, support_transform=v2.RandomHorizontalFlip(1.0), query_transform=noisy
    )
    tasks = flipped.sample("train", range(3))
    assert torch.equal(tasks.support[0], plain.support[0].flip(-1))
    difference = (tasks.query[0] - plain.query[0]).flatten(0, 1).flatten(1)
    assert 0 < difference.max() <= 0.1001
    assert len(difference.unique(dim=0)) == len(difference)  # each input has a draw of its own
    hold_all(flipped)


OF_TORCHVISION = {
    "random_rotation": {"degrees": 30},
    "random_crop": {"size": 6, "padding": 1, "padding_mode": "reflect"},
    "random_resized_crop": {"size": (6, 6), "scale": (0.5, 1)},
    "center_crop": {"size": 6},
    "resize": {"size": (6, 6)},
    "color_jitter": {"brightness": 0.4},
    "normalize": {"mean": [0.5], "std": [0.2]},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_recipes_is_that_of_torchvision_with_its_arguments(name):
    options = OF_TORCHVISION.get(name, {"p": 1})
    ours = TRANSFORMS[name](**options)
    theirs = getattr(torchvision_module("transforms.v2"), name.title().replace("_", ""))(**options)
    assert (type(ours), vars(ours).keys()) == (type(theirs), vars(theirs).keys())
    image = torch.rand(1 if name != "random_grayscale" else 3, 6, 6)
    with seeded(1):
        one = ours(image)
    with seeded(1):
        assert torch.equal(one, theirs(image))
    assert one.shape == image.shape
    assert (name in ("center_crop", "resize")) == torch.equal(one, image)


def test_threads_draw_the_transforms_that_one_thread_draws():
    def source():
        return Classes(data(), **EPISODES, query_transform=noisy)

    alone, shared = source().sample("train", range(12)), source()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            drawn = list(
                pool.map(lambda n: shared.sample("train", [n % 12]).query[0][0], range(96))
            )
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(query, alone.query[0][n % 12]) for n, query in enumerate(drawn))


def test_truth_values_become_0_and_1():
    masks = {split: {n: x > 0.5 for n, x in of.items()} for split, of in data().items()}
    inputs = Classes(masks, **EPISODES).sample("train", [0]).support[0]
    assert inputs.dtype == torch.float32
    assert set(inputs.flatten().tolist()) == {0.0, 1.0}


def crop(x):
    return x[:, : int(torch.randint(1, 6, ()))]


def test_several_transforms_follow_one_another():
    flip, double = TRANSFORMS["random_horizontal_flip"](p=1), lambda x: 2 * x
    plain = Classes(data(), **EPISODES).sample("train", [3])
    source = Classes(data(), **EPISODES, query_transform=[flip, double])
    tasks = source.sample("train", [3])
    assert torch.equal(tasks.query[0], 2 * plain.query[0].flip(-1))
    assert torch.equal(tasks.support[0], plain.support[0])


def test_unlabelled_tasks_make_a_class_of_each_example():
    images = {split: [(x, 0) for xs in data()[split].values() for x in xs] for split in SPLITS}
    source = Episodes(images, ways=5, shots=2, queries=1, unlabelled=True, query_transform=noisy)
    for task in (source.sample("train", [n])[0] for n in range(4)):
        support, query = task.support[0].view(5, 2, 36), task.query[0].view(5, 1, 36)
        assert torch.equal(support[:, 0], support[:, 1])
        assert (query - support).min() > 0
        assert (query - support).max() <= 0.1001
        assert len(support[:, 0].unique(dim=0)) == 5
    hold_all(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": (4, 2)}, r"ways is \(4, 2\); it takes .* a range \[low, high\] of whole numbers"),
        ({"ways": (1, 2)}, r"ways is \(1, 2\)"),
        ({"ways": (7, 9)}, r"ways is \(7, 9\), and the classes of its splits are train 6"),
        ({"shots": (1, 7)}, r"shots \(1, 7\) and queries 2 need 9 examples of every class"),
        ({"unlabelled": True}, "give a support_transform or a query_transform"),
        ({"query_transform": lambda x: x[:, 1:]}, r"makes \[1, 5, 6\] of \[1, 6, 6\]; it leaves"),
        ({"query_transform": crop}, r"makes \[1, \d, 6\] of \[1, 6, 6\]; it leaves the shape"),
        ({"query_transform": lambda x: x.numpy()}, r"makes a ndarray of .* of an input, a tensor"),
        (
            {"support_transform": TRANSFORMS["random_crop"](size=9)},
            r"_transform fails on an input \[1",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(TaskError, match=message) as caught:
        Classes(data(), **{**EPISODES, **options}).sample("train", range(2))
    assert caught.value.block == "Classes"
