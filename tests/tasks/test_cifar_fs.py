"""CIFAR-FS: found, read by content, downloaded, drawn; on a small data set in CIFAR-100's layout."""

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from metablocks.errors import DataError, TaskError
from metablocks.tasks import CifarFS
from metablocks.tasks.cifar_fs import _Unpickler
from metablocks.tasks.class_splits import CIFAR_FS, class_names
from metablocks.tasks.class_tasks import numbered
from tools.fuzzing.small_images import STEP, cifar_parts, counted, write_cifar

FIELDS = {"ways": 5, "shots": 1, "queries": 3}
FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"


def pack_cifar(unpacked: Path, target: Path) -> Path:
    """Write the archive of an unpacked `cifar-100-python` into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target / ARCHIVE, "w:gz") as archive:
        archive.add(unpacked / FOLDER, FOLDER)
    return target


def python_2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch as CIFAR-100's own files hold it: written by Python 2 and its numpy, protocol 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + number(images.shape[0]) + number(images.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    array += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array += b"\x89T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + listed + b"u."


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of an unpacked `cifar-100-python`; shared, so leave it as it is."""
    return write_cifar(tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def packed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the archive; shared, so leave it as it is."""
    return pack_cifar(unpacked, tmp_path_factory.mktemp("packed"))


# --- reading


def test_every_image_stands_in_its_class_and_place(unpacked: Path) -> None:
    bank = CifarFS(**FIELDS, data=unpacked).bank
    assert bank.counts == {name: counted(name) for name in class_names(CIFAR_FS)}
    assert list(bank.counts) == list(class_names(CIFAR_FS))
    assert bank.images.shape == (sum(bank.counts.values()), 3, 32, 32)
    assert bank.images.dtype == torch.uint8
    for number, images in enumerate(bank.images.split(list(bank.counts.values()))):
        assert (images[:, 0] == 2 * number).all()
        for position in range(len(images)):
            assert (images[position, 1] == STEP * position).all()
            assert (images[position, 2] == (7 if position < 3 else 9)).all()  # train, then test


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
    assert np.array_equal(bank.images[numbered(bank.counts)[name][0]].numpy(), image)


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
    names = class_names(CIFAR_FS)
    for split, pool in source.pools.items():
        inputs, _ = source.sample(split, range(120)).query
        assert inputs.shape == (120, 15, 3, 32, 32)
        codes = (inputs[:, :, 0, 0, 0] * 255).round().long() // 2
        assert set(codes.flatten().tolist()) == {
            names.index(name) for name in pool.names
        }  # 600 draws miss no class


# --- pickles


class Asks:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load])
def test_a_pickle_that_asks_for_code_is_refused_and_the_code_not_run(
    tmp_path: Path, protocol: int, function: Callable[..., object]
) -> None:
    content = pickle.dumps({"data": Asks(function, str(tmp_path / "made"))}, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for .*only plain values"):
        _Unpickler(io.BytesIO(content)).load()
    assert not list(tmp_path.iterdir())


def test_arrays_of_objects_are_refused() -> None:
    content = pickle.dumps(np.array([{}], dtype=object))
    with pytest.raises(pickle.UnpicklingError, match="Python objects"):
        _Unpickler(io.BytesIO(content)).load()


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
        (with_text_for_a_pickle, "cannot be read as CIFAR-100"),
        (with_a_truncated_pickle, "cannot be read as CIFAR-100"),
        (rewrite("test", data=None), r"cannot be read as CIFAR-100 \(KeyError: 'data'"),
        (rewrite("train", fine_labels=[0]), "cannot be read as CIFAR-100"),
        (rewrite("train", fine_labels=[100] * 300), "cannot be read as CIFAR-100"),
        (rewrite("train", fine_labels=["cat"] * 300), "cannot be read as CIFAR-100"),
        (rewrite("test", data=np.zeros((2, 3072))), "labels for images of float64"),
        (rewrite("meta", fine_label_names=7), "cannot be read as CIFAR-100"),
        (with_a_class_misnamed, 'the 16 classes of validation; missing: beaver; did you mean "beavers"'),
        (with_a_class_left_out, "holds 19 of the 20 classes of test; missing: worm"),
    ],
)  # fmt: skip
def test_damaged_data_is_an_error_that_names_the_folder(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(write_cifar(tmp_path))
    with pytest.raises(DataError, match=f"{FOLDER}: .*{message}"):
        CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


def test_a_damaged_archive_is_an_error_that_names_it(packed: Path, tmp_path: Path) -> None:
    content = (packed / ARCHIVE).read_bytes()
    for damaged in (content[: len(content) // 2], content[:10], b"", b"no archive" * 99):
        (tmp_path / ARCHIVE).write_bytes(damaged)
        with pytest.raises(DataError, match=r"python\.tar\.gz: cannot be read as CIFAR-100"):
            CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


def test_an_archive_without_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / FOLDER / "meta").unlink()
    pack_cifar(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"tar\.gz: cannot be read as CIFAR-100 .*'meta'"):
        CifarFS(**FIELDS, data=tmp_path).sample("train", [0])


# --- what is wrong with the fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 1}, "CifarFS ways is 1; it takes a whole number, 2 or more"),
        ({"ways": 17}, "ways is 17, .*train 64, validation 16, test 20; ways is at most 16"),
        ({"queries": 600}, "need 601 examples of every class, and a class has 600"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_field_is_an_error_when_the_source_is_built(change: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        CifarFS(**{**FIELDS, **change})


def test_a_class_with_too_few_images_is_named_at_first_use(unpacked: Path) -> None:
    source = CifarFS(ways=5, shots=1, queries=5, data=unpacked)
    small = next(name for name in class_names(CIFAR_FS) if counted(name) == 5)
    message = rf"need 6 examples of every class, and {small} of train has 5; .* at most 5"
    with pytest.raises(TaskError, match=message):
        _ = source.checksum
