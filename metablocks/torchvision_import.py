"""Import torchvision, even if its compiled operators do not fit the installed torch.

A CPU build of torch next to the package index's torchvision cannot load torchvision's compiled
library, and then `import torchvision` itself fails with "operator torchvision::nms does not exist":
it describes the shapes of operators that nobody has declared. Data sets, transforms and classifiers
need no operator at all. So: import; on exactly that error, declare those operators and
import once more. After that `import torchvision`, and of packages that import it (timm), works.
An install that works is left as it is.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DESCRIBED = ("nms", "qnms")  # the operators torchvision describes without looking for them first
_DECLARED: list[Any] = []  # a declaration lasts as long as its Library object


def torchvision_module(name: str) -> ModuleType:
    """The module `torchvision.<name>`, imported now.

    Raises whatever the import raises, other than the missing operators.

    >>> torchvision_module("datasets").Omniglot.folder
    'omniglot-py'
    >>> torchvision_module("models").resnet18.__name__
    'resnet18'
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
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
