"""Executors: how tasks are spread over the hardware."""

from metablocks.executors.base import (
    Executor,
    RandomDrawsWarning,
    TaskFunction,
    TaskWork,
    check_tasks,
    total_weight,
)
from metablocks.executors.compiled import CompileWarning
from metablocks.executors.loop import Loop
from metablocks.executors.vmap import Vmap

__all__ = [
    "CompileWarning",
    "Executor",
    "Loop",
    "RandomDrawsWarning",
    "TaskFunction",
    "TaskWork",
    "Vmap",
    "check_tasks",
    "total_weight",
]
