"""The law of `TaskSource`, for every source: a task is a function of (fields, seed, split, index)."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from metablocks.errors import TaskError
from metablocks.laws.table import LAWS
from metablocks.tasks import (
    CUB,
    CifarFS,
    Classes,
    Episodes,
    Folders,
    Linear,
    Logistic,
    MiniImagenet,
    Mix,
    Omniglot,
    Sinusoid,
    Strokes,
    TaskSource,
    Text,
    TieredImagenet,
)
from metablocks.tasks.base import SPLITS, Split, example_shapes
from metablocks.types import Task, TaskBatch
from metablocks.verify import verify


def bytes_by_class() -> dict[Split, dict[str, torch.Tensor]]:
    """Random images, 4 to 6 of each of 4 classes a split."""
    rng = np.random.default_rng(0)
    return {
        split: {
            f"{split}{n}": torch.from_numpy(rng.integers(0, 256, (4 + n % 3, 1, 4, 4), np.uint8))
            for n in range(4)
        }
        for split in SPLITS
    }


LABELLED = [
    (image, name)
    for tensors in bytes_by_class().values()
    for name, images in tensors.items()
    for image in images
]

MAKERS = {
    "sinusoid": lambda seed, device, data: Sinusoid(seed=seed, device=device),
    "linear": lambda seed, device, data: Linear(shots=2, queries=3, seed=seed, device=device),
    "logistic": lambda seed, device, data: Logistic(
        shots=2, queries=3, dim=2, seed=seed, device=device
    ),
    "strokes": lambda seed, device, data: Strokes(
        ways=3, shots=1, queries=2, seed=seed, device=device
    ),
    "omniglot": lambda seed, device, data: Omniglot(
        ways=2, shots=1, queries=3, seed=seed, device=device, data=data
    ),
    "mini_imagenet": lambda seed, device, data: MiniImagenet(
        ways=3, shots=1, queries=2, seed=seed, device=device, data=data
    ),
    "cifar_fs": lambda seed, device, data: CifarFS(
        ways=3, shots=1, queries=2, seed=seed, device=device, data=data
    ),
    "tiered_imagenet": lambda seed, device, data: TieredImagenet(
        ways=3, shots=1, queries=2, size=8, seed=seed, device=device, data=data
    ),
    "cub": lambda seed, device, data: CUB(
        ways=3, shots=1, queries=2, size=8, seed=seed, device=device, data=data
    ),
    "classes": lambda seed, device, data: Classes(
        bytes_by_class(), ways=3, shots=1, queries=2, rotate=True, seed=seed, device=device
    ),
    "episodes": lambda seed, device, data: Episodes(
        LABELLED, splits=(0.34, 0.33, 0.33), ways=3, shots=1, queries=2, seed=seed, device=device
    ),
    "mix": lambda seed, device, data: Mix(
        [
            Strokes(ways=3, shots=1, queries=2, size=8, pen=(pen, pen), seed=seed, device=device)
            for pen in (0.4, 0.8)
        ],
        seed=seed,
    ),
    "text": lambda seed, device, data: Text(length=8, shots=1, queries=2, seed=seed, device=device),
    "folders": lambda seed, device, data: Folders(
        Path(data, "folders"), size=8, ways=3, shots=1, queries=2, seed=seed, device=device
    ),
}


TASK_LAWS = [law.name for law in LAWS["tasks"]]
Make = Callable[[int], TaskSource]


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest, device: torch.device, small_data: Path) -> Make:
    """Builds the source with a seed."""
    return lambda seed: MAKERS[request.param](seed, device, small_data)


def leaves(batch: TaskBatch) -> list[torch.Tensor]:
    return pytree.tree_leaves((batch.support, batch.query))


def digest(batch: TaskBatch) -> str:
    return hashlib.sha256(
        b"".join(leaf.cpu().contiguous().numpy().tobytes() for leaf in leaves(batch))
    ).hexdigest()


@pytest.mark.parametrize("name", MAKERS)
def test_the_laws_of_sources_hold(name: str, device: torch.device, small_data: Path) -> None:
    report = verify(lambda: MAKERS[name](3, device, small_data), protocol="tasks", examples=6)
    assert [row.law for row in report.rows if row.verdict != "holds"] == [], str(report)
    assert len(report.rows) == 4


class Own:
    """A source of one's own; each test breaks one thing."""

    kind, input_shape, outputs = "classification", (2, 2), 3

    def sample(self, split: Split, indices: list[int]) -> Any:
        tasks = []
        for index in indices:
            draw = torch.Generator().manual_seed(3 * index + SPLITS.index(split))
            inputs, labels = torch.rand(9, 2, 2, generator=draw), torch.arange(9) % 3
            tasks.append(Task((inputs[:3], labels[:3]), (inputs[3:], labels[3:])))
        return TaskBatch.stack(tasks)


class OtherKind(Own):
    kind = "classfication"


class PlainList(Own):
    def sample(self, split: Split, indices: list[int]) -> Any:
        batch = super().sample(split, indices)
        return [batch[number] for number in range(len(batch))]


