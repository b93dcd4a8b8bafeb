"""Tasks of image files of one's own, in a folder for each class."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from metablocks.checks import Count, CountFrom0, check, checked
from metablocks.errors import DataError, MetablocksError, TaskError
from metablocks.tasks.base import SPLITS, Split
from metablocks.tasks.class_tasks import Shares, check_apart, deal
from metablocks.tasks.image_files import Files, FileTasks, classes_below
from metablocks.tasks.image_sets import check_present
from metablocks.tasks.storage import below_here, read_file

ClassNames = Mapping[Split, Sequence[str]]
FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""The names of a split's folder."""


@checked(TaskError)
@dataclass(frozen=True)
class Folders(FileTasks):
    """Tasks of image files: `root/train/cat/01.png`, or `root/cat/01.png` and a split of the classes.

    `sample` returns inputs float32 in [0, 1], `[tasks, ways * examples, channels, *size]`, and targets
    int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. A class is a folder
    that holds images, at any depth; it draws among its own, as many as there are. Images of any size
    and mode are resized to `size` (a side, or height and width), their proportion given up, and turned
    to RGB, or to `grey`: `metablocks.tasks.image_files.decode`. With `rotate`, every
    class of a training task turns by a multiple of 90°, drawn anew in every task.

    - `root`: the folder of the images.
    - `size`: side of the images that the model gets, or height and width.
    - `grey`: True for one channel in place of RGB.
    - `splits`: None for folders `root/train`, `root/validation` (or `val`) and `root/test`, in upper or
      lower case; three shares of the classes, (0.6, 0.2, 0.2), which are dealt by a hash of their
      names; the names of each split's classes; or the path of a YAML or JSON file that says these,
      `{train: [cat, …], validation: …}`.
    - `cache`: MiB of images that stay in memory at most; the oldest make room.

    Files are listed at the first use and read when they are drawn. `checksum` reads every file
    once, looks for damage, and is remembered in the cache folder for as long as no file changes its
    name, size or time of change.

    Raises, when built, `TaskError` for fields out of range and for a `root` or a file of splits that
    is not there. Raises, at first use, `DataError` for a folder without images, a link in a
    circle or an image that cannot be read, and `TaskError` for a class in two splits, for two classes
    whose names differ in case alone, and for too few classes or images.

    >>> import metablocks as mb
    >>> from tempfile import TemporaryDirectory
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with TemporaryDirectory() as root:
    ...     for number in range(40):
    ...         folder = Path(root, f"class {number // 4}")
    ...         folder.mkdir(exist_ok=True)
    ...         Image.new("L", (20 + number, 30), number).save(folder / f"{number}.png")
    ...     source = mb.tasks.Folders(root, splits=(0.6, 0.2, 0.2), size=16, ways=2, shots=1, queries=3)
    ...     source.sample("validation", range(3)).query[0].shape
    torch.Size([3, 6, 3, 16, 16])
    """

    root: str | Path
    size: Count | tuple[Count, Count]
    grey: bool = False
    splits: str | Path | Shares | ClassNames | None = field(default=None, hash=False)
    cache: CountFrom0 = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._root.is_dir():
            raise self._error(
                "root",
                f"is {str(self.root)!r}, and there is no such folder{below_here(self._root)}; root "
                "holds a folder for each split, or for each class",
            )
        if isinstance(self.splits, str | Path):
            read_splits(self.splits)

    @cached_property
    def classes(self) -> dict[Split, Files]:
        """The image files of the classes of each split that there is."""
        if self.splits is None:
            classes = by_folder(self._root)
        else:
            everything = classes_below(self._root)
            check_apart("Folders", {"train": everything})
            classes = {
                split: {name: everything[name] for name in names}
                for split, names in self._names(everything).items()
                if names
            }
        check_apart("Folders", classes)
        return classes

    @property
    def _files(self) -> tuple[Path, dict[Split, Files]]:
        return self._root, self.classes

    @property
    def _root(self) -> Path:
        return Path(os.path.expanduser(self.root))

    def _names(self, present: Files) -> dict[Split, list[str]]:
        """The names of each split's classes, as `splits` has them."""
        if isinstance(self.splits, tuple):
            self._check_undivided(present)
            return deal(present, self.splits)
        splits: Any = self.splits
        if isinstance(splits, str | Path):
            splits = read_splits(splits)
        listed = {split: sorted(splits[split]) for split in SPLITS if split in splits}
        check_present(str(self.root), listed, present, present)
        return listed

    def _check_undivided(self, present: Files) -> None:
        """Raise `DataError` for a class in several splits' folders, whose parts would be dealt apart."""
        known = {name for names in FOLDERS.values() for name in names}
        seen: dict[str, str] = {}
        for name in present:
            top, _, below = name.partition("/")
            if below and top.casefold() in known and seen.setdefault(below, name) != name:
                raise DataError(
                    f"{self.root}: holds {seen[below]} and {name}, which shares would deal to several "
                    "splits as two classes; put the images of a class into one folder"
                )


def read_splits(path: str | Path) -> ClassNames:
    """The names of each split's classes in a YAML or JSON file.

    Raises `TaskError` for a file that cannot be read or says something else.
    """
    try:
        text = read_file(Path(os.path.expanduser(path)), "a text").decode("utf-8-sig")
        content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        names: ClassNames = check("Folders", "splits", content, ClassNames, TaskError)
    except (OSError, ValueError, yaml.YAMLError, MetablocksError) as error:
        raise TaskError.about(
            "Folders",
            "splits",
            f"is {str(path)!r}, which cannot be read as classes by split, {{train: [cat, …], "
            f"validation: […], test: […]}} ({' '.join(str(error).split())})",
        ) from error
    return names


def by_folder(root: Path) -> dict[Split, Files]:
    """The image files of the classes in a folder for each split."""
    here = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    places = {
        split: [folder for folder in here if folder.name.casefold() in names]
        for split, names in FOLDERS.items()
    }
    for split, folders in places.items():
        if len(folders) > 1:
            raise DataError(f"{root}: holds {folders[0].name} and {folders[1].name}, both {split}")
    if not places["train"]:
        raise DataError(
            f"{root}: has no folder train; lay images out as {root}/train/cat/01.png, or say which "
            "classes are of which split: splits=(0.6, 0.2, 0.2) or a file"
        )
    return {split: classes_below(*folders) for split, folders in places.items() if folders}
