"""Text without a download: the documents of a folder as bytes, a document for each task."""

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metablocks.checks import Count, CountFrom0, Device, checked
from metablocks.errors import DataError, TaskError
from metablocks.tasks.base import Kind, Split, check_split, generator, task_numbers
from metablocks.tasks.class_tasks import Shares, deal, digest_of
from metablocks.tasks.storage import below_here, fingerprint, readable, remembered
from metablocks.types import Task, TaskBatch

_ORDER = 4  # last counter of the generator that puts the documents of a split in order
_NOT_READ = ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages")


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class Text:
    """Tasks of predicting the next byte of a document: what it says in some places, and in others.

    `sample` returns inputs and targets int64 `[tasks, examples, length]`, numbers below 256: an example
    is a window of `length` bytes, and its targets are the same shifted by one. The `shots` windows of
    the support set and the `queries` of the query set are drawn from one document and share no byte. A
    model gives `[examples, length, 256]`; the loss is the cross-entropy of the next byte, and scores
    are in bits per byte. Obeys the law of `TaskSource`: every document of a split comes once before
    one comes again.

    With `chunks` a task is a stream, for `Stream`: a passage of the document as `chunks` + 1 chunks of
    `shots` windows, in its order. Support leaves are `[tasks, chunks, shots, length]`, query leaves
    `[tasks, chunks + 1, shots, length]`, and row k of both is chunk k: inner step k adapts to the chunk
    that carry k was judged by.

    - `length`: bytes of an example.
    - `shots`: windows of the support set.
    - `queries`: windows of the query set; of a stream as many as `shots`, since they are the same.
    - `chunks`: chunks that a stream adapts to, at least the inner steps; None for sets.
    - `files`: the pattern that the names of documents fit.
    - `folder`: of the documents, files at any depth. None for the sources of Python's standard
      library (`*.py`, without its tests): real text on every machine, another one in every version
      of Python.
    - `splits`: the shares of train, validation and test, dealt by a hash of the documents' names.

    Documents too short for a task are left out. Files are read when they are drawn. `checksum` is of
    the names and contents of all, and remembered in the cache folder while no file changes.

    Raises, when built, `TaskError` for fields out of range, a `folder` that is not there, and `chunks`
    with other `queries` than `shots`; at first use, `DataError` for files that cannot be read, and
    `TaskError` for a split without a document that is long enough.

    >>> import torch
    >>> import metablocks as mb
    >>> tasks = mb.tasks.Text(length=32, shots=2, queries=3).sample("train", range(4))
    >>> tasks.query[0].shape, bool((tasks.query[0][..., 1:] == tasks.query[1][..., :-1]).all())
    (torch.Size([4, 3, 32]), True)
    >>> tasks = mb.tasks.Text(length=32, shots=2, queries=2, chunks=3).sample("train", range(4))
    >>> tasks.query[0].shape, torch.equal(tasks.support[0], tasks.query[0][:, :-1])
    (torch.Size([4, 4, 2, 32]), True)
    """

    kind: ClassVar[Kind] = "text"
    outputs: ClassVar[int] = 256

    length: Count = 64
    shots: Count = 4
    queries: Count = 4
    chunks: Count | None = None
    folder: str | Path | None = None
    files: str = "*"
    splits: Shares = (0.8, 0.1, 0.1)
    seed: CountFrom0 = 0
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if not self._root.is_dir():
            where = f"there is no such folder{below_here(self._root)}"
            words = f"is {str(self.folder)!r}, and {where}; it holds documents"
            raise TaskError.about("Text", "folder", words)
        if self.chunks is not None and self.queries != self.shots:
            raise TaskError.about(
                "Text",
                "queries",
                f"is {self.queries}, but a stream is judged by the {self.shots} windows (shots) of each "
                f"of its chunks; take queries {self.shots}, or chunks None",
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.length,)

    @cached_property
    def documents(self) -> dict[Split, list[str]]:
        """The names of each split's documents, paths below the folder."""
        root = str(self._root)
        needed = self._windows * (self.length + 1)
        with readable(self._root):
            return {
                split: [name for name in names if os.stat(f"{root}/{name}").st_size >= needed]
                for split, names in deal(self._names(), self.splits).items()
            }

    @cached_property
    def checksum(self) -> str:
        """SHA-256, in hex, of the documents' names, splits and contents."""
        listed = [[split, name] for split, names in self.documents.items() for name in names]
        files = [self._root / name for _, name in listed]
        with readable(self._root):
            state = fingerprint(self._root, [str(listed), *files])
            return remembered(
                f"text-{state[:40]}", lambda: digest_of(listed, (f.read_bytes() for f in files))
            )

    def sample(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks number `indices` of a split; leaves int64 `[len(indices), examples, length]`."""
        check_split(split)
        names = self.documents[split]
        if not names:
            raise TaskError.about(
                "Text",
                "length",
                f"is too long: no document of {split} has {self._windows} windows of {self.length} + 1 "
                "bytes; take fewer or shorter ones, or more documents "
                f"({self._root}, files {self.files!r})",
            )
        tasks = [self._task(split, index, names) for index in task_numbers(indices)]
        return TaskBatch.stack(tasks).to(self.device)

    def _task(self, split: Split, index: int, names: list[str]) -> Task:
        turn, place = divmod(index, len(names))
        order = generator(self.seed, split, turn, _ORDER).permutation(len(names))
        rng = generator(self.seed, split, index)
        path = self._root / names[order[place]]
        width, count = self.length + 1, self._windows
        with readable(path), path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            windows = size // width
            if windows < count:
                raise DataError(f"{path}: has become shorter since its folder was looked at")
            taken = windows if self.chunks is None else count
            first = int(rng.integers(size - taken * width + 1))
            rows = range(count) if self.chunks is not None else rng.permutation(windows)[:count]
            content = b"".join(_read_at(file, first + int(row) * width, width) for row in rows)
        text = np.frombuffer(content, dtype=np.uint8).reshape(count, width)
        tokens = torch.from_numpy(text.astype(np.int64))

        def side(rows: Tensor) -> tuple[Tensor, Tensor]:
            return rows[..., :-1].clone(), rows[..., 1:].clone()

        if self.chunks is None:
            return Task(side(tokens[: self.shots]), side(tokens[self.shots :]))
        chunks = tokens.reshape(self.chunks + 1, self.shots, width)
        return Task(side(chunks[:-1]), side(chunks))

    @property
    def _windows(self) -> int:
        """The number of windows of a task."""
        if self.chunks is None:
            return self.shots + self.queries
        return (self.chunks + 1) * self.shots

    @property
    def _root(self) -> Path:
        if self.folder is None:
            return Path(sysconfig.get_path("stdlib"))
        return Path(os.path.expanduser(self.folder))

    def _names(self) -> Iterator[str]:
        root = str(self._root)
        for folder, folders, files in os.walk(root, onerror=_raise):
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            folders[:] = [name for name in folders if self._is_read(prefix, name)]
            for name in files:
                module = name.removesuffix(".py")
                documents = self.folder is not None or module != name
                if documents and fnmatch(name, self.files) and self._is_read(prefix, module):
                    yield prefix + name

    def _is_read(self, prefix: str, name: str) -> bool:
        """False for what is hidden, and what not every installation of Python has in its library."""
        if name.startswith("."):
            return False
        known = prefix or self.folder is not None or name in sys.stdlib_module_names
        return bool(known) and (self.folder is not None or name not in _NOT_READ)


def _read_at(file: Any, place: int, count: int) -> bytes:
    """The bytes of a document from a place on: large ones are not read whole for a few windows."""
    file.seek(place)
    content: bytes = file.read(count)
    return content


def _raise(error: OSError) -> None:
    raise error
