"""Models of timm."""

import importlib
from typing import Any

from torch import nn
from zoo_entry import CLASSES, Entry, images

from metablocks.torchvision_import import torchvision_module


def _timm(module: str) -> Any:
    torchvision_module("models")  # timm imports torchvision
    return importlib.import_module(f"timm.{module}")


def _resnet() -> nn.Module:
    module = _timm("models.resnet")
    return module.ResNet(
        module.BasicBlock, (1,) * 4, CLASSES, channels=(4, 8, 8, 8), stem_width=4, stem_type="deep"
    )


def _vit() -> nn.Module:
    return _timm("models.vision_transformer").VisionTransformer(
        8, 4, num_classes=CLASSES, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, init_values=0.5
    )


def _mixer() -> nn.Module:
    return _timm("models.mlp_mixer").MlpMixer(
        CLASSES, img_size=8, patch_size=4, num_blocks=2, embed_dim=8
    )


def _efficientnet() -> nn.Module:
    module = _timm("models.efficientnet")
    blocks = [["ds_r1_k3_s1_e1_c8_se0.5"], ["ir_r2_k3_s2_e2_c8_se0.5"], ["er_r1_k3_s1_e2_c8"]]
    return module.EfficientNet(
        module.decode_arch_def(blocks), num_classes=CLASSES, num_features=16, stem_size=8
    )


def _nfnet() -> nn.Module:
    module = _timm("models.nfnet")
    config = module.NfCfg(
        depths=(1, 1),
        channels=(8, 16),
        stem_type="3x3",
        stem_chs=8,
        group_size=4,
        num_features=16,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
    return module.NormFreeNet(config, num_classes=CLASSES)


ENTRIES = [
    Entry(
        name="timm.resnet",
        kind="a deep stem, residual blocks of timm's own",
        make=_resnet,
        batch=images(32),
    ),
    Entry(
        name="timm.vit",
        kind="attention through F.scaled_dot_product_attention, layer scale",
        make=_vit,
        batch=images(8),
        fused_attention=True,
    ),
    Entry(
        name="timm.mixer",
        kind="mixes patches by transposes, no attention",
        make=_mixer,
        batch=images(8),
    ),
    Entry(
        name="timm.efficientnet",
        kind="BatchNormAct2d: batch norm and activation as one module",
        make=_efficientnet,
        batch=images(16),
    ),
    Entry(
        name="timm.nfnet",
        kind="weights standardised by F.batch_norm, no norm of activations, learned gains",
        make=_nfnet,
        batch=images(16),
    ),
]
