"""The real Omniglot, where it lies beside the repository: counts, checksum, torchvision's reading."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from metablocks.tasks import Omniglot
from metablocks.tasks.class_tasks import numbered
from metablocks.tasks.omniglot import CHECKSUM
from metablocks.torchvision_import import torchvision_module

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "omniglot-py").is_dir(), reason="the real Omniglot: …/shared/data absent"
)
FIELDS = {"ways": 5, "shots": 1, "queries": 15}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for this file's tests, so that the drawings are decoded once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def source(kept: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Omniglot:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    return Omniglot(**FIELDS, data=DATA, device=device)


def test_it_holds_1623_characters_by_20_drawers_and_the_known_bytes(source: Omniglot) -> None:
    assert source.bank.images.shape == (1623 * 20, 1, 28, 28)
    assert source.checksum == CHECKSUM
    sizes = {split: len(pool.names) for split, pool in source.pools.items()}
    assert sizes == {"train": 1150, "validation": 50, "test": 423}
    original = Omniglot(**FIELDS, split="original", data=DATA)
    sizes = {split: len(pool.names) for split, pool in original.pools.items()}
    assert sizes == {"train": 914, "validation": 50, "test": 659}


def test_the_test_characters_never_change(source: Omniglot) -> None:
    names = "\n".join(source.pools["test"].names)
    assert hashlib.sha256(names.encode()).hexdigest() == (
        "7c81bc8de2e9addb621d13a5247c4dc7ebec0f93d099df73153e80fa736abb86"
    )


def test_ink_is_one(source: Omniglot) -> None:
    images = source.bank.images
    assert images.max() == 255
    assert 0.07 < images.float().mean() / 255 < 0.09
    assert (images.flatten(1).max(dim=-1).values > 60).all()  # no drawing is blank


def test_drawings_are_those_that_torchvision_reads(
    source: Omniglot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphabets = {"images_background": "Early_Aramaic", "images_evaluation": "Angelic"}
    dataset = torchvision_module("datasets").Omniglot
    monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)  # the MD5 of its archive
    for half, alphabet in alphabets.items():
        with zipfile.ZipFile(DATA / "omniglot-py" / f"{half}.zip") as archive:
            prefix = f"{half}/{alphabet}/"
            names = [name for name in archive.namelist() if name.startswith(prefix)]
            archive.extractall(tmp_path / "omniglot-py", names)
        read = dataset(tmp_path, background=half == "images_background", download=False)
        assert len(read) == len(names) > 0
        for position in range(0, len(read), 17):
            image, character = read[position]
            name = f"{half}/{read._characters[character]}".replace("\\", "/")
            drawer = int(Path(read._flat_character_images[position][0]).stem[-2:])
            ink = 1 - np.asarray(image, dtype=np.float64) / 255
            fine = ink.repeat(4, axis=0).repeat(4, axis=1)
            expected = 255 * fine.reshape(28, 15, 28, 15).mean(axis=(1, 3))
            stored = source.bank.images[numbered(source.bank.counts)[name][drawer - 1], 0]
            assert np.abs(stored.cpu().numpy() - expected).max() <= 0.5 + 1e-9
