"""metablocks: small interchangeable blocks for gradient-based meta-learning in PyTorch."""

from metablocks import laws, rules, tasks
from metablocks.batches import Batches, FullBatch, Minibatches, Stream
from metablocks.errors import MetablocksError
from metablocks.estimators import Adjoint, Estimator, Implicit, Reptile, TaskGradient, Unrolled
from metablocks.executors import (
    CompileWarning,
    Distributed,
    Executor,
    Loop,
    RandomDrawsWarning,
    Vmap,
)
from metablocks.fit import Epoch, Validation, fit
from metablocks.functional import FunctionalModule, ModuleState
from metablocks.inner_loop import Carry, InnerLoop, Trajectory, adapt
from metablocks.learner import Evaluation, MetaGradient, MetaLearner
from metablocks.losses import LearnedLoss, WeightedLoss
from metablocks.models import (
    PerStepBatchNorm,
    append_linear,
    collapse_linear,
    fold_lora,
    fold_tnet,
    insert_lora,
    insert_tnet,
    norm_patterns,
    per_step_batch_norm,
    transform_patterns,
)
from metablocks.order import AnnealedOrder, FirstOrder, Order, SecondOrder, TruncatedOrder
from metablocks.per_step import StepAware
from metablocks.rules import *  # noqa: F403  (the names in its __all__)
from metablocks.runs.loading import LoadedRun, load_run
from metablocks.start import AsLearned, Fixed, Prototypes, Start, ZeroHead, Zeros
from metablocks.step_loss import AnnealedStepLoss, FinalStepLoss, StepLoss, UniformStepLoss
from metablocks.train_maml import train_maml
from metablocks.tuning import choose_executor
from metablocks.types import Batch, Progress, Task, TaskBatch, Tensors

__version__ = "0.1.0"

__all__ = [
    *rules.__all__,
    "Adjoint",
    "AnnealedOrder",
    "AnnealedStepLoss",
    "AsLearned",
    "Batch",
    "Batches",
    "Carry",
    "CompileWarning",
    "Distributed",
    "Epoch",
    "Estimator",
    "Evaluation",
    "Executor",
    "FinalStepLoss",
    "FirstOrder",
    "Fixed",
    "FullBatch",
    "FunctionalModule",
    "Implicit",
    "InnerLoop",
    "LearnedLoss",
    "LoadedRun",
    "Loop",
    "MetaGradient",
    "MetaLearner",
    "MetablocksError",
    "Minibatches",
    "ModuleState",
    "Order",
    "PerStepBatchNorm",
    "Progress",
    "Prototypes",
    "RandomDrawsWarning",
    "Reptile",
    "SecondOrder",
    "Start",
    "StepAware",
    "StepLoss",
    "Stream",
    "Task",
    "TaskBatch",
    "TaskGradient",
    "Tensors",
    "Trajectory",
    "TruncatedOrder",
    "UniformStepLoss",
    "Unrolled",
    "Validation",
    "Vmap",
    "WeightedLoss",
    "ZeroHead",
    "Zeros",
    "adapt",
    "append_linear",
    "choose_executor",
    "collapse_linear",
    "fit",
    "fold_lora",
    "fold_tnet",
    "insert_lora",
    "insert_tnet",
    "laws",
    "load_run",
    "norm_patterns",
    "per_step_batch_norm",
    "tasks",
    "train_maml",
    "transform_patterns",
]
