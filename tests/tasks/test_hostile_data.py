"""Data that is damaged or made to harm: one clear `DataError` line each, and nothing is waited for."""

import os
import random
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metablocks.errors import DataError, MetablocksError
from metablocks.tasks import CifarFS, Classes, Folders, MiniImagenet, Omniglot, storage
from metablocks.tasks.image_sets import FORMAT, Bank, cached
from metablocks.tasks.storage import read_file, unzipped
from tools.fuzzing.small_images import draw_mini_imagenet, write_cifar

FIELDS = {"ways": 2, "shots": 1, "queries": 1}
REMEDY = "it is damaged or of another kind: get it anew, or take it away"


def one_line(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert " at 0x" not in message
    for part in parts:
        assert part in message, message


# --- image files


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes whose header states `side` × `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


IMAGES = {
    "a bomb of 400 megapixels": (bomb(20_000), "exceeds limit"),
    "81 megapixels": (
        bomb(9_000),
        "it is 9000×9000, and images of at most 67,108,864 pixels are read: make it smaller",
    ),
    "no image": (b"a text", "its content is none of these"),
    "nothing": (b"", "its content is none of these"),
    "a header alone": (bomb(8)[:33], "cannot be read as an image"),
    "a pipe": (None, "it is a folder, pipe or device, not a file"),
}


def put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)


def folders(data: Path) -> tuple[Path, Callable[[], Folders]]:
    root = data / "folders"
    return root / "train/train ant/2.png", lambda: Folders(root, size=4, **FIELDS)


def mini(data: Path) -> tuple[Path, Callable[[], MiniImagenet]]:
    path = data / "mini_imagenet/n01532829/n0153282900000002.png"
    return path, lambda: MiniImagenet(data=data, **FIELDS)


def drawings(data: Path) -> tuple[Path, Callable[[], Omniglot]]:
    path = data / "omniglot-py/images_evaluation/Marks/character01/0014_03.png"
    return path, lambda: Omniglot(data=data, **FIELDS)


@pytest.mark.parametrize("what", IMAGES)
@pytest.mark.parametrize("where", [folders, mini, drawings])
def test_an_image_that_is_none_is_named(where, what, hostile: Path) -> None:
    content, message = IMAGES[what]
    path, make = where(hostile)
    kept = path.read_bytes()
    put(path, content)
    try:
        one_line(lambda: make().checksum, str(path), message, REMEDY)
    finally:
        put(path, kept)


@pytest.fixture(scope="module")
def hostile(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of small data sets of which a test changes a file, and puts it back."""
    parent = tmp_path_factory.mktemp("hostile")
    shutil.copytree(small_data / "folders", parent / "folders")
    shutil.copytree(small_data / "omniglot-py", parent / "omniglot-py")
    return draw_mini_imagenet(parent, images=3)


def test_grey_of_16_bits_is_not_white(hostile: Path) -> None:
    ink = np.full((105, 105), 0xFFFF, np.uint16)
    ink[20:60] = 0x00FF
    for where, image, expected in (
        (mini, np.full((84, 84), 0x80FF, np.uint16), 0x80),
        (drawings, ink, None),
    ):
        path, make = where(hostile)
        kept = path.read_bytes()
        Image.fromarray(image).save(path)
        try:
            bank = make().bank
        finally:
            path.write_bytes(kept)
        if expected is not None:
            assert (bank.images[2] == expected).all()
        else:
            number = 20 * list(bank.counts).index("images_evaluation/Marks/character01") + 2
            assert 0.3 < bank.images[number].float().mean() / 255 < 0.5


# --- zip archives


def flag(content: bytearray, at: int, value: int) -> None:
    """Change a 16-bit field of the first member, in its own header and in the directory's."""
    directory = content.index(b"PK\x01\x02")
    content[at : at + 2] = content[directory + at + 2 : directory + at + 4] = struct.pack(
        "<H", value
    )


def with_a_name_that_is_no_text(content: bytearray) -> None:
    directory = content.index(b"PK\x01\x02")
    flag(content, 6, 0x800)
    content[30] = content[directory + 46] = 0xFF


def with_a_member_of_a_gigabyte(content: bytearray) -> None:
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 2**30)


ZIPS = {
    "encrypted": (lambda c: flag(c, 6, 1), "encrypted"),
    "packed by an unknown method": (lambda c: flag(c, 8, 99), "compression"),
    "no text": (with_a_name_that_is_no_text, "utf-8"),
    "a gigabyte": (with_a_member_of_a_gigabyte, "1,073,741,824 bytes, and at most 268,435,456"),
    "cut off": (lambda c: c.__delitem__(slice(200, None)), "not a zip file"),
    "no directory": (lambda c: c.__setitem__(slice(-22, None), bytes(22)), "not a zip file"),
    "another sum": (lambda c: flag(c, 14, 1), "CRC"),
}


@pytest.mark.parametrize("what", ZIPS)
def test_an_archive_that_is_none_is_named(what: str, zipped_copy: Path, cache: Path) -> None:
    path = zipped_copy / "omniglot-py/images_evaluation.zip"
    content = bytearray(path.read_bytes())
    ZIPS[what][0](content)
    path.write_bytes(content)
    for _ in range(2):  # nothing is kept that would end a later run
        one_line(
            lambda: Omniglot(data=zipped_copy, **FIELDS).checksum, str(path), ZIPS[what][1], REMEDY
        )
    assert not list(cache.glob("*"))


def test_any_bit_of_an_archive_is_whole_or_named(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.zip", random.Random(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("half/a/1.png", b"drawing" * 9)
        archive.writestr("half/é/2.png", bytes(rng.randbytes(40)))
    whole = path.read_bytes()
    with unzipped(path) as members:
        expected = {name: read() for name, read in members.items()}
    messages = []
    for bit in rng.sample(range(8 * len(whole)), 500):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are there twice
                with unzipped(path) as members:
                    assert all(member() in expected.values() for member in members.values())
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_any_bit_of_a_cached_bank_is_whole_or_read_anew(cache: Path) -> None:
    bank = Bank({"a": 2, "b": 1}, torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4))
    cached("bank", lambda: bank)
    path = cache / f"bank-{FORMAT}.npz"
    whole, rng = path.read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(whole)), 150):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = cached("bank", lambda: bank)
        assert got.counts == bank.counts
        assert torch.equal(got.images, bank.images)


def test_what_is_remembered_is_checked_before_it_is_believed(hostile: Path, cache: Path) -> None:
    checksum = Folders(hostile / "folders", size=4, **FIELDS).checksum
    (remembered,) = cache.glob("*.sha256")
    whole = remembered.read_bytes()
    for content in (b"", whole[:40], whole[:64], b"0" + whole[1:], b"\xff" * 64, None):
        put(remembered, content)
        if content is None:
            cached("bank", lambda: Bank({"a": 1}, torch.zeros(1, 1, 4, 4, dtype=torch.uint8)))
            put(cache / f"bank-{FORMAT}.npz", None)
            assert cached("bank", lambda: Bank({"b": 1}, torch.ones(1, 1, 4, 4))).counts == {"b": 1}
        assert Folders(hostile / "folders", size=4, **FIELDS).checksum == checksum


# --- others


def test_a_member_of_cifar_is_looked_at_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path)
    (tmp_path / "cifar-100-python").rename(tmp_path / "x")
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x", "cifar-100-python")
    monkeypatch.setattr("metablocks.tasks.cifar_fs.FILE_LIMIT", 1000)
    one_line(
        lambda: CifarFS(data=tmp_path, **FIELDS).checksum,
        "cifar-100-python.tar.gz",
        "at most 1,000 are read",
        REMEDY,
    )


def test_the_size_of_a_file_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**30)
    one_line(lambda: read_file(path, "a text"), str(path), "1,073,741,824 bytes", REMEDY)
    assert storage.FILE_LIMIT < 2**30


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("splits.yaml", lambda path: Folders(path.parent, size=4, splits=path, **FIELDS)),
        ("tensors.pt", lambda path: Classes(file=path, **FIELDS)),
        ("mini_imagenet/val.csv", lambda path: MiniImagenet(data=path.parent, **FIELDS).checksum),
        ("cifar-100-python/meta", lambda path: CifarFS(data=path.parent, **FIELDS).checksum),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(file, make, tmp_path: Path) -> None:
    draw_mini_imagenet(tmp_path, "tables", images=2)
    write_cifar(tmp_path)
    path = tmp_path / file
    put(path, None)
    with pytest.raises(MetablocksError, match=r"pipe or device|no CIFAR-100 is there"):
        make(path)


@pytest.mark.parametrize("content", [b"", b"no file of tensors", b"PK\x03\x04" + bytes(40)])
def test_a_file_of_tensors_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tensors.pt"
    path.write_bytes(content)
    one_line(
        lambda: Classes(file=path, **FIELDS), str(path), "cannot be read as torch.save", REMEDY
    )
    torch.save({"train": {"a": [1, 2]}}, path)
    one_line(lambda: Classes(file=path, **FIELDS), str(path), "it takes a dict {split")
    torch.save({"train": Path}, path)  # what would run code
    one_line(lambda: Classes(file=path, **FIELDS), str(path))
