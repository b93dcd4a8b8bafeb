"""Tasks of map-style data sets: torchvision's on small made files, labels, splits, random transforms."""

import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from metablocks.errors import DataError, TaskError
from metablocks.laws import sources
from metablocks.tasks import Episodes
from metablocks.tasks.base import SPLITS
from metablocks.tasks.episodes import labels_of
from metablocks.tasks.torchvision_sets import DATASETS
from metablocks.torchvision_import import torchvision_module
from tools.fuzzing.small_images import draw_emnist

EPISODES = {"ways": 2, "shots": 1, "queries": 2}
SHARES = (0.34, 0.33, 0.33)


def image_of(number, mode="RGB", size=(6, 5)):
    return Image.new(mode, size, (number,) * 3 if mode == "RGB" else number)


def emnist(root, monkeypatch):
    draw_emnist(root)


def fgvc_aircraft(root, monkeypatch):
    data = root / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("".join(f"kind {n}\n" for n in range(9)))
    rows = [f"{n:07d} kind {n % 9}\n" for n in range(36)]
    (data / "images_variant_trainval.txt").write_text("".join(rows[:18]))
    (data / "images_variant_test.txt").write_text("".join(rows[18:]))
    for n in range(36):
        image_of(n % 9, size=(6 + n % 3, 5)).save(data / "images" / f"{n:07d}.jpg")


def flowers102(root, monkeypatch):
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    ids = {"trnid": np.arange(1, 19), "valid": np.arange(19, 28), "tstid": np.arange(28, 37)}
    values = {"labels": np.arange(36) % 9 + 1, **ids}
    for name in ("scipy", "scipy.io"):  # which reads MATLAB's files, and need not be installed
        monkeypatch.setitem(
            sys.modules, name, types.SimpleNamespace(loadmat=lambda *_, **__: values)
        )
    for n in range(36):
        image_of(n % 9, size=(6 + n % 3, 5)).save(folder / "jpg" / f"image_{n + 1:05d}.jpg")
    monkeypatch.setattr(
        torchvision_module("datasets").Flowers102, "_check_integrity", lambda self: True
    )


def cifar100(root, monkeypatch):
    folder = root / "cifar-100-python"
    folder.mkdir()
    labels = [n % 9 for n in range(18)]
    data = np.repeat(np.array(labels, np.uint8)[:, None], 3072, axis=1)
    for half in ("train", "test"):
        (folder / half).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"kind {n}" for n in range(9)]})
    )
    monkeypatch.setattr(torchvision_module("datasets").cifar, "check_integrity", lambda *_: True)


def omniglot_characters(root, monkeypatch):
    for n in range(9):
        half = "images_background" if n < 5 else "images_evaluation"
        folder = root / "omniglot-py" / half / "Greek" / f"character{n:02d}"
        folder.mkdir(parents=True)
        for drawer in range(4):
            image_of(n, "L").save(folder / f"{n:04d}_{drawer:02d}.png")
    monkeypatch.setattr(
        torchvision_module("datasets").Omniglot, "_check_integrity", lambda self: True
    )


@pytest.mark.parametrize("name", DATASETS)
def test_data_sets_of_torchvision(name, tmp_path, monkeypatch):
    globals()[name](tmp_path, monkeypatch)
    dataset = DATASETS[name](folder=tmp_path)
    kind = type(dataset.datasets[0])
    asked, original = [], kind.__getitem__
    monkeypatch.setattr(
        kind, "__getitem__", lambda self, row: asked.append(row) or original(self, row)
    )
    source = Episodes(dataset, splits=SHARES, size=6, **EPISODES)
    assert source.input_shape == (1 if name in ("emnist", "omniglot_characters") else 3, 6, 6)
    assert [len(source.pools[split].counts) for split in SPLITS] == [3, 3, 3]
    assert len(asked) < 9  # labels are taken from where the data set keeps them
    for split in SPLITS:
        batch = source.sample(split, range(2))
        drawn = (batch.query[0].mean((2, 3, 4)) * 255).round().view(2, 2, 2)
        assert bool((drawn[..., :1] == drawn).all())  # one class is one shade
        assert bool((drawn[:, 0] != drawn[:, 1]).all())
    sources.splits_are_apart(source)


