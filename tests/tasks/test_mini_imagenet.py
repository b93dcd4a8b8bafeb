"""Mini-ImageNet: found, read in both layouts, kept and drawn; on a small data set drawn here."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import STEP, counted, draw_mini_imagenet

from metablocks.errors import DataError
from metablocks.tasks import MiniImagenet, mini_imagenet_files
from metablocks.tasks.class_splits import MINI_IMAGENET
from metablocks.tasks.mini_imagenet_files import LAYOUT
from metablocks.tasks.named_classes import class_names

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


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them, tables and images; shared, so leave it as it is."""
    return draw_mini_imagenet(tmp_path_factory.mktemp("tables"), "tables")


@pytest.fixture
def folders_copy(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders, tmp_path / "data"))


# --- reading


def test_every_image_stands_in_its_class_and_place(drawn: Path, folders: Path) -> None:
    source = MiniImagenet(**FIELDS, data=drawn)
    bank = source.bank
    assert bank.names == class_names(MINI_IMAGENET)
    assert bank.images.shape == (100, 6, 3, 84, 84)
    assert bank.images.dtype == torch.uint8
    assert bank.counts == tuple(counted(name) for name in bank.names)
    for number, count in enumerate(bank.counts):
        for position in range(count):
            color = torch.tensor([2 * number, STEP * position, 7], dtype=torch.uint8)
            assert (bank.images[number, position] == color[:, None, None]).all()
    assert source.checksum == MiniImagenet(**FIELDS, data=folders).checksum


def test_tasks_hold_the_classes_of_their_split_and_no_other(
    folders: Path, device: torch.device
) -> None:
    source = MiniImagenet(**FIELDS, data=folders, device=device)
    for split, classes in source.classes.items():
        inputs, _ = source.sample(split, range(120)).query
        assert inputs.shape == (120, 15, 3, 84, 84)
        codes = (inputs[:, :, 0, 0, 0] * 255).round().long() // 2
        assert set(codes.flatten().tolist()) == set(classes.tolist())  # 600 draws miss no class


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
    assert bank.counts is not None
    assert bank.counts[0] == 4
    expected = np.asarray(wide.resize((84, 84), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(bank.images[0, 0].numpy(), expected)
    jpeg = np.asarray(wide.resize((84, 84))).transpose(2, 0, 1).astype(float)
    assert np.abs(bank.images[0, 1].numpy() - jpeg).mean() < 40  # noise is what JPEG loses most of
    assert (bank.images[0, 2, 0] == bank.images[0, 2, 1]).all()
    assert bank.images[0, 3, :, 40, 40].tolist() == [10, 20, 30]


# --- finding


def test_data_names_the_parent_or_the_folder_itself(drawn: Path) -> None:
    for data in (drawn, drawn / "mini_imagenet", str(drawn)):
        assert mini_imagenet_files.find(data) == drawn / "mini_imagenet"


def test_data_comes_before_the_environment_and_that_before_the_cache(
    folders: Path, tables: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mini_imagenet_files.find() is None
    shutil.copytree(folders, cache)
    assert mini_imagenet_files.find() == cache / "mini_imagenet"
    monkeypatch.setenv("METABLOCKS_DATA", str(tables))
    assert mini_imagenet_files.find() == tables / "mini_imagenet"
    assert mini_imagenet_files.find(folders) == folders / "mini_imagenet"


def test_where_there_is_no_data_one_error_says_where_was_looked_and_what_works(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METABLOCKS_DATA", str(tmp_path))
    source = MiniImagenet(**FIELDS)  # is built and described without any data
    assert (source.kind, source.input_shape, source.outputs) == ("classification", (3, 84, 84), 5)
    with pytest.raises(DataError) as caught:
        source.sample("train", [0])
    message = str(caught.value)
    for part in (str(tmp_path), str(cache), "--data FOLDER", "METABLOCKS_DATA", LAYOUT, "terms"):
        assert part in message
    assert "n01532829/" in LAYOUT
    assert "train.csv, val.csv and test.csv" in LAYOUT
    assert "\n" not in message


# --- keeping


def kept(cache: Path) -> Path:
    (path,) = cache.glob("mini_imagenet-*.npz")
    return path


def test_a_kept_bank_is_read_back_without_the_images(
    drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MiniImagenet(**FIELDS, data=drawn)
    assert first.checksum
    assert kept(cache).is_file()
    monkeypatch.setattr(mini_imagenet_files, "read", lambda images: pytest.fail("decoded again"))
    second = MiniImagenet(**FIELDS, data=drawn)
    assert second.checksum == first.checksum
    assert second.bank.counts == first.bank.counts
    assert torch.equal(second.bank.images, first.bank.images)


def test_a_damaged_kept_bank_is_made_anew(folders: Path, cache: Path) -> None:
    whole = MiniImagenet(**FIELDS, data=folders).checksum
    content = kept(cache).read_bytes()
    with np.load(kept(cache)) as stored:
        changed = dict(stored)
    changed["counts"][0] = 4
    np.savez(kept(cache), **changed)
    assert MiniImagenet(**FIELDS, data=folders).checksum == whole
    assert kept(cache).read_bytes() == content
    assert not list(cache.glob("*.part"))


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = MiniImagenet(**FIELDS, data=folders).checksum
    (tmp_path / "file").write_text("a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert MiniImagenet(**FIELDS, data=folders).checksum == expected


def test_a_changed_image_and_a_moved_one_are_another_bank(folders_copy: Path) -> None:
    before = MiniImagenet(**FIELDS, data=folders_copy).checksum
    root = folders_copy / "mini_imagenet"
    Image.new("RGB", (84, 84), (1, 2, 3)).save(root / FIRST / f"{FIRST}00000002.png")
    changed = MiniImagenet(**FIELDS, data=folders_copy).checksum
    (root / FIRST / f"{FIRST}00000002.png").rename(root / "n01558993" / "other.png")
    moved = MiniImagenet(**FIELDS, data=folders_copy).checksum
    assert len({before, changed, moved}) == 3
