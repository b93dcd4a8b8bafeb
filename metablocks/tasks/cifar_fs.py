"""CIFAR-FS: N-way K-shot tasks of CIFAR-100's classes, 600 photographs each, 32×32 RGB.

The images are CIFAR-100's, its training and test images together. The classes of train, validation
and test are the published 64 / 16 / 20; see `metablocks.tasks.class_splits` for the list,
`metablocks.tasks.cifar_fs_files` for the layouts on disk, the download and the reading.
"""

from dataclasses import dataclass
from typing import ClassVar

from metablocks.tasks import cifar_fs_files
from metablocks.tasks.class_splits import CIFAR_FS
from metablocks.tasks.photographs import Files, Photographs


@dataclass(frozen=True, kw_only=True)
class CifarFS(Photographs):
    """Tasks of CIFAR-FS: photographs of CIFAR-100, of the published 64 / 16 / 20 classes.

    `sample` returns inputs float32 in [0, 1], RGB, `[tasks, ways * examples, 3, 32, 32]`, and
    targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. In a
    smaller copy, classes may hold unequal numbers of images; each draws among its own.

    The images are read at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked where there is no data. `data` is the folder that holds
    `cifar-100-python` or `cifar-100-python.tar.gz`, or that folder; without it `$METABLOCKS_DATA`
    and the cache folder are searched, then torchvision downloads.

    Raises, when built, `TaskError` for fields out of range (`ways` is at most 16, the classes of
    the validation split; shots + queries at most 600) and `DataError` for a `data` without
    CIFAR-100. Raises, at first use, `DataError` where the data is absent, incomplete or
    unreadable, and `TaskError` where a class has fewer than shots + queries images.

    Source: Krizhevsky 2009 (the images); Bertinetto et al. 2019 (the split).

    >>> source = CifarFS(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, [len(source.classes[s]) for s in source.classes]
    ((3, 32, 32), 5, [64, 16, 20])
    >>> CifarFS(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: CifarFS: ways=20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    splits = CIFAR_FS
    size = cifar_fs_files.SIZE
    files: ClassVar[Files] = cifar_fs_files
