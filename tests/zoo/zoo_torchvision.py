"""Models of torchvision."""

from functools import partial

import torch.nn.functional as F
from torch import nn
from zoo_entry import CLASSES, NO_SAVED_TENSOR_HOOKS, Entry, images

from metablocks.torchvision_import import torchvision_module


def _models(name: str):
    return getattr(torchvision_module("models"), name)


def _resnet() -> nn.Module:
    resnet = _models("resnet")
    down = nn.Sequential(resnet.conv1x1(4, 8, 2), nn.BatchNorm2d(8))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        resnet.BasicBlock(4, 4),
        resnet.BasicBlock(4, 8, 2, down),
        resnet.Bottleneck(8, 2, base_width=64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def _mobilenet() -> nn.Module:
    module = _models("mobilenetv3")
    config = partial(module.InvertedResidualConfig, width_mult=1.0)
    blocks = [
        config(8, 3, 8, 8, True, "RE", 1, 1),
        config(8, 5, 16, 8, True, "HS", 2, 1),
    ]
    return module.MobileNetV3(blocks, last_channel=8, num_classes=CLASSES, dropout=0.0)


def _densenet(memory_efficient: bool) -> nn.Module:
    return _models("DenseNet")(
        growth_rate=4,
        block_config=(2, 2),
        num_init_features=8,
        bn_size=2,
        num_classes=CLASSES,
        memory_efficient=memory_efficient,
    )


def _squeezenet() -> nn.Module:
    fire = _models("squeezenet").Fire
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        fire(8, 4, 4, 4),
        fire(8, 4, 4, 4),
        nn.Conv2d(8, CLASSES, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _convnext() -> nn.Module:
    module = _models("convnext")
    blocks = [module.CNBlockConfig(8, 16, 1), module.CNBlockConfig(16, None, 1)]
    return module.ConvNeXt(blocks, layer_scale=0.5, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    module = _models("efficientnet")
    blocks = [
        module.MBConvConfig(1, 3, 1, 8, 8, 1),
        module.MBConvConfig(2, 3, 2, 8, 8, 2),
        module.FusedMBConvConfig(2, 3, 1, 8, 8, 1),
    ]
    return module.EfficientNet(
        blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=16
    )


def _lraspp() -> nn.Module:
    backbone = nn.Sequential()
    backbone.low = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    backbone.high = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    getter = torchvision_module("models._utils").IntermediateLayerGetter
    features = getter(backbone, {"low": "low", "high": "high"})
    return torchvision_module("models.segmentation").LRASPP(features, 4, 8, CLASSES, 8)


def _pixels(prediction, target):
    return F.cross_entropy(prediction["out"].mean((2, 3)), target)


ENTRIES = [
    Entry(
        name="torchvision.resnet",
        kind="residual blocks, batch norm, ReLU in place",
        make=_resnet,
        batch=images(10),
    ),
    Entry(
        name="torchvision.mobilenet_v3",
        kind="Hardswish in place, Hardsigmoid, squeeze-excitation, depthwise convolutions",
        make=_mobilenet,
        batch=images(8),
        no_second="features.1.block.1.scale_activation",
    ),
    Entry(
        name="torchvision.densenet",
        kind="concatenated features, ReLU in place on what is used again",
        make=partial(_densenet, False),
        batch=images(16),
    ),
    Entry(
        name="torchvision.densenet_checkpointed",
        kind="its own checkpointing (memory_efficient=True), closures over lists",
        make=partial(_densenet, True),
        plain=partial(_densenet, False),
        no_vmap=NO_SAVED_TENSOR_HOOKS,
        batch=images(16),
    ),
    Entry(
        name="torchvision.shufflenet_v2",
        kind="channel shuffle by views, grouped convolutions, chunked branches",
        make=lambda: _models("ShuffleNetV2")([2, 1, 1], [8, 16, 16, 16, 16], num_classes=CLASSES),
        batch=images(32),
    ),
    Entry(
        name="torchvision.squeezenet",
        kind="Fire modules, max-pooling with ceil_mode, no norm",
        make=_squeezenet,
        batch=images(16),
    ),
    Entry(
        name="torchvision.vit",
        kind="multi-head attention, class token, learned positions",
        make=lambda: _models("VisionTransformer")(8, 4, 2, 2, 8, 16, num_classes=CLASSES),
        batch=images(8),
        fused_attention=True,
    ),
    Entry(
        name="torchvision.convnext",
        kind="layer scale, channels-last layer norm, StochasticDepth",
        make=_convnext,
        batch=images(16),
    ),
    Entry(
        name="torchvision.swin",
        kind="shifted windows by roll, relative position bias by index",
        make=lambda: _models("SwinTransformer")(
            [2, 2], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=CLASSES
        ),
        batch=images(8),
    ),
    Entry(
        name="torchvision.efficientnet",
        kind="SiLU in place, fused and plain MBConv blocks",
        make=_efficientnet,
        batch=images(8),
    ),
    Entry(
        name="torchvision.lraspp",
        kind="segmentation: the output is an OrderedDict",
        make=_lraspp,
        batch=images(8),
        loss=_pixels,
    ),
]
