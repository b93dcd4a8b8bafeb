"""Tasks of image files of one's own: layouts, kinds of images, faults, the bounded cache."""

import json
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
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


def test_tiffs_of_a_known_range_are_read_and_others_are_named(tmp_path):
    whole = {
        "8 bits": np.full((4, 4), 0x80, np.uint8),
        "16 bits": np.full((4, 4), 0x80FF, np.uint16),
    }
    for name, array in whole.items():
        Image.fromarray(array).save(tmp_path / f"{name}.tif")
        assert (decode(tmp_path / f"{name}.tif", (4, 4), 1) == 0x80).all()
    for name, kind in (("floats", np.float32), ("32-bit numbers", np.int32)):
        Image.fromarray(np.full((4, 4), 1, kind)).save(tmp_path / f"{name}.tif")
        for read in (lambda path: decode(path, (4, 4), 1), image_files.content_of):
            with pytest.raises(DataError, match=f"its pixels are {name}, of no known range"):
                read(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_whose_exif_data_are_damaged_is_read_as_it_is(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.new("L", (4, 4), 128).save(path, exif=b"Exif\0\0no such data")
    image_files.content_of(path)
    assert (decode(path, (4, 4), 1).int() - 128).abs().max() < 3


def test_names_need_be_no_utf_8(root):
    before = Folders(root, **EPISODES).checksum
    for name in (b"caf\xe9", b"caf\xe8", "caf\u00e9".encode()):
        shutil.copytree(root / "train" / "train ant", root / "train" / os.fsdecode(name))
    shutil.copy(root / "val/val ant/0.png", root / "val/val ant" / os.fsdecode(b"\xff.png"))
    after = Folders(root, **EPISODES)
    assert len(after.classes["train"]) == 6
    assert after.checksum != before
    after.sample("train", range(9))
    Folders(root / "train", splits=(0.34, 0.33, 0.33), **EPISODES).sample("test", [0])


def test_contents_that_change_under_the_same_size_and_time_are_seen(root, tmp_path):
    def draw(folder, shade):
        path = folder / "train" / "train ant" / "0.bmp"
        Image.new("L", (8, 8), shade).save(path)
        os.utime(path, ns=(10**18, 10**18))
        return Folders(folder, **EPISODES).checksum

    other = shutil.copytree(root, tmp_path / "other")
    assert len({draw(root, 1), draw(root, 2), draw(other, 3)}) == 3


@pytest.mark.parametrize(
    ("splits", "absent"),
    [
        ((1.0, 0.0, 0.0), "validation"),
        ((0.98, 0.01, 0.01), "validation"),
        ({"train": ["train ant", "train bee"], "validation": []}, "validation"),
        ({"train": ["train ant", "train bee"], "validation": ["val ant", "val bee"]}, "test"),
    ],
)
def test_a_split_without_a_class_is_named(splits, absent, flat):
    source = Folders(flat, splits=splits, **EPISODES)
    source.sample("train", [0])
    with pytest.raises(
        TaskError, match=f"there are no classes of {absent}; there are those of train"
    ):
        source.sample(absent, [0])


def test_folders_of_splits_are_known_in_upper_and_lower_case(root):
    before = Folders(root, **EPISODES).checksum
    for name, other in (("train", "Train"), ("val", "VAL"), ("test", "Testing")):
        (root / name).rename(root / other)
    assert Folders(root, **EPISODES).checksum == before


def test_a_split_in_json_may_hold_tabs_escapes_and_a_byte_order_mark(flat):
    shutil.move(flat / "train ant", flat / "\U0001f41c")
    names = {"train": ["\U0001f41c", "train bee"], "test": ["test ant", "test bee"]}
    path = flat.parent / "split.json"
    path.write_text("\ufeff" + json.dumps(names, indent="\t"))
    assert list(Folders(flat, splits=path, **EPISODES).classes["train"]) == [
        "train bee",
        "\U0001f41c",
    ]


@pytest.mark.parametrize("content", ["train: [ant]\nval: [bee]", "train: [ant]\ntest: [7, bee]"])
def test_what_is_wrong_in_a_file_of_splits_is_shown(content, flat):
    path = flat.parent / "split.yaml"
    path.write_text(content)
    wrong = "'val': ['bee']" if "val" in content else r"'test': \[7, 'bee'\]"
    with pytest.raises(TaskError, match=wrong.replace("['bee']", r"\['bee'\]")):
        Folders(flat, splits=path, **EPISODES)


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
        ({"root": "no/such"}, f"there is no such folder in {Path.cwd()}"),
        ({"size": (8, 9), "rotate": True}, r"Folders rotate .* inputs are \[3, 8, 9\]"),
        ({"splits": {"test": ["train ent"]}}, 'missing: train ent; did you mean "train ant"'),
        ({"size": 0}, "Folders size is 0"),
    ],
)
def test_wrong_fields_are_refused(flat, options, message):
    with pytest.raises(MetablocksError, match=message):
        Folders(**{"root": flat, "splits": (0.34, 0.33, 0.33), **EPISODES, **options}).sample(
            "train", [0]
        )


def test_hidden_and_foreign_files_are_passed_over_and_links_to_folders_are_followed(root, tmp_path):
    before = Folders(root, **EPISODES).checksum
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "list.txt").touch()
    (root / "train" / "train ant" / "._0.png").touch()
    shutil.move(root / "val" / "val bee", tmp_path / "elsewhere")
    (root / "val" / "val bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert Folders(root, **EPISODES).checksum == before


def test_shares_do_not_part_a_class_of_several_splits_folders(root):
    shutil.copytree(root / "train" / "train ant", root / "val" / "train ant")
    with pytest.raises(
        DataError, match="train/train ant and val/train ant, which shares would deal"
    ):
        _ = Folders(root, splits=(0.6, 0.2, 0.2), **EPISODES).pools
    names = {"train": ["train/train ant", "val/train ant"]}  # which says that it is meant
    assert len(Folders(root, splits=names, **EPISODES).pools["train"].counts) == 2


def test_threads_draw_what_one_thread_draws():
    def read(rows):
        return [torch.full((2,), row) for row in rows]

    cached, rounds = Cached(read, 20 * 16), np.random.default_rng(0).integers(0, 60, (400, 5))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(cached.take, rounds))
    finally:
        sys.setswitchinterval(interval)
    for rows, examples in zip(rounds, taken, strict=True):
        assert torch.equal(examples[:, 1], torch.from_numpy(rows))


@pytest.mark.parametrize("limit", [0, 3, 8, 10**6])
def test_what_is_cached_is_what_would_be_read(limit):
    reads = []

    def read(rows):
        reads.extend(rows)
        return [torch.full((2,), row) for row in rows]

    cached, rng = Cached(read, limit * 16), np.random.default_rng(0)
    for _ in range(40):
        rows = rng.integers(0, 20, rng.integers(1, 8))
        assert torch.equal(cached.take(rows)[:, 1], torch.from_numpy(rows))
    assert (len(reads) == 20) == (limit >= 20)
    assert len(cached._kept) == min(limit, 20)


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