class Nothing(Own):
    def sample(self, split: Split, indices: list[int]) -> Any:
        return None


class FewTargets(Own):
    def sample(self, split: Split, indices: list[int]) -> Any:
        batch = super().sample(split, indices)
        return TaskBatch(batch.support, (batch.query[0], batch.query[1][:, :4]))


class NotFinite(Own):
    def sample(self, split: Split, indices: list[int]) -> Any:
        batch = super().sample(split, indices)
        for inputs in (batch.support[0], batch.query[0]):
            inputs[:, 0, 0, 0] = torch.nan
        return batch


class WithGradient(Own):
    def sample(self, split: Split, indices: list[int]) -> Any:
        (support, labels), query = (
            super().sample(split, indices).support,
            super().sample(split, indices).query,
        )
        return TaskBatch((support.requires_grad_(), labels), query)


@pytest.mark.parametrize(
    ("source", "broken", "message"),
    [
        (Own, [], ""),
        (WithGradient, [], ""),
        (
            OtherKind,
            ["fits its description"],
            "kind is 'classfication'; it is one of classification",
        ),
        (FewTargets, ["fits its description"], "query of task 0 of train: 6 inputs have 4 targets"),
        (NotFinite, ["fits its description"], "inputs are not finite"),
        (PlainList, list(TASK_LAWS), "sampling train returned a list; it returns a TaskBatch"),
        (Nothing, list(TASK_LAWS), "sampling train returned None; it returns a TaskBatch"),
    ],
)
def test_the_law_that_a_source_of_ones_own_breaks_is_named(
    source: type, broken: list[str], message: str
) -> None:
    rows = verify(source, examples=3).rows
    assert [row.law for row in rows if row.verdict == "breaks"] == broken
    assert all(row.verdict in ("holds", "breaks") for row in rows)
    assert all(message in row.message for row in rows if row.law in broken)


def test_a_task_is_the_same_in_another_process_with_another_number_of_threads(
    device: torch.device, small_data: Path
) -> None:
    # And importing the tasks imports no image library.
    code = (
        "import sys, json, torch; sys.path[:0] = json.loads(sys.argv[1])\n"
        "before = set(sys.modules); import metablocks.tasks\n"
        "assert not {'torchvision', 'PIL', 'matplotlib'} & (set(sys.modules) - before)\n"
        "from test_task_source_laws import MAKERS, digest\n"
        "sources = {n: m(5, sys.argv[2], sys.argv[3]) for n, m in MAKERS.items()}\n"
        "print(json.dumps({n: digest(s.sample('train', [1, 9])) for n, s in sources.items()}))\n"
    )
    paths = json.dumps([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    threads = "1" if torch.get_num_threads() > 1 else "2"
    done = subprocess.run(
        [sys.executable, "-c", code, paths, str(device), str(small_data)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = {
        name: digest(maker(5, device, small_data).sample("train", [1, 9]))
        for name, maker in MAKERS.items()
    }
    assert json.loads(done.stdout) == here


def test_seeds_splits_and_indices_give_different_tasks(make: Make) -> None:
    def inputs(seed: int, split: str, index: int) -> bytes:
        return make(seed).sample(split, [index]).support[0].cpu().numpy().tobytes()

    drawn = {inputs(*where) for where in [(0, "train", 0), (1, "train", 0), (0, "train", 1)]}
    drawn |= {inputs(0, "validation", 0), inputs(0, "test", 0)}
    assert len(drawn) == 5


def test_a_source_says_what_its_tasks_are(make: Make, device: torch.device) -> None:
    source = make(0)
    assert isinstance(source, TaskSource)
    batch = source.sample("train", [0, 4, 2])
    assert len(batch) == 3
    for inputs, target in (batch.support, batch.query):
        assert inputs.dtype == example_shapes(source)[1]
        assert inputs.shape[:2] == target.shape[:2]
        assert inputs.device.type == target.device.type == device.type
        if source.kind == "classification":
            assert target.ndim == 2
        else:
            assert target.dtype == inputs.dtype
        if inputs.ndim == 5:  # images, in episodes of as many examples of each class
            counts = [(target == way).sum(dim=1) for way in range(source.outputs)]
            assert all(
                int(count) * source.outputs == target.shape[1] for c in counts for count in c
            )
            assert 0 <= inputs.min() < inputs.max() <= 1


def test_a_source_is_a_value(make: Make) -> None:
    assert make(0) == make(0)
    assert hash(make(0)) == hash(make(0))
    assert make(0) != make(1)


@pytest.mark.parametrize(
    ("split", "indices", "message"),
    [
        ("valid", [0], "unknown split 'valid'; it is one of train, validation, test"),
        ("train", [], r"indices is \[\]; it takes a list of task numbers, at least one"),
        ("train", [-1], "count from 0"),
    ],
)
def test_an_impossible_request_is_an_error_that_says_why(
    make: Make, split: str, indices: list[int], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        make(0).sample(split, indices)
