"""The curves of a run for TensorBoard, in its folder: `metablocks run … --tensorboard`."""

import errno
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metablocks.errors import MissingError
from metablocks.runs.files import writing

Watch = Callable[[Mapping[str, Any]], object]
"""Gets the lines of both logs of an epoch, as one, once they are written."""


@contextmanager
def curves(folder: Path, step: int) -> Iterator[Watch]:
    """Write what is watched into `folder`; what was written for a meta-step above `step` is replaced.

    Raises `MissingError` without the package tensorboard, and `RunError` where it cannot be written.
    """
    with writing(folder):
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "a link, not a folder")
        writer = summary_writer()(str(folder), purge_step=step + 1)

    def watch(row: Mapping[str, Any]) -> None:
        with writing(folder):
            for tag, value in scalars(row).items():
                writer.add_scalar(tag, value, row["step"])
            writer.flush()

    try:
        yield watch
    finally:
        with writing(folder):
            writer.close()


def summary_writer() -> Any:
    """The writer's class. Raises `MissingError` without the package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError(
            f"--tensorboard needs the package tensorboard ({error}): "
            "pip install 'metablocks[tensorboard]'"
        ) from error
    return SummaryWriter


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch by their tags; validations after the last inner step.

    >>> row = {"step": 5, "lr": [0.001], "train_loss": 4.0, "seconds": 1.5, "peak_memory": None}
    >>> scalars(row)
    {'train/loss': 4.0, 'train/lr': 0.001, 'epoch/seconds': 1.5}
    """
    rates, judged = row["lr"], row.get("validation")
    values = {"train/loss": row["train_loss"]}
    for number, rate in enumerate(rates):
        values["train/lr" if len(rates) == 1 else f"train/lr {number}"] = rate
    values |= {f"train/{name}": value for name, value in row.get("metrics", {}).items()}
    if judged:
        values["validation/loss"] = judged["loss"][-1]
        values[f"validation/{judged['measure']}"] = judged["mean"][-1]
    for name in ("seconds", "training_seconds", "peak_memory"):
        values[f"epoch/{name}"] = row.get(name)
    return {
        tag: value for tag, value in values.items() if value is not None and math.isfinite(value)
    }
