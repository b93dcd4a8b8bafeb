"""CUB and tieredImageNet: layouts, splits, and what is wrong with them; on small made copies."""

import shutil
from pathlib import Path

import pytest
import torch

from metablocks.errors import DataError, TaskError
from metablocks.laws import sources
from metablocks.tasks import CUB, TieredImagenet
from tools.fuzzing.small_images import draw_birds, draw_tiered_imagenet

FIELDS = {"ways": 5, "shots": 1, "queries": 3, "size": 4}


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    return draw_birds(tmp_path / "birds", images=4)


@pytest.fixture
def tiered(tmp_path: Path) -> Path:
    return draw_tiered_imagenet(tmp_path / "lists", images=1, lists=True)


def test_every_second_bird_trains_and_the_others_validate_and_test_by_turns(birds: Path) -> None:
    source = CUB(**FIELDS, data=birds)
    numbers = {s: [int(name[:3]) - 1 for name in pool.names] for s, pool in source.pools.items()}
    assert numbers["train"] == list(range(0, 200, 2))
    assert numbers["validation"] == list(range(1, 200, 4))
    assert numbers["test"] == list(range(3, 200, 4))
    sources.splits_are_apart(source)
    red = (source.sample("test", range(9)).query[0][:, :, 0, 0, 0] * 255).round()
    assert set(red.flatten().tolist()) <= set(numbers["test"])
    assert CUB(**FIELDS, data=birds / "CUB_200_2011").checksum == source.checksum


def test_tiered_imagenet_is_the_same_by_folders_and_by_lists(tmp_path: Path, tiered: Path) -> None:
    fields = {**FIELDS, "queries": 1, "unlabelled": True, "query_transform": torch.clone}
    by_list = TieredImagenet(**fields, data=tiered)
    by_folder = TieredImagenet(**fields, data=draw_tiered_imagenet(tmp_path, images=1))
    assert {s: len(pool.names) for s, pool in by_list.pools.items()} == by_list.sizes
    assert by_list.checksum == by_folder.checksum
    one, other = (source.sample("test", [3]).query[0] for source in (by_list, by_folder))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bird", r"holds train 100, validation 50, test 49 classes; CUB-200-2011 has train 100"),
        ("class", r"images: holds 159 of the 160 classes of test; missing: n00000607"),
        ("empty", r"n00000607: holds no image; images end in"),
        ("list", r"val\.csv: cannot be read as a list of classes.*utf-8.*get it anew"),
        ("short", r"holds train 351, validation 97, test 159 classes; tieredImageNet has"),
        ("twice", r'the class "n00000350" of train is "n00000350" of test, too'),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    birds: Path, tiered: Path, what: str, message: str
) -> None:
    root = tiered / "tiered_imagenet"
    match what:
        case "bird":
            shutil.rmtree(birds / "CUB_200_2011" / "images" / "200.Bird")
        case "class":
            shutil.rmtree(root / "images" / "n00000607")
        case "empty":
            (root / "images" / "n00000607" / "0.png").unlink()
        case "list":
            (root / "val.csv").write_bytes(b"\xff\xfe,n\n")
        case "short":
            text = (root / "test.csv").read_text()
            (root / "test.csv").write_text(text.replace("n00000607,n00000000\n", ""))
        case "twice":
            text = (root / "test.csv").read_text()
            (root / "test.csv").write_text(text.replace("n00000607", "n00000350"))
    block, data = (CUB, birds) if what == "bird" else (TieredImagenet, tiered)
    with pytest.raises((DataError, TaskError), match=message) as caught:
        block(**FIELDS, data=data).sample("train", [0])
    assert "\n" not in str(caught.value)
