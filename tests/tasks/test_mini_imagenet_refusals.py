"""Mini-ImageNet: what is wrong with its folders, tables, images or fields is named in one error."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from small_images import counted, draw_mini_imagenet

from metablocks.errors import DataError, MetablocksError, TaskError
from metablocks.tasks import MiniImagenet
from metablocks.tasks.class_splits import MINI_IMAGENET

FIELDS = {"ways": 5, "shots": 1, "queries": 3}
FIRST = "n01532829"


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


def with_an_unreadable_image(root: Path) -> None:
    (root / FIRST / f"{FIRST}00000003.png").write_bytes(b"no image")


def with_a_truncated_image(root: Path) -> None:
    path = root / FIRST / f"{FIRST}00000003.png"
    path.write_bytes(path.read_bytes()[:60])


def with_an_image_of_another_format(root: Path) -> None:
    Image.new("RGB", (84, 84)).save(root / FIRST / f"{FIRST}00000003.png", format="GIF")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_classes, "14 of the 16 classes of validation; missing: n01855672, n02091244$"),
        (with_a_class_misnamed, '63 of the 64 .* missing: n13133613; did you mean "n1313361"'),
        (with_a_class_twice, "n01532829 lies in both .*n01532829 and .*train/n01532829; a class"),
        (with_an_empty_class, "n01532829: holds no image; images end in .jpg, .jpeg, .png"),
        (with_an_unreadable_image, r"00000003\.png: cannot be read as a JPEG or PNG image"),
        (with_a_truncated_image, r"00000003\.png: cannot be read as a JPEG or PNG image"),
        (with_an_image_of_another_format, r"00000003\.png: cannot be read as a JPEG or PNG image"),
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
        (without_a_listed_image, r"train\.csv: line 3: n0153282900000001\.png is not in .*images"),
        (with_a_table_that_is_none, r"test\.csv: cannot be read as a table"),
        (edit("val.csv", "filename,label", "file,class"), "columns are 'file,class'; they are"),
        (edit("train.csv", "1.png,n01532829", "1.png,"), "line 3: lacks a filename or a label"),
        (edit("train.csv", "1.png,n01532829", "1.png,n01930112"),
         "line 3: label n01930112 is no class of train; it is a class of test"),
        (edit("train.csv", "1.png,n01532829", "1.png,robin"), "robin .* is in no split's list"),
        (edit("train.csv", "n0153282900000001.png", "n0153282900000000.png"),
         r"line 3: n0153282900000000\.png is listed a second time, after .*train\.csv: line 2"),
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
        ({"ways": 17}, "ways=17, .*train 64, validation 16, test 20; ways is at most 16"),
        ({"queries": 600}, "need 601 images of every class, and a class has 600"),
        ({"seed": -1}, "seed is -1"),
        ({"data": "/nonexistent/place"}, "data='/nonexistent/place': there is no such folder"),
        ({"data": os.path.dirname(__file__)}, "no mini-ImageNet is there; data is a folder mini"),
    ],
)
def test_a_bad_field_is_an_error_when_the_source_is_built(change: dict, message: str) -> None:
    with pytest.raises(MetablocksError, match=message) as caught:
        MiniImagenet(**{**FIELDS, **change})
    assert isinstance(caught.value, DataError if "data" in change else TaskError)


def test_a_class_with_too_few_images_is_named_at_first_use(tmp_path: Path) -> None:
    draw_mini_imagenet(tmp_path)
    for number in range(3):
        (tmp_path / "mini_imagenet/n01930112" / f"n01930112{number:08d}.png").unlink()
    left = counted("n01930112") - 3
    source = MiniImagenet(**FIELDS, data=tmp_path)
    message = rf"need 4 images of every class, and n01930112 \(test\) has {left}; .* at most {left}"
    with pytest.raises(TaskError, match=message):
        source.sample("train", [0])