def test_a_data_set_that_is_damaged_is_one_line_that_names_it(tmp_path):
    raw = draw_emnist(tmp_path) / "EMNIST" / "raw"
    (raw / "emnist-letters-train-labels-idx1-ubyte").write_bytes(b"no labels")
    with pytest.raises(DataError, match="EMNIST: cannot be read as torchvision's EMNIST"):
        DATASETS["emnist"](folder=tmp_path)


class Listed(Dataset):
    """Pairs, with whatever attributes it is given."""

    def __init__(self, pairs, **attributes):
        self.pairs, self.reads = pairs, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, row):
        self.reads.append(row)
        return self.pairs[row]


PAIRS = [(torch.full((2,), float(n)), n % 9) for n in range(36)]
LABELS = [label for _, label in PAIRS]


@pytest.mark.parametrize(
    ("dataset", "expected", "reads"),
    [
        (Listed(PAIRS), LABELS, 36),
        (Listed(PAIRS, targets=LABELS), LABELS, 2),
        (Listed(PAIRS, labels=torch.tensor(LABELS)), LABELS, 2),
        (Listed(PAIRS, targets=[f"{n}" for n in LABELS], target_transform=int), LABELS, 2),
        (Listed(PAIRS, labels=list("abcdefghi")), LABELS, 36),  # names of classes, not of examples
        (Listed(PAIRS, targets=[n + 1 for n in LABELS]), LABELS, 37),
        (Listed(PAIRS, targets=torch.eye(36)), LABELS, 36),  # what is called so holds other things
        (Listed(PAIRS, targets=[0.5] * 36, labels=LABELS), LABELS, 2),
        (Listed(PAIRS, targets=LABELS, target_transform={}.__getitem__), LABELS, 36),
    ],
)
def test_labels_come_from_attributes_only_if_these_are_right(dataset, expected, reads):
    assert labels_of(dataset) == expected
    assert len(dataset.reads) in (reads, reads + 1)


def test_labels_of_parts_and_wholes():
    tensors = TensorDataset(torch.zeros(36, 2), torch.tensor(LABELS))
    assert labels_of(ConcatDataset([tensors, Subset(Listed(PAIRS), [5, 3])])) == [*LABELS, 5, 3]


@pytest.mark.parametrize("names", [list("abcABCdef"), None])
def test_labels_may_differ_in_case_alone(names):  # as EMNIST's do
    letters = "abcABCdef"
    pairs = PAIRS if names else [(x, letters[n]) for x, n in PAIRS]
    dataset = Listed(pairs, **({"classes": names} if names else {}))
    source = Episodes(dataset, splits=SHARES, **EPISODES)
    assert sorted(sum((pool.names for pool in source.pools.values()), ())) == sorted(letters)
    twice = {"train": list("ab"), "test": list("Aab")}
    with pytest.raises(TaskError, match='the class "a" of train is "a" of test, too'):
        Episodes(dataset, splits=twice, **EPISODES).sample("train", [0])


def test_an_example_that_cannot_be_read_is_named():
    class Torn(Listed):
        def __getitem__(self, row):
            if row == 30:
                raise OSError("image file is truncated")
            return super().__getitem__(row)

    message = r"example 30 of Torn cannot be read \(OSError: image file is truncated\)"
    with pytest.raises(DataError, match=message):
        labels_of(Torn(PAIRS))
    source = Episodes(Torn(PAIRS, targets=LABELS), splits=SHARES, **EPISODES)
    with pytest.raises(DataError, match=message):
        _ = source.checksum
    floats = [(Image.new("F", (4, 4)), n % 9) for n in range(36)]
    with pytest.raises(
        DataError, match=r"input 0: cannot be read as an image .its pixels are floats"
    ):
        Episodes(floats, splits=SHARES, **EPISODES).sample("train", [0])


