"""CIFAR-FS: found, read by content, downloaded, drawn; on a small data set in CIFAR-100's layout."""

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_images import STEP, cifar_parts, counted, pack_cifar, python_2_pickle, write_cifar

from metablocks.errors import DataError, MetablocksError, TaskError
from metablocks.tasks import CifarFS, cifar_fs_files
from metablocks.tasks.cifar_fs_files import LAYOUT
from metablocks.tasks.class_splits import CIFAR_FS
from metablocks.tasks.named_classes import class_names

FIELDS = {"ways": 5, "shots": 1, "queries": 3}
FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of an unpacked `cifar-100-python`; shared, so leave it as it is."""
    return write_cifar(tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def packed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the archive; shared, so leave it as it is."""
    return pack_cifar(unpacked, tmp_path_factory.mktemp("packed"))


def fetched_by(monkeypatch: pytest.MonkeyPatch, download_url: Callable[..., None]) -> None:
    """Let `download_url` stand in for torchvision's."""
    known = SimpleNamespace(url="https://example.org/c.tar.gz", filename=ARCHIVE, tgz_md5="0123")
    datasets = SimpleNamespace(CIFAR100=known, utils=SimpleNamespace(download_url=download_url))
    monkeypatch.setattr(cifar_fs_files, "torchvision_module", lambda name: datasets)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads fail as they do where no name can be looked up."""

    def unreachable(*arguments: str) -> None:
        raise OSError("name or service not known")

    fetched_by(monkeypatch, unreachable)


# --- reading


def test_every_image_stands_in_its_class_and_place(unpacked: Path) -> None:
    bank = CifarFS(**FIELDS, data=unpacked).bank
    assert bank.names == class_names(CIFAR_FS)
    assert bank.images.shape == (100, 6, 3, 32, 32)
    assert bank.images.dtype == torch.uint8
    assert bank.counts == tuple(counted(name) for name in bank.names)
    for number, count in enumerate(bank.counts):
        own = bank.images[number, :count]
        assert (own[:, 0] == 2 * number).all()
        for position in range(count):
            assert (own[position, 1] == STEP * position).all()
            assert (own[position, 2] == (7 if position < 3 else 9)).all()  # train, then test


def test_folder_and_archive_give_one_bank(unpacked: Path, packed: Path) -> None:
    assert CifarFS(**FIELDS, data=unpacked).checksum == CifarFS(**FIELDS, data=packed).checksum


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(unpacked: Path, tmp_path: Path, protocol: int) -> None:
    parts = cifar_parts()
    labels = parts["test"]["fine_labels"]
    parts["test"]["fine_labels"] = list(np.array(labels))  # numbers of numpy are as good
    write_cifar(tmp_path, parts, protocol)
    assert CifarFS(**FIELDS, data=tmp_path).checksum == CifarFS(**FIELDS, data=unpacked).checksum


def test_pickles_are_read_as_python_2_wrote_them(unpacked: Path, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    for part in ("train", "test"):
        batch = cifar_parts()[part]
        content = python_2_pickle(batch["data"], batch["fine_labels"])
        (tmp_path / FOLDER / part).write_bytes(content)
    assert CifarFS(**FIELDS, data=tmp_path).checksum == CifarFS(**FIELDS, data=unpacked).checksum


def test_planes_are_red_green_blue_and_rows_are_rows(tmp_path: Path) -> None:
    parts = cifar_parts()
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    parts["train"]["data"][0] = image.reshape(-1)  # channel by channel, row by row
    name = parts["meta"]["fine_label_names"][parts["train"]["fine_labels"][0]]
    bank = CifarFS(**FIELDS, data=write_cifar(tmp_path, parts)).bank
    assert np.array_equal(bank.images[bank.names.index(name), 0].numpy(), image)


def test_what_else_lies_in_an_archive_is_not_looked_at(unpacked: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as archive:
        for name in (".", "train", "other/train", f"{FOLDER}/file.txt~", f"{FOLDER}/._train"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        archive.add(unpacked / FOLDER, f"./{FOLDER}")
    assert CifarFS(**FIELDS, data=tmp_path).checksum == CifarFS(**FIELDS, data=unpacked).checksum


def test_tasks_hold_the_classes_of_their_split_and_no_other(
    unpacked: Path, device: torch.device
) -> None:
    source = CifarFS(**FIELDS, data=unpacked, device=device)
    for split, classes in source.classes.items():
        inputs, _ = source.sample(split, range(120)).query
        assert inputs.shape == (120, 15, 3, 32, 32)
        codes = (inputs[:, :, 0, 0, 0] * 255).round().long() // 2
        assert set(codes.flatten().tolist()) == set(classes.tolist())  # 600 draws miss no class


# --- finding


def test_data_names_the_parent_or_the_folder_itself(unpacked: Path, packed: Path) -> None:
    for data in (unpacked, unpacked / FOLDER, str(unpacked)):
        assert cifar_fs_files.find(data) == unpacked / FOLDER
    assert cifar_fs_files.find(packed) == packed / ARCHIVE


def test_data_comes_before_the_environment_and_that_before_the_cache(
    unpacked: Path, packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cifar_fs_files.find() is None
    shutil.copytree(packed, cache)
    assert cifar_fs_files.find() == cache / ARCHIVE
    monkeypatch.setenv("METABLOCKS_DATA", str(unpacked))
    assert cifar_fs_files.find() == unpacked / FOLDER
    assert cifar_fs_files.find(packed) == packed / ARCHIVE


def test_neither_data_nor_network_is_one_error_that_names_both_ways(
    no_network: None, cache: Path
) -> None:
    source = CifarFS(**FIELDS)  # is built and described without any data
    assert (source.kind, source.input_shape, source.outputs) == ("classification", (3, 32, 32), 5)
    with pytest.raises(DataError) as caught:
        source.sample("train", [0])
    message = str(caught.value)
    for part in ("network", "--data FOLDER", "METABLOCKS_DATA", LAYOUT, "service not known"):
        assert part in message
    assert str(cache) in message
    assert "\n" not in message


def test_a_download_is_kept_for_the_next_time_and_unpacked_nowhere(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, filename, md5))
        shutil.copy(packed / ARCHIVE, Path(root, filename))

    fetched_by(monkeypatch, download)
    first = CifarFS(**FIELDS).checksum
    assert asked == [("https://example.org/c.tar.gz", ARCHIVE, "0123")]
    assert first == CifarFS(**FIELDS).checksum == CifarFS(**FIELDS, data=packed).checksum
    assert len(asked) == 1
    assert [path.name for path in cache.iterdir()] == [ARCHIVE]


def test_torchvision_knows_the_archive() -> None:
    datasets = cifar_fs_files.torchvision_module("datasets")
    assert datasets.CIFAR100.filename == ARCHIVE
    assert datasets.CIFAR100.base_folder == FOLDER
    assert datasets.CIFAR100.tgz_md5
    assert callable(datasets.utils.download_url)


# --- what is wrong with the data


def rewrite(part: str, **change: object) -> Callable[[Path], None]:
    """Damage: other values in one of the pickles."""

    def damage(folder: Path) -> None:
        value = pickle.loads((folder / FOLDER / part).read_bytes())
        value.update(change)
        kept = {key: entry for key, entry in value.items() if entry is not None}
        (folder / FOLDER / part).write_bytes(pickle.dumps(kept))

    return damage


def with_text_for_a_pickle(folder: Path) -> None:
    (folder / FOLDER / "test").write_text("<html>not found</html>")


def with_a_truncated_pickle(folder: Path) -> None:
    path = folder / FOLDER / "train"
    path.write_bytes(path.read_bytes()[:5000])


def with_a_class_misnamed(folder: Path) -> None:
    names = [name.replace("beaver", "beavers") for name in sorted(class_names(CIFAR_FS))]
    rewrite("meta", fine_label_names=names)(folder)


def with_a_class_left_out(folder: Path) -> None:
    worm = sorted(class_names(CIFAR_FS)).index("worm")
    for part in ("train", "test"):
        value = pickle.loads((folder / FOLDER / part).read_bytes())
        keep = np.array(value["fine_labels"]) != worm
        labels = np.array(value["fine_labels"])[keep].tolist()
        rewrite(part, data=value["data"][keep], fine_labels=labels)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_text_for_a_pickle, r"cifar-100-python/test: cannot be read as a pickle"),
        (with_a_truncated_pickle, r"cifar-100-python/train: cannot be read as a pickle"),
        (rewrite("test", data=None), "test: holds only fine_labels; CIFAR-100 holds data there"),
        (rewrite("train", fine_labels=None), "train: holds only data; CIFAR-100 holds fine_labels"),
        (rewrite("train", fine_labels=[0]), "fine_labels is no number from 0 to 99 for each of"),
        (rewrite("train", fine_labels=[100] * 300), "train: fine_labels is no number from 0 to 99"),
        (rewrite("train", fine_labels=["cat"] * 300), "train: fine_labels is no number"),
        (rewrite("test", data=[1, 2]), r"data is list \[2\]; it is uint8 \[images, 3072\]"),
        (rewrite("test", data=np.zeros((2, 5), np.uint8)), r"data is uint8 \[2, 5\]; it is uint8"),
        (rewrite("test", data=np.zeros((2, 3072))), r"data is float64 \[2, 3072\]; it is uint8"),
        (rewrite("meta", fine_label_names=7), "meta: fine_label_names is no list of text"),
        (with_a_class_misnamed, 'the 16 classes of validation; missing: beaver; did you mean "beavers"'),
        (with_a_class_left_out, "holds 19 of the 20 classes of test; missing: worm"),
    ],
)  # fmt: skip
def test_damaged_data_is_an_error_that_names_the_file(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(write_cifar(tmp_path))
    with pytest.raises(DataError, match=message):
        CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


def test_a_damaged_archive_is_an_error_that_names_it(packed: Path, tmp_path: Path) -> None:
    content = (packed / ARCHIVE).read_bytes()
    for damaged in (content[: len(content) // 2], content[:10], b"", b"no archive" * 99):
        (tmp_path / ARCHIVE).write_bytes(damaged)
        with pytest.raises(DataError, match=r"python\.tar\.gz: cannot be read as a tar archive"):
            CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


def test_an_archive_without_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / FOLDER / "meta").unlink()
    pack_cifar(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"tar\.gz: lacks cifar-100-python/meta"):
        CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


# --- what is wrong with the fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 1}, "CifarFS ways is 1; it takes a whole number, 2 or more"),
        ({"ways": 17}, "ways=17, .*train 64, validation 16, test 20; ways is at most 16"),
        ({"queries": 600}, "need 601 images of every class, and a class has 600"),
        ({"seed": -1}, "seed is -1"),
        ({"data": "/nonexistent/place"}, "data='/nonexistent/place': there is no such folder"),
        ({"data": os.path.dirname(__file__)}, "no CIFAR-100 is there; data is a folder cifar-100"),
    ],
)
def test_a_bad_field_is_an_error_when_the_source_is_built(change: dict, message: str) -> None:
    with pytest.raises(MetablocksError, match=message) as caught:
        CifarFS(**{**FIELDS, **change})
    assert isinstance(caught.value, DataError if "data" in change else TaskError)


def test_a_class_with_too_few_images_is_named_at_first_use(unpacked: Path) -> None:
    source = CifarFS(ways=5, shots=1, queries=5, data=unpacked)
    small = next(name for name in class_names(CIFAR_FS) if counted(name) == 5)
    message = rf"need 6 images of every class, and {small} \(train\) has 5; .* is at most 5"
    with pytest.raises(TaskError, match=message):
        source.sample("test", [0])
