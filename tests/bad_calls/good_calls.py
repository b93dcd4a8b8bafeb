"""A good call of every block and public function: what it gives beside the defaults."""

import typing
from typing import Any

import torch
import torch.nn.functional as F
from calls import WEIGHTS, half, learner_of, tasks
from torch import nn

import metablocks as mb
from metablocks.models import (
    GRU,
    MLP,
    Conv4,
    Transformer,
    huggingface_model,
    torchvision_classifier,
)
from metablocks.recipe.slots import SLOTS
from metablocks.tasks.base import SPLITS
from metablocks.tasks.torchvision_sets import DATASETS
from metablocks.tasks.transforms import (
    center_crop,
    normalize,
    random_crop,
    random_resized_crop,
    random_rotation,
    resize,
)


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def optimizer():
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)


class Emnist:
    """A data set, as a recipe writes it a block with a folder."""

    fields: typing.ClassVar = {"folder": "."}

    def __len__(self):
        return 1

    def __getitem__(self, row):
        return torch.zeros(1), 0


EPISODES = {"ways": 5, "shots": 1, "queries": 2}
SIZES = {"input_shape": (1, 8, 8), "outputs": 2}
IMAGES = {**SIZES, "layers": 2}
VIT = {"model_type": "vit", "patch_size": 4, "hidden_size": 8, "num_attention_heads": 2}
PARAMETERS = {"parameters": [("w", nn.Parameter(torch.ones(1)))]}

LEARNER = learner_of()

NEEDED: dict[Any, dict[str, Any]] = {
    mb.LearningRate: {"init": 0.1},
    mb.meta_sgd: {"init": 0.1},
    mb.lslr: {"init": 0.1},
    mb.ClipNorm: {"max_norm": 1.0},
    mb.WeightDecay: {"decay": 0.1},
    mb.Proximal: {"strength": 0.1},
    mb.Minibatches: {"size": 1},
    mb.Fixed: {"pattern": "*"},
    mb.Zeros: {"pattern": "*"},
    mb.TruncatedOrder: {"last": 1},
    mb.AnnealedOrder: {"first_order_epochs": 1},
    mb.AnnealedStepLoss: {"epochs": 1},
    mb.LearnedLoss: {"outputs": 2},
    mb.tasks.Linear: {"shots": 1, "queries": 1},
    mb.tasks.Logistic: {"shots": 1, "queries": 1},
    mb.tasks.Strokes: EPISODES,
    mb.tasks.Omniglot: EPISODES,
    mb.tasks.MiniImagenet: EPISODES,
    mb.tasks.CifarFS: EPISODES,
    mb.tasks.TieredImagenet: EPISODES,
    mb.tasks.CUB: EPISODES,
    mb.tasks.Classes: {**EPISODES, "classes": {"train": {"a": torch.zeros(3, 1)}}},
    mb.tasks.Episodes: {**EPISODES, "datasets": Emnist(), "splits": (1, 0, 0)},
    mb.tasks.Mix: {"sources": [mb.tasks.Sinusoid()]},
    mb.tasks.BySplit: dict.fromkeys(SPLITS, mb.tasks.Sinusoid()),
    mb.tasks.Folders: {**EPISODES, "root": ".", "size": 28},
    Conv4: IMAGES,
    MLP: {"input_shape": (1,), "outputs": 1},
    GRU: {"input_shape": (4,), "outputs": 3},
    Transformer: {"input_shape": (4,), "outputs": 3},
    torchvision_classifier: {**SIZES, "name": "shufflenet_v2_x0_5"},
    huggingface_model: {**SIZES, "config": VIT},
    mb.per_step_batch_norm: {"model": net(), "steps": 2},
    mb.PerStepBatchNorm: {"norm": nn.BatchNorm1d(2), "steps": 2},
    mb.append_linear: {"model": net(), "depth": 1},
    mb.collapse_linear: {"model": mb.append_linear(net(), depth=1)},
    mb.insert_tnet: {"model": net()},
    mb.insert_lora: {"model": net(), "rank": 1},
    mb.fold_lora: {"model": mb.insert_lora(net(), rank=1)},
    mb.fold_tnet: {"model": mb.insert_tnet(net())},
    mb.norm_patterns: {"model": net()},
    mb.transform_patterns: {"model": net()},
    mb.FunctionalModule: {"module": net()},
    mb.MetaLearner: {
        "model": nn.Linear(2, 1),
        "loss": F.mse_loss,
        "steps": 1,
        "rule": mb.LearningRate(0.1),
    },
    mb.adapt: {
        "loss_fn": lambda params, batch: (params["w"] ** 2).sum(),
        "params": WEIGHTS,
        "batch": (),
        "rule": mb.LearningRate(0.1).setup(WEIGHTS, 1),
        "steps": 1,
    },
    mb.choose_executor: {"learner": learner_of(), "tasks": tasks()},
    mb.train_maml: {"model": nn.Linear(2, 1), "tasks": [tasks()], "progress": False},
    mb.fit: {
        "learner": LEARNER,
        "tasks": [tasks()],
        "optimizer": torch.optim.SGD(LEARNER.parameters(), lr=0.5),
        "progress": False,
    },
    mb.load_run: {"folder": "."},
    mb.Task: {"support": half(), "query": half()},
    mb.TaskBatch: {"support": half(3), "query": half(3)},
    **{
        SLOTS["optimizer"].blocks[name]: {**PARAMETERS, "lr": 0.1}
        for name in ("adam", "adamw", "sgd")
    },
    random_rotation: {"degrees": 10},
    **{block: {"size": 8} for block in (random_crop, random_resized_crop, center_crop)},
    resize: {"size": (8, 8)},
    normalize: {"mean": [0.5], "std": [0.2]},
    **{block: {"folder": "."} for block in DATASETS.values()},
    **{block: {**PARAMETERS, "maximum": 1.0} for block in SLOTS["clip"].blocks.values()},
    **{
        SLOTS["schedule"].blocks[name]: {"optimizer": optimizer(), "final": 0.1, "epochs": 2}
        for name in ("cosine", "linear")
    },
    SLOTS["schedule"].blocks["constant"]: {"optimizer": optimizer()},
}