@pytest.mark.parametrize("kind", ["uint16", ">u4", ">f4", "<i2"])
def test_arrays_of_kinds_that_torch_does_not_have_keep_their_numbers(kind):
    pairs = [(np.array([n, 300 + n], dtype=kind), n % 9) for n in range(36)]
    batch = Episodes(pairs, splits=SHARES, **EPISODES).sample("train", [0])
    assert set(batch.query[0].flatten().int().tolist()) <= {*range(36), *range(300, 336)}


def test_a_split_is_stated_by_labels_by_names_or_by_data_sets():
    names = [f"kind {n}" for n in range(9)]
    dataset = Listed(PAIRS, targets=LABELS, classes=names)
    by_label = dict(zip(SPLITS, ([0, 1, 2], [3, 4, 5], [6, 7, 8]), strict=True))
    by_name = {split: [names[n] for n in labels] for split, labels in by_label.items()}
    parts = {
        split: Subset(dataset, [row for row, n in enumerate(LABELS) if n in labels])
        for split, labels in by_label.items()
    }
    stated = [
        Episodes(dataset, splits=by_label, **EPISODES),
        Episodes(dataset, splits=by_name, **EPISODES),
        Episodes(parts, **EPISODES),
    ]
    assert len({source.checksum for source in stated}) == 1
    for source in stated:
        assert torch.equal(
            source.sample("test", [5]).query[0], stated[0].sample("test", [5]).query[0]
        )
    again = Episodes({"train": parts["train"], "test": parts["train"]}, **EPISODES)
    with pytest.raises(TaskError, match='the class "kind 0" of train is "kind 0" of test, too'):
        again.sample("train", [0])


def test_random_transforms_are_the_same_whenever_an_example_is_read():
    class Noisy(Listed):
        def __getitem__(self, row):
            x, label = self.pairs[row]
            return x + torch.rand(2) + random.random() + np.random.rand(), label

    for cache in (0, 1):
        source = Episodes(Noisy(PAIRS, targets=LABELS), splits=SHARES, cache=cache, **EPISODES)
        sources.is_a_function_of_the_index(source, [0, 3, 1])
        sources.samples_purely(source)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (3, {"splits": SHARES}, "datasets is 3; it takes a data set with len"),
        (Listed, {"splits": SHARES}, r"datasets is the class Listed; .* did you mean Listed\(…\)"),
        (PAIRS, {}, "splits is missing; it takes the shares"),
        (PAIRS, {"splits": (0.5, 0.1, 0.1)}, "that add up to 1"),
        (PAIRS, {"splits": {"train": [0, 11]}}, "splits is 11 for train, and no example has it"),
        ({"valid": PAIRS}, {}, "its keys are of"),
        ({"train": PAIRS}, {"splits": SHARES}, "given beside a data set for each split"),
        ([], {"splits": SHARES}, "a list without examples"),
        ([1, 2, 3], {"splits": SHARES}, "example 0, 1; it is a pair"),
        ([(torch.zeros(2), 0.5)], {"splits": SHARES}, "the label 0.5; it is a whole number"),
        ([("x", n % 9) for n in range(36)], {"splits": SHARES}, "'x'; it is a tensor, an array"),
        (
            [(torch.zeros(2 + n // 30), n % 9) for n in range(36)],
            {"splits": SHARES},
            r"Tensor \[3\] of torch.float32, and input 0 is .* \[2\] of .*; examples have one shape",
        ),
        (PAIRS, {"splits": SHARES, "queries": 9}, "need 10 examples of every class"),
    ],
)
def test_what_cannot_be_is_refused(dataset, options, message):
    with pytest.raises(TaskError, match=message) as caught:
        Episodes(dataset, **{**EPISODES, **options}).sample("train", range(9))
    assert caught.value.block == "Episodes"
