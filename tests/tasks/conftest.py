"""Small data sets in the layouts of the real ones, and a cache folder that is not the user's."""

import shutil
import zipfile
from pathlib import Path

import pytest

from tools.fuzzing.data import draw_folders
from tools.fuzzing.small_images import (
    draw_birds,
    draw_mini_imagenet,
    draw_omniglot,
    draw_tiered_imagenet,
    write_cifar,
)

SMALL = {
    "images_background": {"Runes": 6, "Glyphs": 7},
    "images_evaluation": {"Marks": 8},
}
"""{half: {alphabet: characters}}: 13 + 8 characters by 20 drawers."""


@pytest.fixture(scope="session")
def small_unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of an unpacked `omniglot-py`; shared by the tests, so leave it as it is."""
    return draw_omniglot(tmp_path_factory.mktemp("unpacked"), SMALL)


@pytest.fixture(scope="session")
def small_data(
    small_unpacked: Path, small_folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The parent of a small data set of every kind; shared by the tests, so leave it as it is."""
    parent = tmp_path_factory.mktemp("every-kind")
    shutil.copytree(small_folders, parent / "folders")
    shutil.copytree(small_unpacked, parent, dirs_exist_ok=True)
    draw_tiered_imagenet(draw_birds(parent))
    return write_cifar(draw_mini_imagenet(parent))


@pytest.fixture(scope="session")
def small_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of mixed sizes by split and class, 4 or 5 a class; leave them as they are."""
    return draw_folders(tmp_path_factory.mktemp("folders") / "root")


def zip_half(folder: Path, target: Path) -> None:
    """Write the archive of an unpacked half, in an order of its own."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder.parent).as_posix())


@pytest.fixture(scope="session")
def small_zipped(small_unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set as archives; shared by the tests, so leave it as it is."""
    parent = tmp_path_factory.mktemp("zipped")
    (parent / "omniglot-py").mkdir()
    for half in SMALL:
        root = small_unpacked / "omniglot-py"
        zip_half(root / half, parent / "omniglot-py" / f"{half}.zip")
    return parent


@pytest.fixture
def unpacked_copy(small_unpacked: Path, tmp_path: Path) -> Path:
    """A copy of the unpacked data set, to damage."""
    return Path(shutil.copytree(small_unpacked, tmp_path / "data"))


@pytest.fixture
def zipped_copy(small_zipped: Path, tmp_path: Path) -> Path:
    """A copy of the archived data set, to damage."""
    return Path(shutil.copytree(small_zipped, tmp_path / "data"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for the test; no data in the environment."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv("METABLOCKS_DATA", raising=False)
    return home / "metablocks"
