"""Rows and runs with made-up numbers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from metablocks.compare.table import Row
from metablocks.runs.finished import FinishedRun, Validation
from metablocks.runs.scores import Scores, pool, pool_seeds


def score(mean: float, interval: float = 0.01, **more: Any) -> Scores:
    values = {"mean": mean, "interval": interval, "std": 0.1, "worst_decile": 0.5, "loss": 0.3}
    numbers = {name: [more.pop(name, value)] for name, value in values.items()}
    if "seed_std" in more:
        numbers["seed_std"] = [more.pop("seed_std")]
    return Scores(**{"split": "test", "tasks": 600, "measure": "accuracy", **numbers, **more})


def row_of(recipe: str, *by_seed: Tensor, measure: str = "accuracy", **more: Any) -> Row:
    """A row whose scores are known task by task: `[tasks]` for each seed."""
    each = tuple(pool("test", measure, values[:, None], values[:, None]) for values in by_seed)
    pooled = pool_seeds(each)
    made = row(recipe, pooled.final, measure=measure, **more)
    return replace(made, score=pooled, by_seed=each, seeds=tuple(range(len(each))))


def row(
    recipe: str,
    mean: float,
    interval: float = 0.01,
    seconds: float = 60.0,
    measure: str = "accuracy",
    score_of: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Row:
    values: dict[str, Any] = {
        "title": recipe.upper(),
        "seeds": (0, 1, 2),
        "failed": 0,
        "inner_steps": 5,
        "meta_steps": 2000,
        "tasks_per_step": 8,
        "seconds_per_step": seconds / 2000,
        "peak_memory": 400 * 2**20,
        "memory_beyond_start": 100 * 2**20,
        "train_loss": 0.25,
    }
    return Row(
        recipe=recipe,
        score=score(mean, interval, measure=measure, **score_of),
        seconds=seconds,
        **{**values, **more},
    )


def finished_run(seed: int = 0, **values: Any) -> FinishedRun:
    inner = {"batches": {"block": "full_batch"}}
    outer = {"tasks_per_step": 8}
    defaults: dict[str, Any] = {
        "path": Path(f"runs/made-up-{seed}"),
        "values": {"seed": seed, "name": "Made up", "inner": inner, "outer": outer},
        "record": {"recipe": f"hash-{seed}", "device": "cpu"},
        "steps": 20,
        "training_seconds": 10.0,
        "seconds": 12.0,
        "peak_memory": None,
        "memory_beyond_start": None,
        "train_loss": 0.2,
        "validations": (Validation(10, 5.0, 0.8, 0.1), Validation(20, 10.0, 0.9, 0.1)),
        "test": score(0.9, 0.02, tasks=100),
        "ensemble": None,
        "metrics": [],
        "times": [],
    }
    return FinishedRun(**{**defaults, **values})
