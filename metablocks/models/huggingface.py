"""Models of Hugging Face transformers, fitted to the inputs and classes of the tasks."""

import contextlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError, MissingError, first_line, suggest, suggest_then
from metablocks.kernels import twice_differentiable
from metablocks.models.torchvision_net import differ_in_classes
from metablocks.torchvision_import import torchvision_module

_BLOCK = "huggingface_model"


class Logits(nn.Module):
    """A model of transformers whose output is its logits alone.

    Its attention is the kernel that vmap and second derivatives take.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        with twice_differentiable():
            logits: Tensor = self.net(inputs).logits
        return logits


@checked()
def huggingface_model(
    *,
    input_shape: tuple[Count, ...],
    outputs: Count,
    config: Mapping[str, Any] | None = None,
    folder: str | None = None,
) -> nn.Module:
    """A model of transformers: of images a classifier, of tokens a causal language model.

    Images `[examples, channels, height, width]` become `[examples, outputs]`, tokens
    `[examples, length]` become `[examples, length, outputs]`. Parameters have the model's names behind
    `net.`: `net.vit.…`, `net.classifier.…`.

    - `config`: a configuration, `{model_type: vit, hidden_size: 64, …}`, with weights drawn as
      transformers draws them. The number of classes (or words), and of channels and the size of images
      where it states none, are the tasks'.
    - `folder`: of a model that `save_pretrained` wrote, on this machine; its head is new if it has
      another number of classes. Nothing is downloaded, and no code of the folder runs.

    Source: transformers, `AutoModelForImageClassification` and `AutoModelForCausalLM`.

    >>> small = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "patch_size": 7,
    ...          "num_attention_heads": 2, "intermediate_size": 16}
    >>> model = huggingface_model(input_shape=(1, 28, 28), outputs=5, config=small)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 5])

    Raises `MissingError` without transformers, and `BlockError` for both or neither of `config` and
    `folder`, a configuration that transformers does not know, and a folder that does not fit.
    """
    if (config is None) == (folder is None):
        raise BlockError(f"{_BLOCK} takes config or folder, one of the two")
    transformers = _transformers()
    images = len(input_shape) == 3
    kind = "AutoModelForImageClassification" if images else "AutoModelForCausalLM"
    auto = getattr(transformers, kind)
    if config is not None:
        stated = _configuration(transformers, config)
        if images:
            channels, height, width = input_shape
            size = height if height == width else (height, width)
            for field, value in (("num_channels", channels), ("image_size", size)):
                if hasattr(stated, field) and field not in config:
                    setattr(stated, field, value)
        _fit(stated, outputs, images=images)
        try:
            return Logits(auto.from_config(stated))
        except Exception as error:  # whatever the model's own constructor may raise
            words = f"does not make an {kind} ({first_line(error)})"
            raise BlockError.about(_BLOCK, "config", words) from error
    try:
        return Logits(_from_folder(transformers, auto, str(folder), outputs, images=images))
    except BlockError:
        raise
    except Exception as error:
        words = f'is "{folder}", which cannot be loaded ({first_line(error)})'
        raise BlockError.about(_BLOCK, "folder", words) from error


def _transformers() -> Any:
    with contextlib.suppress(MissingError):
        torchvision_module("transforms")  # transformers imports it, and fails where it does not fit
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingError(
            "huggingface models need transformers, which is not installed: pip install "
            "'metablocks[transformers]'",
            block=_BLOCK,
        ) from error


def _configuration(transformers: Any, config: Mapping[str, Any]) -> Any:
    """The configuration, of whose fields none is unknown (transformers would keep it, unread)."""
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    known = list(transformers.CONFIG_MAPPING)
    if model_type not in known:
        takes = "it is one of transformers', such as vit or gpt2"
        stated = "no model_type" if model_type is None else f'model_type "{model_type}"'
        near = f"; {takes}" if model_type is None else suggest_then(str(model_type), known, takes)
        raise BlockError.about(_BLOCK, "config", f"has {stated}{near}")
    default = transformers.AutoConfig.for_model(model_type)
    for name in fields:
        if not hasattr(default, name):
            near = suggest(name, default.to_dict())
            raise BlockError.about(_BLOCK, "config", f"of {model_type} has no field {name}{near}")
    try:
        return transformers.AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # of the packages by which transformers checks its fields
        words = f"does not make a {model_type} ({' '.join(str(error).split())})"
        raise BlockError.about(_BLOCK, "config", words) from error


def _fit(config: Any, outputs: int, *, images: bool) -> None:
    # transformers iterates over them, None or not.
    config.architectures = config.architectures or []
    if images:
        config.num_labels = outputs
    else:
        config.vocab_size = outputs
        config.use_cache = False


def _from_folder(
    transformers: Any, auto: Any, folder: str, outputs: int, *, images: bool
) -> nn.Module:
    path = Path(os.path.expanduser(folder))
    if not (path / "config.json").is_file():
        takes = "it is a folder on this machine that save_pretrained wrote"
        raise BlockError.about(
            _BLOCK, "folder", f'is "{folder}", which has no config.json; {takes}'
        )
    # False, and not left out: transformers would ask whether to run the folder's code.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(path, **local)
    words = getattr(config, "vocab_size", outputs)
    if not images and words != outputs:
        words = f"has a model of {words} words; the tasks have {outputs}"
        raise BlockError.about(_BLOCK, "folder", words)
    _fit(config, outputs, images=images)
    if torch.empty(0).is_meta:  # a trial
        trial: nn.Module = auto.from_config(config)
        return trial
    model, report = auto.from_pretrained(
        path,
        config=config,
        **local,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    own = model.state_dict()
    pairs = [(name, own[name].shape, own[name].shape) for name in report["missing_keys"]]
    for name, stored, here in [*pairs, *report["mismatched_keys"]]:
        if not differ_in_classes(stored, here, outputs):
            words = f'is "{folder}", whose {name} is missing or of another shape'
            raise BlockError.about(_BLOCK, "folder", words)
    loaded: nn.Module = model
    return loaded
