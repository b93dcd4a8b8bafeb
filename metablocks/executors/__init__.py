"""Executors: how tasks are spread over the hardware."""

from metablocks.executors.base import (
    Executor,
    RandomDrawsWarning,
    Share,
    TaskFunction,
    TaskWork,
    check_tasks,
    share_of,
    total_weight,
)
from metablocks.executors.compiled import CompileWarning
from metablocks.executors.distributed import Distributed, executor_of
from metablocks.executors.loop import Loop
from metablocks.executors.vmap import Vmap

__all__ = [
    "CompileWarning",
    "Distributed",
    "Executor",
    "Loop",
    "RandomDrawsWarning",
    "Share",
    "TaskFunction",
    "TaskWork",
    "Vmap",
    "check_tasks",
    "executor_of",
    "share_of",
    "total_weight",
]
