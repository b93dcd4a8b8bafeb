"""CIFAR-FS: N-way K-shot tasks of CIFAR-100's classes, 600 photographs each, 32×32 RGB.

The images are CIFAR-100's, its training and test images together; the classes of train, validation
and test are the published 64 / 16 / 20 (`metablocks.tasks.class_splits`).

The layout on disk is torchvision's: a folder `cifar-100-python` with the pickles `train`, `test` and
`meta`, or the archive `cifar-100-python.tar.gz` of it; the folder is preferred. torchvision downloads
the archive and checks its MD5. Deviation from torchvision: 1. data that is found is not held to that
MD5, so that a smaller or repacked copy works too; therefore its pickles are read by an unpickler that
makes arrays and plain values and calls nothing else, and archives are read in memory.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch

from metablocks.checks import checked
from metablocks.errors import TaskError
from metablocks.tasks.class_splits import CIFAR_FS, ClassSplits, SplitSet, class_names
from metablocks.tasks.image_sets import Bank, check_present
from metablocks.tasks.storage import FILE_LIMIT, Storage, check_size, read_file, reading
from metablocks.torchvision_import import torchvision_module

FOLDER = "cifar-100-python"
ARCHIVE = f"{FOLDER}.tar.gz"
FILES = ("train", "test", "meta")
SIZE = 32


def _holds(place: Path) -> bool:
    packed = place.name == ARCHIVE and place.is_file()
    return packed or all((place / file).is_file() for file in FILES)


def _fetch(folder: Path) -> None:
    """Download the archive and check its MD5, by torchvision; it is neither unpacked nor read."""
    datasets = torchvision_module("datasets")
    known = datasets.CIFAR100
    datasets.utils.download_url(known.url, str(folder), known.filename, known.tgz_md5)


@checked(TaskError)
@dataclass(frozen=True, kw_only=True)
class CifarFS(SplitSet):
    """Tasks of CIFAR-FS: photographs of CIFAR-100, of the published 64 / 16 / 20 classes.

    RGB, 32×32; `data` holds `cifar-100-python` or `cifar-100-python.tar.gz`, which torchvision
    downloads. Fields, shapes and errors: `metablocks.tasks.image_sets.ImageSet`.

    Source: Krizhevsky 2009 (the images); Bertinetto et al. 2019 (the split).

    >>> import metablocks as mb
    >>> source = mb.tasks.CifarFS(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, source.sizes
    ((3, 32, 32), 5, {'train': 64, 'validation': 16, 'test': 20})
    >>> mb.tasks.CifarFS(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: CifarFS ways is 20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    input_shape: ClassVar[tuple[int, ...]] = (3, SIZE, SIZE)
    splits: ClassVar[ClassSplits] = CIFAR_FS
    storage: ClassVar[Storage] = Storage(
        "CIFAR-100",
        f"a folder {FOLDER}/ with the files train, test and meta, or {ARCHIVE}",
        ("", FOLDER, ARCHIVE),
        _holds,
        _fetch,
        keep=(ARCHIVE,),
    )

    def load(self) -> Bank:
        """The bank of all 100 classes in the order train, validation, test.

        The images of a class come in the order of the files, those of `train` before those of `test`.
        """
        with self.storage.located(self.data) as place:
            return read(place)


def read(place: Path) -> Bank:
    """The bank of the folder or archive `place`.

    Raises `DataError`, naming it, if a file is missing, damaged or not CIFAR-100's.
    """
    with reading(place, "CIFAR-100"):
        files = _contents(place)
        values = {
            file: _Unpickler(io.BytesIO(files[file]), encoding="latin1").load() for file in FILES
        }
        names = list(values["meta"]["fine_label_names"])
        batches = [values["train"], values["test"]]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIZE, SIZE)
        labels = np.concatenate([batch["fine_labels"] for batch in batches])
        counts = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
        if images.dtype != np.uint8 or len(images) != len(labels):
            raise ValueError(f"{len(labels)} labels for images of {images.dtype} {images.shape}")
    order = class_names(CIFAR_FS)
    near = [name for name in names if name not in order]
    check_present(str(place), CIFAR_FS, (name for name in names if counts[name]), near)
    rows = np.concatenate([np.flatnonzero(labels == names.index(name)) for name in order])
    return Bank({name: counts[name] for name in order}, torch.from_numpy(images[rows]))


def _contents(place: Path) -> dict[str, bytes]:
    """{file: its content} of the folder or archive."""
    if place.is_dir():
        return {file: read_file(place / file, "CIFAR-100") for file in FILES}
    files: dict[str, bytes] = {}
    with tarfile.open(place) as archive:
        for member in archive:
            check_size(member.size, FILE_LIMIT)  # also of one that would only be passed over
            *above, file = PurePosixPath("/", member.name).parts
            content = archive.extractfile(member)  # None for members that are not files
            if content and file in FILES and above[-1] == FOLDER:
                files[file] = content.read()
    return files


class _Unpickler(pickle.Unpickler):
    """An unpickler of plain values and arrays (see "Restricting Globals" in Python's `pickle`).

    The functions are made anew for each use, so that a pickle cannot leave attributes on them.
    """

    def find_class(self, module: str, name: str) -> Any:
        def dtype(kind: str, align: object = False, copy: object = False) -> np.dtype[Any]:
            made = np.dtype(kind, align=bool(align), copy=bool(copy))
            if made.hasobject:
                raise pickle.UnpicklingError("it holds an array of Python objects")
            return made

        def from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
            return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)

        allowed: dict[str, Any] = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": dtype,
            "_codecs.encode": lambda text, _: text.encode("latin-1"),  # bytes, in protocol 2
            "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
            "numpy.core.multiarray.scalar": np.int64(0).__reduce__()[0],
            "numpy.core.numeric._frombuffer": from_buffer,
        }
        function = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # numpy 2, numpy 1
        if function not in allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only plain values and numpy arrays are read"
            )
        return allowed[function]
