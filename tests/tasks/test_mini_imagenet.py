"""Mini-ImageNet: read in both layouts, drawn, and refused; on a small data set drawn here."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metablocks.errors import DataError, TaskError
from metablocks.tasks import MiniImagenet
from metablocks.tasks.class_splits import MINI_IMAGENET, class_names
from tools.fuzzing.small_images import STEP, counted, draw_mini_imagenet

FIELDS = {"ways": 5, "shots": 1, "queries": 3}
FIRST = "n01532829"


@pytest.fixture(scope="module", params=["folders", "splits", "tables"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a `mini_imagenet` in every layout; shared, so leave it as it is."""
    return draw_mini_imagenet(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them, a folder a class; shared, so leave it as it is."""
    return draw_mini_imagenet(tmp_path_factory.mktemp("plain"), "folders")


@pytest.fixture
def folders_copy(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders, tmp_path / "data"))


# --- reading


def test_every_image_stands_in_its_class_and_place(drawn: Path, folders: Path) -> None:
    source = MiniImagenet(**FIELDS, data=drawn)
    bank = source.bank
    assert bank.counts == {name: counted(name) for name in class_names(MINI_IMAGENET)}
    assert list(bank.counts) == list(class_names(MINI_IMAGENET))
    assert bank.images.shape == (sum(bank.counts.values()), 3, 84, 84)
    assert bank.images.dtype == torch.uint8
    for number, images in enumerate(bank.images.split(list(bank.counts.values()))):
        for position, image in enumerate(images):
            color = torch.tensor([2 * number, STEP * position, 7], dtype=torch.uint8)
            assert (image == color[:, None, None]).all()
    assert source.checksum == MiniImagenet(**FIELDS, data=folders).checksum


def test_tasks_hold_the_classes_of_their_split_and_no_other(
    folders: Path, device: torch.device
) -> None:
    source = MiniImagenet(**FIELDS, data=folders, device=device)
    names = class_names(MINI_IMAGENET)
    for split, pool in source.pools.items():
        inputs, _ = source.sample(split, range(120)).query
        assert inputs.shape == (120, 15, 3, 84, 84)
        codes = (inputs[:, :, 0, 0, 0] * 255).round().long() // 2
        assert set(codes.flatten().tolist()) == {
            names.index(name) for name in pool.names
        }  # 600 draws miss no class


def test_the_name_of_a_class_decides_its_split_and_not_the_folder_above(
    tmp_path: Path, folders: Path
) -> None:
    root = draw_mini_imagenet(tmp_path, "splits") / "mini_imagenet"
    (root / "train" / FIRST).rename(root / "test" / FIRST)  # and one that lies directly there
    (root / "val" / "n01855672").rename(root / "n01855672")
    expected = MiniImagenet(**FIELDS, data=folders).checksum
    assert MiniImagenet(**FIELDS, data=tmp_path).checksum == expected


def test_other_folders_and_files_are_not_looked_at(folders_copy: Path, folders: Path) -> None:
    root = folders_copy / "mini_imagenet"
    shutil.copytree(root / FIRST, root / "n01440764")  # another class of ImageNet
    (root / FIRST / "notes.txt").write_text("no image")
    (root / FIRST / "._hidden.jpg").write_bytes(b"no image")
    expected = MiniImagenet(**FIELDS, data=folders).checksum
    assert MiniImagenet(**FIELDS, data=folders_copy).checksum == expected


def test_images_of_other_sizes_and_kinds_are_made_rgb_84_by_84(folders_copy: Path) -> None:
    folder = folders_copy / "mini_imagenet" / FIRST
    shutil.rmtree(folder)
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    wide.save(folder / "a.png")
    wide.resize((84, 84)).save(folder / "b.JPEG", quality=95)
    wide.convert("L").save(folder / "c.jpg")
    Image.new("RGBA", (84, 84), (10, 20, 30, 255)).save(folder / "d.png")
    bank = MiniImagenet(**FIELDS, data=folders_copy).bank
    assert bank.counts[FIRST] == 4
    expected = np.asarray(wide.resize((84, 84), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(bank.images[0].numpy(), expected)
    jpeg = np.asarray(wide.resize((84, 84))).transpose(2, 0, 1).astype(float)
    assert np.abs(bank.images[1].numpy() - jpeg).mean() < 40  # noise is what JPEG loses most of
    assert (bank.images[2, 0] == bank.images[2, 1]).all()
    assert bank.images[3, :, 40, 40].tolist() == [10, 20, 30]


def test_a_changed_image_and_a_moved_one_are_another_bank(folders_copy: Path) -> None:
    before = MiniImagenet(**FIELDS, data=folders_copy).checksum
    root = folders_copy / "mini_imagenet"
    Image.new("RGB", (84, 84), (1, 2, 3)).save(root / FIRST / f"{FIRST}00000002.png")
    changed = MiniImagenet(**FIELDS, data=folders_copy).checksum
    (root / FIRST / f"{FIRST}00000002.png").rename(root / "n01558993" / "other.png")
    moved = MiniImagenet(**FIELDS, data=folders_copy).checksum
    assert len({before, changed, moved}) == 3


# --- folders


def without_classes(root: Path) -> None:
    for name in MINI_IMAGENET["validation"][:2]:
        shutil.rmtree(root / name)


def with_a_class_misnamed(root: Path) -> None:
    (root / "n13133613").rename(root / "n1313361")


def with_a_class_twice(root: Path) -> None:
    shutil.copytree(root / FIRST, root / "train" / FIRST)


def with_an_empty_class(root: Path) -> None:
    for path in (root / FIRST).iterdir():
        path.unlink()


def with_a_truncated_image(root: Path) -> None:
    path = root / FIRST / f"{FIRST}00000003.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_classes, "14 of the 16 classes of validation; missing: n01855672, n02091244$"),
        (with_a_class_misnamed, '63 of the 64 .* missing: n13133613; did you mean "n1313361"'),
        (with_a_class_twice, "an image of n01532829 is there or listed twice"),
        (with_an_empty_class, "n01532829: holds no image; images end in .bmp"),
        (with_a_truncated_image, r"00000003\.png: cannot be read as an image"),
    ],
)
def test_what_is_wrong_with_folders_is_an_error_that_names_it(
    tmp_path: Path, cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(draw_mini_imagenet(tmp_path, "folders") / "mini_imagenet")
    with pytest.raises(DataError, match=message):
        MiniImagenet(**FIELDS, data=tmp_path).sample("train", [0])
    assert not list(cache.glob("*"))  # nothing half-read is kept


# --- tables


def edit(table: str, old: str, new: str) -> Callable[[Path], None]:
    """Damage: other text in a table."""

    def damage(root: Path) -> None:
        text = (root / table).read_text()
        assert old in text
        (root / table).write_text(text.replace(old, new))

    return damage


def without_a_table(root: Path) -> None:
    (root / "val.csv").unlink()


def without_a_listed_image(root: Path) -> None:
    (root / "images" / f"{FIRST}00000001.png").unlink()


def with_a_table_that_is_none(root: Path) -> None:
    (root / "test.csv").write_bytes(b"filename,label\n\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_table, r"val\.csv: cannot be read"),
        (without_a_listed_image, r"train\.csv: line 3: .*n0153282900000001\.png is not in .*images"),
        (with_a_table_that_is_none, r"test\.csv: cannot be read as filename,label"),
        (edit("val.csv", "filename,label", "file,class"), "line 2: cannot be read as filename,label"),
        (edit("train.csv", "1.png,n01532829", "1.png,"), "line 3: .*label  is not a class of train"),
        (edit("train.csv", "1.png,n01532829", "1.png,n01930112"),
         "line 3: .*label n01930112 is not a class of train"),
        (edit("train.csv", "n0153282900000001.png", "n0153282900000000.png"),
         "an image of n01532829 is there or listed twice"),
        (edit("train.csv", "n0153282900000001.png", "../val.csv"), "is not in"),
        (lambda root: (root / "test.csv").write_text("filename,label\n"),
         r"mini_imagenet \(train.csv, val.csv, test.csv\): holds 0 of the 20 classes of test"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tables_is_an_error_that_names_the_line(
    tmp_path: Path, cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(draw_mini_imagenet(tmp_path, "tables") / "mini_imagenet")
    with pytest.raises(DataError, match=message):
        MiniImagenet(**FIELDS, data=tmp_path).sample("train", [0])
    assert not list(cache.glob("*"))


# --- fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 1}, "MiniImagenet ways is 1; it takes a whole number, 2 or more"),
        ({"ways": 17}, "ways is 17, .*train 64, validation 16, test 20; ways is at most 16"),
        ({"queries": 600}, "need 601 examples of every class, and a class has 600"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_field_is_an_error_when_the_source_is_built(change: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        MiniImagenet(**{**FIELDS, **change})


def test_a_class_with_too_few_images_is_named_at_first_use(tmp_path: Path) -> None:
    draw_mini_imagenet(tmp_path)
    for number in range(3):
        (tmp_path / "mini_imagenet/n01930112" / f"n01930112{number:08d}.png").unlink()
    left = counted("n01930112") - 3
    source = MiniImagenet(**FIELDS, data=tmp_path)
    message = (
        rf"need 4 examples of every class, and n01930112 of test has {left}; .* at most {left}"
    )
    with pytest.raises(TaskError, match=message):
        _ = source.checksum
