"""Tasks of any map-style data set of (input, label), such as torchvision's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from metablocks.checks import Blocks, Count, CountFrom0, Such, checked, shown
from metablocks.errors import DataError, MetablocksError, TaskError, first_line, suggest
from metablocks.generators import seeded
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_tasks import ClassTasks, Pool, Shares, check_apart, deal, digest_of
from metablocks.tasks.episode_sampling import Ints
from metablocks.tasks.image_files import Cached, pixels, sides
from metablocks.tasks.storage import reading

_LABELS = ("targets", "labels", "_labels")  # attributes in which torchvision's data sets keep them


@runtime_checkable
class MapDataset(Protocol):
    """A map-style data set of pairs (input, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


def _is_map(value: Any) -> bool:
    return isinstance(value, MapDataset) and not isinstance(value, str | type)


DataSets = Annotated[
    Any,
    Such(
        lambda given: all(map(_is_map, given.values() if isinstance(given, Mapping) else [given])),
        "a data set with len(…) and […] of (input, label), or a dict {split: data set}",
    ),
    Blocks("dataset"),
]


@checked(TaskError)
@dataclass(frozen=True)
class Episodes(ClassTasks):
    """Tasks of a map-style data set of (input, label), or of one for each split.

    `sample` returns inputs `[tasks, ways * examples, ...]`, uint8 as float32 in [0, 1] and other
    numbers as they are, and targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of
    `TaskSource`. Inputs are tensors, arrays, or images of Pillow's, which become uint8
    `[channels, height, width]`, grey or RGB as the first one is, and are resized to `size` if that is
    given. With `rotate`, every class of a training task turns by a multiple of 90°, drawn anew in
    every task.

    One data set is split by classes: `splits` is three shares of them, (0.6, 0.2, 0.2), dealt by a
    hash of their names, or the labels of each split, `{"train": [0, 1, …], …}`. To take the classes
    of both halves of a data set, put them together: `torch.utils.data.ConcatDataset([train, test])`.
    A data set for each split needs no `splits`, and classes of its own, which can only be checked of
    those that name them (`classes`).

    Labels are taken from `targets` or `labels`, if that is what the first and the last example say,
    and else from every example. An input is read when it is drawn, and at most `cache` MiB of them are
    kept. What a data set's own transforms draw is seeded by the number of the example: it is the same
    whenever the example is read, and the global random states stay as they are. `checksum` reads every
    example once.

    - `datasets`: the data set, or one for each split.
    - `splits`: three shares of the classes, or the labels of each split; None if there is a data
      set for each.
    - `size`: side of the images that the model gets, or height and width; None to leave them.
    - `cache`: MiB of inputs that stay in memory at most.

    Raises, when built, `TaskError` for fields out of range; at first use `TaskError` for inputs of
    unequal shape, and for too few classes or examples.

    >>> import torch
    >>> import metablocks as mb
    >>> data = [(torch.full((1, 4, 4), float(n)), n % 10) for n in range(50)]
    >>> source = mb.tasks.Episodes(data, splits=(0.6, 0.2, 0.2), ways=2, shots=1, queries=3)
    >>> source.sample("test", range(3)).query[0].shape
    torch.Size([3, 6, 1, 4, 4])
    """

    datasets: DataSets = field(repr=False, hash=False)
    splits: Shares | Mapping[Split, Sequence[Any]] | None = field(default=None, hash=False)
    size: Count | tuple[Count, Count] | None = None
    cache: CountFrom0 = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = isinstance(self.datasets, Mapping)
        if apart and not (self.datasets and set(self.datasets) <= set(SPLITS)):
            words = f"is a dict of {list(self.datasets)}; its keys are of {SPLITS}"
            raise self._error("datasets", words)
        if apart and self.splits is not None:
            raise self._error("splits", "is given beside a data set for each split; leave it out")
        if not apart and self.splits is None:
            raise self._error(
                "splits",
                "is missing; it takes the shares of train, validation and test among the classes, "
                "(0.6, 0.2, 0.2), or the labels of each, or give a data set for each split",
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(next(iter(self._parts.values()))[1].take(np.array([0])).shape[1:])

    @cached_property
    def pools(self) -> dict[Split, Pool]:
        """The examples of each split, read when they are drawn."""
        pools = {}
        for split, (by_label, examples, names) in self._parts.items():
            labels = (
                by_label.keys() if self.splits is None else self._labels(split, by_label, names)
            )
            rows = {names[label]: by_label[label] for label in labels}
            if rows:
                pools[split] = Pool.of(rows, examples.take)
        named = {split: pool.names for split, pool in pools.items()}
        if self.splits is not None or all(_class_names(d) for d in self.datasets.values()):
            check_apart("Episodes", named, by_case=True)
        return pools

    @cached_property
    def checksum(self) -> str:
        """SHA-256, in hex, of splits, names of classes and inputs."""
        described = [[s, pool.names, pool.counts.tolist()] for s, pool in self.pools.items()]
        inputs = (
            pool.take(np.array([row])).contiguous().view(torch.uint8).numpy().data
            for pool in self.pools.values()
            for row in range(len(pool.rows))
        )
        return digest_of([described, self.input_shape], inputs)

    @cached_property
    def _parts(self) -> dict[Split, tuple[dict[Any, Ints], Cached, dict[Any, str]]]:
        """Of each split: the rows of each label, the inputs, the labels' names."""
        if isinstance(self.datasets, Mapping):
            return {s: self._part(self.datasets[s]) for s in SPLITS if s in self.datasets}
        return dict.fromkeys(SPLITS, self._part(self.datasets))

    def _part(self, dataset: Any) -> tuple[dict[Any, Ints], Cached, dict[Any, str]]:
        if not len(dataset):
            raise self._error("datasets", f"is a {type(dataset).__name__} without examples")
        labels = labels_of(dataset)
        rows: dict[Any, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        try:
            order = sorted(rows)
        except TypeError:  # labels of several types
            order = sorted(rows, key=str)
        known = _class_names(dataset)
        numbered = all(isinstance(label, int) and 0 <= label < len(known) for label in order)
        names = {label: known[label] if numbered else str(label) for label in order}
        if len(set(names.values())) < len(names):  # 1 and "1"
            names = {label: repr(label) for label in order}
        size = None if self.size is None else sides(self.size)
        examples = Cached(_Reader(dataset, size), self.cache * 2**20)
        return {label: np.array(rows[label]) for label in order}, examples, names

    def _labels(
        self, split: Split, present: Mapping[Any, Any], names: Mapping[Any, str]
    ) -> list[Any]:
        """The labels of a split, in order, as `splits` has them."""
        if isinstance(self.splits, tuple):
            dealt = set(deal(names.values(), self.splits)[split])
            return [label for label in present if names[label] in dealt]
        assert self.splits is not None
        listed = [_plain(label) for label in self.splits.get(split, ())]
        of_name = {name: label for label, name in names.items()}
        labels = [of_name.get(label, label) for label in listed]
        for label in labels:
            if label not in present:
                near = suggest(str(label), of_name)
                raise self._error(
                    "splits", f"is {label!r} for {split}, and no example has it{near}"
                )
        return sorted(labels, key=list(present).index)


def labels_of(dataset: Any) -> list[Any]:
    """The label of every example: from the attribute that holds them, else from the examples.

    >>> labels_of(Subset([("a", 3), ("b", 5), ("c", 3)], [2, 1]))
    [3, 5]
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[row] for row in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [*chain.from_iterable(map(labels_of, dataset.datasets))]
    if isinstance(dataset, TensorDataset):
        return [_plain(label) for label in dataset.tensors[1]]
    transform = getattr(dataset, "target_transform", None)
    for candidate in _candidates(dataset):
        if len(candidate) == len(dataset):
            try:
                labels = [_plain(transform(x) if transform else x) for x in candidate]
            except Exception:  # what is called so may hold other things: masks, boxes
                continue
            if all(labels[row] == _label(dataset, row) for row in {0, len(labels) - 1}):
                return labels
    return [_label(dataset, row) for row in range(len(dataset))]


def _candidates(dataset: Any) -> Any:
    for name in _LABELS:
        found = getattr(dataset, name, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple):
            yield found
    pairs = getattr(dataset, "_flat_character_images", None)  # torchvision's Omniglot
    if isinstance(pairs, list):
        yield [label for _, label in pairs]


def _class_names(dataset: Any) -> list[str]:
    """The names of the classes 0, 1, … of a data set; none if it has none."""
    if isinstance(dataset, Subset):
        return _class_names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        every = [_class_names(part) for part in dataset.datasets]
        return every[0] if all(names == every[0] for names in every) else []
    names: Any = getattr(dataset, "classes", None)
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if listed and len(set(names)) == len(names) else []


def _plain(label: Any) -> Any:
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, int | str):
        raise _error(f"has the label {shown(label)}; it is a whole number or a text")
    return label


def _example(dataset: Any, row: int) -> Any:
    """The example `row`; what it draws is seeded by its number."""
    with seeded(row):
        try:
            example = dataset[row]
        except MetablocksError:
            raise
        except Exception as error:  # a file that is damaged or gone; a data set of one's own
            raise DataError(
                f"Episodes: example {row} of {type(dataset).__name__} cannot be read "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise _error(f"has an example {row}, {shown(example)}; it is a pair (input, label)")
    return example


def _label(dataset: Any, row: int) -> Any:
    return _plain(_example(dataset, row)[1])


class _Reader:
    """Inputs of a data set, each held to the shape and dtype of the first one."""

    def __init__(self, dataset: Any, size: tuple[int, int] | None) -> None:
        self.dataset, self.size = dataset, size

    @cached_property
    def like(self) -> Tensor:
        return _input(self.dataset, 0, self.size, None)

    def __call__(self, rows: Sequence[int]) -> list[Tensor]:
        """The inputs of the examples `rows`."""
        return [self._checked(row) for row in rows]

    def _checked(self, row: int) -> Tensor:
        like = self.like
        value = _input(self.dataset, row, self.size, len(like) if like.ndim else None)
        if value.shape != like.shape or value.dtype != like.dtype:
            raise _error(
                f"has an input {row}, {shown(value)}, and input 0 is {shown(like)}; examples have one "
                "shape: size=… for images, or a transform of the data set"
            )
        return value


def _input(dataset: Any, row: int, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    value = _example(dataset, row)[0]
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        wide = value.dtype.kind == "u" and value.dtype.itemsize > 1  # which torch hardly has
        kind = np.dtype(np.int64) if wide else value.dtype.newbyteorder("=")
        return torch.from_numpy(np.ascontiguousarray(value, kind))
    if hasattr(value, "getbands") and hasattr(value, "convert"):  # an image of Pillow's
        grey = len(value.getbands()) == 1 and value.mode != "P"
        with reading(f"Episodes: input {row}", "an image"):
            return pixels(value, size, channels or (1 if grey else 3))
    takes = "it is a tensor, an array or an image of Pillow's"
    raise _error(f"has an input {row}, {shown(value)}; {takes}")


def _error(words: str) -> TaskError:
    return TaskError.about("Episodes", "datasets", words)
