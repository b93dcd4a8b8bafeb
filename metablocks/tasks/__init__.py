"""Task sources: pure functions from (seed, split, index) to a task."""

from metablocks.tasks.base import Split, TaskSource
from metablocks.tasks.cifar_fs import CifarFS
from metablocks.tasks.classes import Classes
from metablocks.tasks.episodes import Episodes
from metablocks.tasks.file_sets import CUB, TieredImagenet
from metablocks.tasks.folders import Folders
from metablocks.tasks.linear import Linear
from metablocks.tasks.logistic import Logistic
from metablocks.tasks.mini_imagenet import MiniImagenet
from metablocks.tasks.mix import BySplit, Mix
from metablocks.tasks.omniglot import Omniglot
from metablocks.tasks.sinusoid import Sinusoid
from metablocks.tasks.strokes import Strokes
from metablocks.tasks.text import Text

__all__ = [
    "CUB",
    "BySplit",
    "CifarFS",
    "Classes",
    "Episodes",
    "Folders",
    "Linear",
    "Logistic",
    "MiniImagenet",
    "Mix",
    "Omniglot",
    "Sinusoid",
    "Split",
    "Strokes",
    "TaskSource",
    "Text",
    "TieredImagenet",
]
