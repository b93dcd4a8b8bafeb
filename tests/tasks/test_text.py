"""Tasks of documents: what is read, what a task is, and faults."""

import copy
import math
import os
import pickle

import pytest
import torch

from metablocks.errors import DataError, RecipeError, TaskError
from metablocks.losses import cross_entropy
from metablocks.recipe import build, from_text, load
from metablocks.runs.scores import score
from metablocks.tasks import Text
from metablocks.tasks.base import SPLITS
from metablocks.verify import verify

SMALL = {"length": 5, "shots": 2, "queries": 1}


@pytest.fixture
def root(tmp_path):
    """40 documents of 40 bytes, its number and a counter by turns, at two depths; and others."""
    for number in range(40):
        folder = tmp_path / ("deep" if number % 2 else "")
        folder.mkdir(exist_ok=True)
        content = bytes(byte for place in range(20) for byte in (number, 100 + place))
        (folder / f"{number:02}.txt").write_bytes(content)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / ".hidden.txt").write_text("." * 40)
    (tmp_path / "other.md").write_text("#" * 40)
    return tmp_path


def windows(task):
    """The bytes of each window of a task: its inputs, and the last target."""
    for inputs, targets in (task.support, task.query):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for row, target in zip(inputs, targets, strict=True):
            yield bytes([*row.tolist(), int(target[-1])])


def test_a_task_is_one_document_of_which_no_byte_comes_twice(root):
    source = Text(folder=root, files="*.txt", **SMALL)
    assert {name for names in source.documents.values() for name in names} == {
        f"{'deep/' if number % 2 else ''}{number:02}.txt" for number in range(40)
    }
    seen = {}
    for split in SPLITS:
        count = len(source.documents[split])
        batch = source.sample(split, range(2 * count))
        numbers = []
        for index in range(len(batch)):
            found = list(windows(batch[index]))
            assert len(found) == 3
            counters = [byte for window in found for byte in window if byte >= 100]
            assert len(set(counters)) == len(counters)
            (number,) = {byte for window in found for byte in window if byte < 100}
            numbers.append(number)
        # Every document once, in an order of its own, and then every document once more.
        assert len(set(numbers[:count])) == len(set(numbers[count:])) == count
        seen[split] = set(numbers)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 40
    assert len(seen["train"]) > 30


def test_the_checksum_is_of_names_and_contents(root):
    def checksum(**fields):
        return Text(folder=root, files="*.txt", **SMALL, **fields).checksum

    before = checksum()
    assert checksum(seed=3) == before
    assert checksum(splits=(0.5, 0.25, 0.25)) != before
    (root / "00.txt").write_text("x" * 41)
    assert checksum() != before


def test_the_library_is_there_with_python_sources_and_without_its_tests():
    source = Text(length=16, shots=1, queries=1)
    names = [name for listed in source.documents.values() for name in listed]
    assert len(names) > 300
    assert all(name.endswith(".py") and "test" not in name.split("/") for name in names)
    assert not any("site-packages" in name for name in names)
    assert "argparse.py" in names
    again = pickle.loads(pickle.dumps(source)).sample("test", [3])
    assert torch.equal(again.support[0], source.sample("test", [3]).support[0])


def test_of_a_large_document_its_windows_are_read(root):
    with (root / "large").open("wb") as file:
        file.truncate(2**36)  # of zeros, which take no place
    stream = {"length": 16, "shots": 4, "queries": 4, "chunks": 3}
    source = Text(folder=root, files="large", splits=(1.0, 0.0, 0.0), **stream)
    assert not source.sample("train", range(3)).query[0].any()


def test_names_need_be_no_utf_8(root):
    for number in range(4):
        (root / os.fsdecode(b"caf\xe9%d.txt" % number)).write_bytes(b"x" * 40)
    source = Text(folder=root, files="caf*", splits=(0.5, 0.25, 0.25), **SMALL)
    assert source.checksum
    assert [source.sample(split, [0]).query[0].shape[0] for split in SPLITS] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"length": 500}, TaskError, "no document of train has 3 windows of 500 \\+ 1 bytes"),
        ({"files": "*.rst"}, TaskError, "no document of train"),
        ({"splits": (1.0, 0.0, 0.1)}, TaskError, "three shares"),
    ],
)
def test_what_makes_no_tasks_is_refused(fields, error, message, root):
    with pytest.raises(error, match=message):
        Text(**{"folder": root, **SMALL, **fields}).sample("train", [0])


