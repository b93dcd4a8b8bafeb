"""Mini-ImageNet: N-way K-shot tasks of 100 ImageNet classes, 600 photographs each, 84×84 RGB.

The classes of train, validation and test are the published 64 / 16 / 20; see
`metablocks.tasks.class_splits` for the list, `metablocks.tasks.mini_imagenet_files` for the layouts
on disk.
"""

from dataclasses import dataclass
from typing import ClassVar

from metablocks.tasks import mini_imagenet_files
from metablocks.tasks.class_splits import MINI_IMAGENET
from metablocks.tasks.photographs import Files, Photographs


@dataclass(frozen=True, kw_only=True)
class MiniImagenet(Photographs):
    """Tasks of mini-ImageNet photographs, of the published 64 / 16 / 20 classes.

    `sample` returns inputs float32 in [0, 1], RGB, `[tasks, ways * examples, 3, 84, 84]`, and
    targets int64 `[tasks, ways * examples]`, class-major. Obeys the law of `TaskSource`. Classes
    may hold unequal numbers of images; each draws among its own.

    The images are read at the first use of `sample`, `bank` or `checksum`, so that a source can be
    described and checked where there is no data. `data` is the folder that holds `mini_imagenet`,
    or that folder; without it `$METABLOCKS_DATA` and the cache folder are searched. There is no
    download. The decoded images, 1.3 GB of the whole data set, are kept in the cache folder, if it
    can be written, so that the next start takes seconds.

    Raises, when built, `TaskError` for fields out of range (`ways` is at most 16, the classes of
    the validation split; shots + queries at most 600) and `DataError` for a `data` without
    mini-ImageNet. Raises, at first use, `DataError` where the data is absent, incomplete or
    unreadable, and `TaskError` where a class has fewer than shots + queries images.

    Source: Vinyals et al. 2016 (the images); Ravi, Larochelle 2017 (the split).

    >>> source = MiniImagenet(ways=5, shots=1, queries=15)
    >>> source.input_shape, source.outputs, [len(source.classes[s]) for s in source.classes]
    ((3, 84, 84), 5, [64, 16, 20])
    >>> MiniImagenet(ways=20, shots=1, queries=15)
    Traceback (most recent call last):
    metablocks.errors.TaskError: MiniImagenet: ways=20, and the classes of its splits are train 64,
    validation 16, test 20; ways is at most 16
    """

    splits = MINI_IMAGENET
    size = mini_imagenet_files.SIZE
    files: ClassVar[Files] = mini_imagenet_files
