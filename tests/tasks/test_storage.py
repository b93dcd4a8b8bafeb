"""Storage: search, download and cache, with data sets made up here and the layouts of the three sets."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from metablocks.errors import DataError
from metablocks.tasks import CifarFS, MiniImagenet, Omniglot, cifar_fs
from metablocks.tasks.image_sets import FORMAT, Bank, cached
from metablocks.tasks.storage import Storage, fingerprint

FIELDS = {"ways": 5, "shots": 1, "queries": 3}
SETS = {
    "omniglot-py": (Omniglot, "Omniglot"),
    "mini_imagenet": (MiniImagenet, "mini-ImageNet"),
    "cifar-100-python": (CifarFS, "CIFAR-100"),
}


def fetch(folder: Path) -> None:
    (folder / "set").write_text("downloaded")


def unreachable(folder: Path) -> None:
    raise OSError("name or service not known")


# --- finding


def test_data_comes_before_the_environment_and_that_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage("Set", "a file set", ("set",), Path.is_file)
    data, environment = tmp_path / "data", tmp_path / "environment"
    assert storage.find() is None
    for folder in (cache, environment, data):
        folder.mkdir()
        (folder / "set").touch()
    assert storage.find() == cache / "set"
    monkeypatch.setenv("METABLOCKS_DATA", str(environment))
    assert storage.find() == environment / "set"
    assert storage.find(str(data)) == data / "set"


@pytest.mark.parametrize("folder", SETS)
def test_data_names_the_parent_or_the_folder_itself(folder: str, small_data: Path) -> None:
    source, name = SETS[folder]
    source(**FIELDS, data=small_data)
    source(**FIELDS, data=str(small_data / folder))
    for data, message in (
        (Path(__file__).parent, f"no {name} is there"),
        ("/no", "no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            source(**FIELDS, data=data)


@pytest.mark.parametrize(
    ("storage", "parts"),
    [
        (
            Storage("Set", "a file set", ("set",), Path.is_file, unreachable),
            ("network", "service not known"),
        ),
        (
            Storage("Set", "a file set", ("set",), Path.is_file, lambda folder: None),
            ("download is incomplete",),
        ),
        (
            Storage("Set", "a file set", ("set",), Path.is_file, terms="by its terms"),
            ("by its terms", "Get it"),
        ),
    ],
)
def test_neither_data_nor_download_is_one_error_that_says_what_works(
    cache: Path, storage: Storage, parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught, storage.located(None):
        pass
    message = str(caught.value)
    for part in (*parts, str(cache), "--data FOLDER", "METABLOCKS_DATA", "a file set"):
        assert part in message
    assert "\n" not in message
    assert not cache.exists() or not list(cache.iterdir())


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with (
        pytest.raises(DataError, match="gone: cannot be read"),
        Storage("Set", "a file set", ("set",), Path.is_file).located(tmp_path) as place,
    ):
        fingerprint(tmp_path, [place.with_name("gone")])


def test_a_download_is_kept_for_the_next_time(cache: Path) -> None:
    with Storage("Set", "a file set", ("set",), Path.is_file, fetch, keep=("set",)).located(
        None
    ) as place:
        assert place.read_text() == "downloaded"
    with Storage("Set", "a file set", ("set",), Path.is_file, unreachable).located(None) as place:
        assert place == cache / "set"
    assert [path.name for path in cache.iterdir()] == ["set"]


def test_torchvision_is_asked_for_what_its_data_sets_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = cifar_fs.torchvision_module("datasets")
    asked = []
    monkeypatch.setattr(datasets.utils, "download_url", lambda *a, **k: asked.append(a))
    CifarFS.storage.fetch(tmp_path)
    ((url, root, file, md5),) = asked
    assert url.endswith(file)
    assert (root, file) == (str(tmp_path), cifar_fs.ARCHIVE)
    assert md5 == datasets.CIFAR100.tgz_md5
    monkeypatch.setattr(datasets.Omniglot, "__init__", lambda self, root, **k: asked.append(k))
    Omniglot.storage.fetch(tmp_path)
    assert asked[1:] == [{"background": half, "download": True} for half in (True, False)]


# --- the cache


@pytest.fixture
def bank() -> Bank:
    images = torch.arange(5 * 4 * 4, dtype=torch.uint8).view(5, 1, 4, 4)
    return Bank({"a": 3, "b": 2}, images)


def test_a_cached_bank_is_loaded_without_reading(cache: Path, bank: Bank) -> None:
    assert cached("bank", lambda: bank) is bank
    loaded = cached("bank", lambda: pytest.fail("read again"))
    assert (loaded.checksum, loaded.counts) == (bank.checksum, bank.counts)
    assert torch.equal(loaded.images, bank.images)


@pytest.mark.parametrize("damage", ["truncated", "images", "counts"])
def test_a_damaged_cached_bank_is_read_anew(cache: Path, bank: Bank, damage: str) -> None:
    cached("bank", lambda: bank)
    path = cache / f"bank-{FORMAT}.npz"
    content = path.read_bytes()
    if damage in ("images", "counts"):
        with np.load(path) as stored:
            changed = dict(stored)
        changed[damage].flat[0] ^= 3
        np.savez(path, **changed)
    else:
        path.write_bytes(content[: len(content) // 2])
    assert cached("bank", lambda: bank) is bank
    assert path.read_bytes() == content
    assert not list(cache.glob("*.part"))


def test_a_cache_folder_that_cannot_be_written_is_not_an_error(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file in the place of the cache folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("bank", lambda: bank) is bank


def test_a_fingerprint_tells_texts_archives_names_and_sizes_apart(tmp_path: Path) -> None:
    file, archive = tmp_path / "a", tmp_path / "b.zip"
    file.write_text("x")
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("c", "x")
    states = [fingerprint(tmp_path, ["class", file, archive])]
    states.append(fingerprint(tmp_path, ["other class", file, archive]))
    file.write_text("xx")
    states.append(fingerprint(tmp_path, ["class", file, archive]))
    moved = Path(shutil.move(file, tmp_path / "d"))
    states.append(fingerprint(tmp_path, ["class", moved, archive]))
    archive.write_bytes(archive.read_bytes() + b"x")
    states.append(fingerprint(tmp_path, ["class", moved, archive]))
    assert len(set(states)) == 5
