"""A small data set in Omniglot's layout, and a cache folder that is not the user's."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SMALL = {
    "images_background": {"Runes": 6, "Glyphs": 7},
    "images_evaluation": {"Marks": 8},
}
"""{half: {alphabet: characters}}: 13 + 8 characters by 20 drawers."""


def _draw(rng: np.random.Generator, base: np.ndarray) -> Image.Image:
    """One drawing: a few thick dark lines of the character, moved by the drawer."""
    paper = np.ones((105, 105), dtype=bool)
    for row, column in base + rng.integers(-4, 5, size=(1, 2)):
        paper[row : row + 3, column : column + 40] = False
        paper[row : row + 40, column : column + 3] = False
    return Image.fromarray(paper).convert("1")


@pytest.fixture(scope="session")
def small_unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of an unpacked `omniglot-py`; shared by the tests, so leave it as it is."""
    parent = tmp_path_factory.mktemp("unpacked")
    rng = np.random.default_rng(0)
    character = 0
    for half, alphabets in SMALL.items():
        for alphabet, characters in alphabets.items():
            for number in range(1, characters + 1):
                character += 1
                folder = parent / "omniglot-py" / half / alphabet / f"character{number:02d}"
                folder.mkdir(parents=True)
                base = rng.integers(10, 55, size=(3, 2))
                for drawer in range(1, 21):
                    _draw(rng, base).save(folder / f"{character:04d}_{drawer:02d}.png")
    return parent


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