def test_a_folder_that_is_not_there_and_a_document_that_has_gone_are_named(root):
    with pytest.raises(TaskError, match="there is no such folder"):
        Text(folder=root / "no")
    source = Text(folder=root, files="*.txt", splits=(1.0, 0.0, 0.0), **SMALL)
    assert len(source.documents["train"]) == 40
    (root / "00.txt").unlink()
    with pytest.raises(DataError, match=r"00\.txt: cannot be read"):
        source.sample("train", range(40))
    (root / "00.txt").write_text("gone")
    with pytest.raises(DataError, match=r"00\.txt: has become shorter"):
        source.sample("train", range(40))


@pytest.mark.parametrize("model", ["{block: gru, width: 4}", "{block: transformer, width: 8}"])
def test_scores_of_text_are_bits_per_byte(model):
    """A net whose scores are all 0 needs 8 bits for a byte."""
    tasks = "{block: text, length: 8, shots: 1, queries: 1}"
    recipe = load(
        "maml_strokes", [f"tasks={tasks}", f"model={model}", "hardware.executor.block=loop"]
    )
    experiment = build(recipe, device="cpu")
    assert experiment.kind == "text"
    learner = experiment.learner
    for parameter in learner.model.head.parameters():
        torch.nn.init.zeros_(parameter)
    scores = score(learner, experiment.source, "validation", tasks=3, steps=0)
    assert scores.measure == "bits"
    assert scores.text(0) == "8.0000 ± 0.0000"
    assert from_text(recipe.to_yaml()).hash == recipe.hash


def test_the_loss_is_the_mean_over_bytes_of_the_log_probability():
    scores, targets = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    logs = scores.log_softmax(-1)
    expected = -sum(logs[i, j, targets[i, j]] for i in range(2) for j in range(3)) / 6
    torch.testing.assert_close(cross_entropy(kind="text")(scores, targets), expected)


STREAM = {"length": 4, "shots": 2, "queries": 2, "chunks": 2}


def test_a_stream_is_a_passage_of_a_document_in_its_order(root):
    source = Text(folder=root, files="*.txt", **STREAM)
    documents = [(root / name).read_bytes() for name in source.documents["train"]]
    places = set()
    for task in map(source.sample("train", range(60)).__getitem__, range(60)):
        inputs, targets = task.query
        assert inputs.shape == targets.shape == (3, 2, 4)
        assert torch.equal(inputs[..., 1:], targets[..., :-1])
        passage = bytes(torch.cat([inputs, targets[..., -1:]], -1).flatten().tolist())
        (place,) = {document.find(passage) for document in documents} - {-1}
        places.add(place)
        for adapted_to, judged in zip(task.support, task.query, strict=True):
            assert torch.equal(adapted_to, judged[:-1])
    assert len(places) > 5  # of the 11 at which a passage of 30 of 40 bytes begins
    report = verify(source, examples=2)
    assert report.ok, report


def test_a_chunk_is_judged_before_it_is_adapted_to(root):
    """Bits per byte at carry k, by a plain loop: of chunk k, with the weights after chunks 0 … k − 1."""
    changes = [f"tasks.{name}={value}" for name, value in STREAM.items()]
    changes += [f"tasks.folder={root}", 'tasks.files="*.txt"', "tasks.splits=[0.4, 0.3, 0.3]"]
    changes += [
        "model.width=8",
        "inner.steps=2",
        "evaluation.inner_steps=2",
        "inner.rule[0].init=0.25",
    ]
    experiment = build(load("ttt_text", [*changes, "hardware.precision=float64"]), device="cpu")
    learner, task = experiment.learner, experiment.source.sample("test", [0])[0]
    net, bits = copy.deepcopy(learner.model), []
    moved = [p for name, p in net.named_parameters() if name.startswith("body.block1.mlp.")]
    for inputs, targets in zip(*task.query, strict=True):
        loss = cross_entropy(kind="text")(net(inputs), targets)
        bits.append(loss.item() / math.log(2))
        for parameter, slope in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            parameter.data -= 0.25 * slope
    assert len(moved) == 4
    dtype = torch.float64
    scores = score(learner, experiment.source, "test", tasks=1, dtype=dtype)
    assert scores.mean == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["tasks.chunks=null"],
            "inner.batches: stream takes tasks with a batch for each inner step",
        ),
        (["tasks.chunks=9"], r"tasks.chunks: 9, but each of 15 inner steps .* at least 15"),
        (["inner.steps=3", "tasks.chunks=9"], "tasks.chunks: 9, but each of 15"),
        (["inner.batches={block: full_batch}"], "tasks.chunks: 15, but inner.batches is no stream"),
        (["tasks.queries=3"], "tasks.queries.*3, but a stream is judged by the 4 windows"),
    ],
)
def test_streams_and_tasks_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        build(load("ttt_text", changes))
