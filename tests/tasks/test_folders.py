"""Tasks of image files of one's own: layouts, kinds of images, faults, the bounded cache."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metablocks.errors import DataError, MetablocksError, TaskError
from metablocks.tasks import Folders, image_files
from metablocks.tasks.base import SPLITS
from metablocks.tasks.image_files import Cached, decode

EPISODES = {"size": 8, "ways": 2, "shots": 1, "queries": 2}


@pytest.fixture
def root(small_folders, tmp_path):
    """A copy, to damage."""
    return shutil.copytree(small_folders, tmp_path / "data")


@pytest.fixture
def flat(small_folders, tmp_path):
    """The same classes in one folder, without a split."""
    for split in ("train", "val", "test"):
        shutil.copytree(small_folders / split, tmp_path / "flat", dirs_exist_ok=True)
    return tmp_path / "flat"


def test_pixels_say_of_which_class_and_split_they_are(small_folders):
    source = Folders(small_folders, **EPISODES)
    assert source.input_shape == (3, 8, 8)
    for number, split in enumerate(SPLITS):
        batch = source.sample(split, range(5))
        classes = (batch.query[0][..., 0, 0, 0] * 255 / 20).round()  # [tasks, examples]
        assert set(classes.flatten().tolist()) == {3 * number, 3 * number + 1, 3 * number + 2}
        support = (batch.support[0][..., 0, 0, 0] * 255 / 20).round()
        assert torch.equal(classes, support.repeat_interleave(2, 1))


def test_a_split_is_stated_as_shares_names_or_a_file(flat):
    names = {
        split: [f"{folder} {name}" for name in ("ant", "bee", "cat")]
        for split, folder in zip(SPLITS, ("train", "val", "test"), strict=True)
    }
    (flat.parent / "split.json").write_text(json.dumps(names))
    lines = [f"{split}: [{', '.join(listed)}]" for split, listed in names.items()]
    (flat.parent / "split.yaml").write_text("\n".join(lines))
    stated = [
        Folders(flat, splits=splits, **EPISODES)
        for splits in (names, flat.parent / "split.json", str(flat.parent / "split.yaml"))
    ]
    assert len({source.checksum for source in stated}) == 1
    shares = Folders(flat, splits=[0.34, 0.33, 0.33], **EPISODES)
    assert [len(shares.pools[split].counts) for split in SPLITS] == [3, 3, 3]
    assert not set(shares.classes["train"]) & set(shares.classes["test"])


def test_the_same_contents_have_one_checksum_and_give_the_same_tasks(small_folders, root):
    here, there = Folders(small_folders, **EPISODES), Folders(root, **EPISODES)
    assert here.checksum == there.checksum
    assert torch.equal(here.sample("test", [7]).query[0], there.sample("test", [7]).query[0])
    assert torch.equal(
        pickle.loads(pickle.dumps(here)).sample("test", [7]).query[0],
        there.sample("test", [7]).query[0],
    )
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "test" / "test ant" / "0.png")
    assert Folders(root, **EPISODES).checksum != here.checksum


def test_the_checksum_is_remembered_until_a_file_changes(root, monkeypatch):
    checksum = Folders(root, **EPISODES).checksum
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "content_of", None)  # no file is read again
        assert Folders(root, **EPISODES).checksum == checksum
    Image.new("RGB", (9, 9)).save(root / "train" / "train ant" / "0.png")
    assert Folders(root, **EPISODES).checksum != checksum


def modes():
    grey16 = np.full((4, 4), 0x80FF, dtype=np.uint16)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 128, 128, 128])
    return {
        "L": Image.new("L", (4, 4), 128),
        "RGB": Image.new("RGB", (4, 4), (128,) * 3),
        "RGBA": Image.new("RGBA", (4, 4), (0, 0, 0, 127)),  # half black on white
        "LA": Image.new("LA", (4, 4), (0, 127)),
        "P": palette,
        "I;16": Image.fromarray(grey16),
    }


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels, tmp_path):
    modes()[mode].save(tmp_path / "x.png")
    assert torch.equal(
        decode(tmp_path / "x.png", (5, 7), channels),
        torch.full((channels, 5, 7), 128, dtype=torch.uint8),
    )


def test_what_is_transparent_is_white_and_a_turned_photograph_is_upright(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.save(tmp_path / "x.png", transparency=0)
    assert decode(tmp_path / "x.png", (2, 2), 3).min() == 255
    photograph = Image.fromarray(np.array([[0] * 8, [255] * 8], np.uint8).repeat(4, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° to the right
    photograph.save(tmp_path / "x.jpg", exif=exif)
    upright = decode(tmp_path / "x.jpg", (8, 8), 1)[0]
    assert upright[:, 0].min() > 200
    assert upright[:, -1].max() < 50


def damage(root, what):
    folder = root / "train" / "train ant"
    match what:
        case "broken":
            file = folder / "2.png"
            file.write_bytes(file.read_bytes()[:-20])
        case "no image":
            (folder / "2.png").write_text("a text")
        case "broken jpeg":
            rng = np.random.default_rng(0)
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
            image.save(folder / "2.jpg")
            (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:2000])
        case "empty":
            (root / "train" / "dog").mkdir()
            (root / "train" / "dog" / "notes.txt").touch()
        case "few":
            (folder / "3.png").unlink()
            (folder / "2.png").unlink()
        case "case":
            shutil.copytree(folder, root / "train" / "Train ant")
        case "both":
            shutil.copytree(folder, root / "val" / "train ant")
        case "loop":
            (root / "train" / "back").symlink_to(root, target_is_directory=True)
        case "lost":
            (folder / "9.png").symlink_to(root / "nowhere.png")
        case "loose":
            shutil.copy(folder / "2.png", root / "train")
        case "nested":
            shutil.copytree(folder, folder / "more")
        case "no split":
            shutil.move(root / "train", root / "other")
        case "twice":
            shutil.copytree(root / "val", root / "valid")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("broken", r"train ant/2\.png: cannot be read as an image"),
        ("no image", r"train ant/2\.png: cannot be read as an image, one of BMP"),
        ("broken jpeg", r"train ant/2\.jpg: cannot be read as an image"),
        ("empty", r"train/dog: holds no image; images end in \.bmp"),
        ("few", r"need 3 examples of every class, and train ant of train has 2"),
        ("case", r'the class "Train ant" of train is "train ant" of train, too'),
        ("both", r'the class "train ant" of train is "train ant" of validation, too'),
        ("loop", r"train/back/train: is reached by a link from inside itself"),
        ("lost", r"9\.png: is a link that leads nowhere"),
        ("loose", r"train: holds an image, 2\.png, beside the folder train ant"),
        ("nested", r"train ant: holds an image, 0\.png, beside the folder more"),
        ("no split", r"has no folder train; lay images out as"),
        ("twice", r"holds val and valid, both validation"),
    ],
)
def test_a_fault_of_the_folders_is_one_clear_line(root, what, message):
    damage(root, what)
    with pytest.raises((DataError, TaskError), match=message) as caught:
        _ = Folders(root, **EPISODES).checksum
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "/no/such"}, "Folders root is '/no/such', and there is no such folder"),
        ({"splits": "/no/such"}, "splits is '/no/such', which cannot be read as classes by split"),
        ({"splits": (0.5, 0.2, 0.2)}, r"three shares \(train, validation, test\) that add up to 1"),
        ({"splits": {"test": ["train ent"]}}, 'no class train ent.*; did you mean "train ant"'),
        ({"size": 0}, "Folders size is 0"),
    ],
)
def test_wrong_fields_are_refused(flat, options, message):
    with pytest.raises(MetablocksError, match=message):
        _ = Folders(**{"root": flat, **EPISODES, **options}).pools


def test_hidden_and_foreign_files_are_passed_over_and_links_to_folders_are_followed(root, tmp_path):
    before = Folders(root, **EPISODES).checksum
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "list.txt").touch()
    (root / "train" / "train ant" / "._0.png").touch()
    shutil.move(root / "val" / "val bee", tmp_path / "elsewhere")
    (root / "val" / "val bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert Folders(root, **EPISODES).checksum == before


@pytest.mark.parametrize("limit", [0, 3, 8, 10**6])
def test_what_is_cached_is_what_would_be_read(limit):
    reads = []

    def read(rows):
        reads.extend(rows)
        return [torch.full((2,), row) for row in rows]

    cached, rng = Cached(read, 20, limit * 16), np.random.default_rng(0)
    for _ in range(40):
        rows = rng.integers(0, 20, rng.integers(1, 8))
        assert torch.equal(cached.take(rows)[:, 1], torch.from_numpy(rows))
    assert (len(reads) == 20) == (limit >= 20)
    assert cached._kept.numel() == 2 * min(limit, 20)


def test_a_small_cache_gives_the_same_tasks(small_folders):
    sources = [Folders(small_folders, **EPISODES, cache=cache) for cache in (0, 1)]
    for index in (3, 1, 3):
        one, other = (source.sample("train", [index]) for source in sources)
        assert torch.equal(one.query[0], other.query[0])


@pytest.mark.long
def test_memory_is_flat_over_100_000_files(tmp_path):
    for number in range(1000):
        split = "train" if number < 800 else "val" if number < 900 else "test"
        folder = tmp_path / split / f"{number:04d}"
        folder.mkdir(parents=True)
        image_of(number % 250).save(folder / "00.png")
        for link in range(1, 100):
            os.link(folder / "00.png", folder / f"{link:02d}.png")
    source = Folders(tmp_path, size=32, ways=5, shots=1, queries=15, cache=8)
    source.sample("train", [0])
    resident = memory()
    for first in range(0, 1600, 8):  # 128 000 images of 3 KiB
        source.sample("train", range(first, first + 8))
    assert memory() - resident < 64 * 2**20


def image_of(number):
    return Image.new("RGB", (40, 36), (number,) * 3)


def memory():
    """The resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
