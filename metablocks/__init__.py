"""metablocks: small interchangeable blocks for gradient-based meta-learning in PyTorch."""

from metablocks import laws, rules, tasks
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
from metablocks.functional import FunctionalModule, ModuleState
from metablocks.inner_loop import Carry, InnerLoop, Trajectory, adapt
from metablocks.learner import Evaluation, MetaGradient, MetaLearner
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
    "Batch",
    "Carry",
    "CompileWarning",
    "Distributed",
    "Estimator",
    "Evaluation",
    "Executor",
    "FinalStepLoss",
    "FirstOrder",
    "FunctionalModule",
    "Implicit",
    "InnerLoop",
    "Loop",
    "MetaGradient",
    "MetaLearner",
    "MetablocksError",
    "ModuleState",
    "Order",
    "PerStepBatchNorm",
    "Progress",
    "RandomDrawsWarning",
    "Reptile",
    "SecondOrder",
    "StepAware",
    "StepLoss",
    "Task",
    "TaskBatch",
    "TaskGradient",
    "Tensors",
    "Trajectory",
    "TruncatedOrder",
    "UniformStepLoss",
    "Unrolled",
    "Vmap",
    "adapt",
    "append_linear",
    "choose_executor",
    "collapse_linear",
    "fold_lora",
    "fold_tnet",
    "insert_lora",
    "insert_tnet",
    "laws",
    "norm_patterns",
    "per_step_batch_norm",
    "tasks",
    "train_maml",
    "transform_patterns",
]
