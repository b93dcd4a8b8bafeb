"""Import torchvision, even if its compiled operators do not fit the installed torch.

A CPU build of torch next to the package index's torchvision cannot load torchvision's compiled
library, and then `import torchvision` itself fails with "operator torchvision::nms does not exist":
it describes the shapes of operators that nobody has declared. Data sets, transforms and classifiers
need no operator at all. So: import; on exactly that error, declare those operators and
import once more. After that `import torchvision`, and of packages that import it (timm), works.
An install that works is left as it is, and torchvision is not a dependency of metablocks: it asks for
one release of torch and would replace the one that is installed.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from metablocks.errors import MissingError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DESCRIBED = ("nms", "qnms")  # the operators torchvision describes without looking for them first
_DECLARED: list[Any] = []  # a declaration lasts as long as its Library object


def torchvision_module(name: str) -> ModuleType:
    """The module `torchvision.<name>`, imported now.

    Raises `MissingError` if torchvision is not installed, and whatever else the import raises, other
    than the missing operators.

    >>> torchvision_module("datasets").Omniglot.folder
    'omniglot-py'
    >>> torchvision_module("models").resnet18.__name__
    'resnet18'
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision":
            raise
        raise MissingError(
            f"torchvision.{name} is needed, and torchvision is not installed; the one that fits this "
            f"torch ({torch.__version__}): pip install pillow '{_fitting(torch.__version__)}'"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for module in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[module]  # half imported
    library: Any = torch.library.Library  # not annotated in every torch
    fragment = library("torchvision", "FRAGMENT")
    _DECLARED.append(fragment)
    for operator in _DESCRIBED:
        if not hasattr(torch.ops.torchvision, operator):
            fragment.define(operator + _SCHEMA)
    return importlib.import_module(f"torchvision.{name}")


def _fitting(version: str) -> str:
    """The requirement of torchvision that leaves this release of torch alone.

    >>> _fitting("2.13.0+cpu")
    'torchvision==0.28.*'
    """
    _, minor, *_ = version.split(".")
    return f"torchvision==0.{int(minor) + 15}.*"
