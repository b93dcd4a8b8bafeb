"""Tasks of tensors of one's own, by split and class."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from metablocks.checks import IN_CODE, Such, check, checked, shown
from metablocks.errors import MetablocksError, TaskError
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_tasks import (
    ClassTasks,
    Pool,
    check_apart,
    digest_of,
    numbered,
    rows_of,
)
from metablocks.tasks.storage import check_file, reading

ClassTensors = Annotated[
    Mapping[Split, Mapping[str, Tensor]],
    Such(len, "a dict {split: {class: tensor}}, its splits of train, validation, test"),
]


@checked(TaskError)
@dataclass(frozen=True)
class Classes(ClassTasks):
    """Tasks of tensors: `classes[split][name]` is `[examples, ...]`, one tensor a class.

    `classes` is that dict, or `file` the path of one that `torch.save` wrote (it is read without
    running code).

    `sample` returns inputs `[tasks, ways * examples, ...]`, uint8 as float32 in [0, 1] and other
    numbers as they are, and targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of
    `TaskSource`. Classes may hold unequal numbers of examples; each draws among its own. The order of
    the dicts does not matter, nor do names, beyond the order of the classes. With `rotate`, every
    class of a training task turns by a multiple of 90°, drawn anew in every task. The tensors are
    copied, to `device`, at the first use.

    - `file`: the path of a file with the dict `{split: {name: tensor}}` that `torch.save` wrote.

    Raises, when built, `TaskError` for fields out of range, tensors of different shapes or dtypes and a
    class in two splits, and `DataError` for a file that cannot be read; at first use `TaskError` for a
    split that is not there or has fewer than `ways` classes, and for a class with fewer than
    shots + queries examples.

    >>> import torch
    >>> import metablocks as mb
    >>> digits = {"train": {"zero": torch.zeros(8, 1, 5, 5), "one": torch.ones(6, 1, 5, 5)}}
    >>> source = mb.tasks.Classes(digits, ways=2, shots=1, queries=4)
    >>> source.sample("train", range(3)).query[0].shape
    torch.Size([3, 8, 1, 5, 5])
    """

    classes: Annotated[ClassTensors | None, IN_CODE] = field(
        default=None, compare=False, repr=False
    )
    file: str | Path | None = field(default=None, compare=False)
    _tensors: ClassTensors = field(init=False, compare=False, repr=False)
    _checksum: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.classes is None) == (self.file is None):
            raise self._error(
                "classes", "and file: it takes a dict of tensors, or else the file of one"
            )
        tensors = self.classes if self.file is None else _loaded(self.file)
        object.__setattr__(self, "_tensors", tensors)
        for split, tensors in self._tensors.items():
            if not tensors:
                raise self._error("classes", f"of {split} holds no class")
            for name, tensor in tensors.items():
                if tensor.ndim == 0 or 0 in tensor.shape:
                    raise self._error(
                        "classes",
                        f"has {name} of {split}, {list(tensor.shape)}; a class is [examples, ...], with "
                        "one example at least",
                    )
                if tensor.shape[1:] != self._first.shape[1:] or tensor.dtype != self._first.dtype:
                    raise self._error(
                        "classes",
                        f"has {name} of {split}, {shown(tensor)}, and the first class is "
                        f"{shown(self._first)}; examples have one shape and dtype",
                    )
        check_apart("Classes", self._tensors)
        described = [
            [split, name, list(tensor.shape), str(tensor.dtype)]
            for split, name, tensor in self._in_order()
        ]
        contents = (
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            for _, _, tensor in self._in_order()
        )
        object.__setattr__(self, "_checksum", digest_of(described, contents))

    @property
    def checksum(self) -> str:
        """SHA-256, in hex, of splits, names and examples."""
        return self._checksum

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self._first.shape[1:])

    @cached_property
    def pools(self) -> dict[Split, Pool]:
        """The examples of each split, on the device."""
        tensors = {(split, name): tensor for split, name, tensor in self._in_order()}
        rows = numbered({place: len(tensor) for place, tensor in tensors.items()})
        read = rows_of(torch.cat([t.detach().to(self.device) for t in tensors.values()]))
        return {
            split: Pool.of({n: of for (s, n), of in rows.items() if s == split}, read)
            for split in SPLITS
            if split in self._tensors
        }

    @property
    def _first(self) -> Tensor:
        return next(iter(next(iter(self._tensors.values())).values()))

    def _in_order(self) -> Iterator[tuple[Split, str, Tensor]]:
        for split in SPLITS:
            for name in sorted(self._tensors.get(split, ())):
                yield split, name, self._tensors[split][name]


def _loaded(file: str | Path) -> Any:
    """The dict of tensors of a file; raises `DataError` for one that holds something else."""
    path, kind = Path(os.path.expanduser(file)), "torch.save's file of {split: {class: tensor}}"
    with reading(path, kind):
        check_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        try:
            return check("Classes", "file", loaded, ClassTensors)
        except MetablocksError as error:
            raise ValueError(str(error)) from None
