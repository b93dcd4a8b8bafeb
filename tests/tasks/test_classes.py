"""Tasks of tensors of one's own."""

import pytest
import torch

from metablocks.errors import TaskError
from metablocks.laws import sources
from metablocks.tasks import Classes
from metablocks.tasks.base import SPLITS
from metablocks.tasks.class_tasks import deal

EPISODES = {"ways": 2, "shots": 1, "queries": 2}


def numbered(*, examples=4, classes=3, shape=(1, 3, 3), dtype=torch.uint8):
    """Every example of every class is filled with a number of its own."""
    numbers = iter(range(1000))
    return {
        split: {
            f"{split}-{name}": torch.stack(
                [torch.full(shape, next(numbers), dtype=dtype) for _ in range(examples + name)]
            )
            for name in range(classes)
        }
        for split in SPLITS
    }


def test_a_task_holds_distinct_examples_of_distinct_classes_of_its_split():
    data = numbered(dtype=torch.float32)
    source = Classes(data, **EPISODES)
    for split in SPLITS:
        owner = {int(x.flatten()[0]): name for name, xs in data[split].items() for x in xs}
        batch = source.sample(split, range(6))
        for index in range(6):
            task = batch[index]
            inputs = torch.cat([task.support[0], task.query[0]])[:, 0, 0, 0].int().tolist()
            targets = torch.cat([task.support[1], task.query[1]]).tolist()
            assert len(set(inputs)) == 6
            of_target = {(target, owner[x]) for x, target in zip(inputs, targets, strict=True)}
            assert len(of_target) == len({name for _, name in of_target}) == 2


def test_the_order_of_the_dicts_does_not_matter_and_the_checksum_tells_data_apart():
    data = numbered()
    turned = {split: dict(reversed(tensors.items())) for split, tensors in reversed(data.items())}
    source, other = Classes(data, **EPISODES), Classes(turned, **EPISODES)
    assert source == other
    assert source.checksum == other.checksum
    assert torch.equal(source.sample("test", [3]).query[0], other.sample("test", [3]).query[0])
    data["test"]["test-0"][0, 0, 0, 0] += 1
    assert Classes(data, **EPISODES) != source


def test_a_file_of_tensors_is_as_good_as_the_tensors(tmp_path):
    torch.save(numbered(), tmp_path / "tensors.pt")
    source = Classes(file=str(tmp_path / "tensors.pt"), **EPISODES)
    assert source == Classes(numbered(), **EPISODES)
    with pytest.raises(TaskError, match="a dict of tensors, or else the file of one"):
        Classes(numbered(), file=tmp_path / "tensors.pt", **EPISODES)


def test_only_training_tasks_rotate_and_support_and_query_alike():
    corner = torch.zeros(4, 1, 3, 3)
    corner[:, 0, 0, 0] = 1
    data = {split: {f"{split}{n}": corner + n for n in range(2)} for split in SPLITS}
    source = Classes(data, **EPISODES, rotate=True)
    for split in SPLITS:
        batch = source.sample(split, range(20))
        turns = batch.support[0].flatten(2).argmax(-1)  # [tasks, ways]
        assert torch.equal(turns.repeat_interleave(2, 1), batch.query[0].flatten(2).argmax(-1))
        assert set(turns.flatten().tolist()) == ({0, 2, 6, 8} if split == "train" else {0})


def test_tokens_stay_whole_numbers_and_bytes_become_shares():
    tokens = Classes(numbered(shape=(7,), dtype=torch.int64), **EPISODES)
    assert tokens.sample("train", [0]).support[0].dtype == torch.int64
    assert tokens.input_shape == (7,)
    sources.fits_its_description(tokens)
    data = numbered()
    data["train"]["train-0"][:] = 255
    assert Classes(data, **EPISODES).sample("train", range(9)).support[0].max() == 1


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda d: d.clear(), {}, "Classes classes is {}; it takes a dict"),
        (lambda d: d["test"].clear(), {}, "test holds no class"),
        (lambda d: d.update(valid={}), {}, "it takes a dict {split: {class: tensor}}"),
        (lambda d: d["test"].update(a=torch.zeros(5, 1, 3, 3)), {}, "a of test, .*one shape and"),
        (lambda d: d["test"].update(a=torch.zeros(0, 1, 3, 3)), {}, "one example at least"),
        (lambda d: d["test"].update({"Train-0": d["test"]["test-0"]}), {}, "classes of its own"),
        (lambda d: d.pop("test"), {}, "no classes of test; there are those of train, validation"),
        (lambda d: d["test"].popitem(), {"ways": 3}, "test 2; ways is at most 2"),
        (lambda d: None, {"queries": 4}, "test-0 of test has 4; shots \\+ queries is at most 4"),
    ],
)
def test_what_cannot_be_is_refused(change, options, message):
    data = numbered()
    change(data)
    with pytest.raises(TaskError, match=message) as caught:
        Classes(data, **{**EPISODES, **options}).sample("test", [0])
    assert caught.value.block == "Classes"


def test_classes_are_dealt_by_their_names():
    names = [f"class {n}" for n in range(50)]
    dealt = deal(names, (0.6, 0.2, 0.2))
    assert dealt == deal(reversed(names), (0.6, 0.2, 0.2))
    assert [len(dealt[split]) for split in SPLITS] == [30, 10, 10]
    assert sorted(name for part in dealt.values() for name in part) == sorted(names)
