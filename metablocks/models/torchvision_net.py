"""The classifiers of torchvision, fitted to the inputs and classes of the tasks."""

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError, first_line, suggest_then
from metablocks.torchvision_import import torchvision_module

_BLOCK = "torchvision_classifier"


@checked()
def torchvision_classifier(
    *,
    input_shape: tuple[Count, ...],
    outputs: Count,
    name: str,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classification model of torchvision's registry, by its `name`, with a head of `outputs` classes.

    Input `[examples, channels, height, width]`, output `[examples, outputs]`; parameters have the names
    that torchvision gives them. A grey image counts as three equal channels: the weights of the first
    convolution are summed over theirs, which is the same function.

    - `name`: the model's name in `torchvision.models.list_models()`.
    - `weights`: None for weights drawn as torchvision draws them, or the file of a `state_dict`, of any
      number of classes: the head stays new if it has another. Nothing is downloaded.
    - `options`: what the model's function takes beside: `{image_size: 32}` of `vit_b_16`,
      `{aux_logits: false, init_weights: true}` of `googlenet`.

    Source: torchvision, `torchvision.models.list_models`.

    >>> model = torchvision_classifier(input_shape=(1, 28, 28), outputs=5, name="shufflenet_v2_x0_5")
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 5])

    Raises `MissingError` without torchvision, and `BlockError` for inputs that are not images of 1 or 3
    channels, an unknown name, options that the model does not take, and a file that does not fit.
    """
    models = torchvision_module("models")
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise BlockError(
            f"{_BLOCK} takes images (1 or 3, height, width); the tasks have inputs of shape "
            f"{tuple(input_shape)}"
        )
    known = models.list_models(module=models)
    if name not in known:
        takes = "it is one of torchvision.models.list_models(module=torchvision.models)"
        words = f'is "{name}"{suggest_then(name, known, takes)}'
        raise BlockError.about(_BLOCK, "name", words)
    try:
        model: nn.Module = models.get_model(
            name, weights=None, num_classes=outputs, **(options or {})
        )
    except Exception as error:  # whatever the model's own constructor may raise
        words = f"are {dict(options or {})}, which {name} does not take ({first_line(error)})"
        raise BlockError.about(_BLOCK, "options", words) from error
    if weights is not None:
        _load(model, weights, outputs)
    if input_shape[0] == 1:
        _take_grey(model)
    return model


def differ_in_classes(stored: Sequence[int], here: Sequence[int], outputs: int) -> bool:
    """True for shapes that are alike except for the number of classes in front, here `outputs`.

    >>> differ_in_classes((1000, 512), (5, 512), outputs=5)
    True
    """
    return (*here[:1], *stored[1:]) == (outputs, *here[1:])


def _load(model: nn.Module, path: str, outputs: int) -> None:
    """Load a file's tensors; those of another number of classes stay as they are."""
    own = model.state_dict()
    device = next(model.parameters()).device
    try:
        file = Path(os.path.expanduser(path))
        stored: dict[str, Tensor] = torch.load(file, map_location=device, weights_only=True)
        for name in stored.keys() & own.keys():
            shapes = stored[name].shape, own[name].shape
            if shapes[0] != shapes[1] and differ_in_classes(*shapes, outputs):
                stored[name] = own[name]
        model.load_state_dict(stored, assign=True)
    except Exception as error:
        of_the_file = isinstance(error, pickle.UnpicklingError | EOFError)
        why = shorten(first_line(error) if of_the_file else str(error), 200)
        takes = "it takes the file of a state_dict of this model"
        words = f'is "{path}", which cannot be loaded ({why}); {takes}'
        raise BlockError.about(_BLOCK, "weights", words) from error


def _take_grey(model: nn.Module) -> None:
    """Make the first convolution take one channel in place of three equal ones."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1
