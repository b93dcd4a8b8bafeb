"""Law 14: a run that stops and resumes from its checkpoint is the run that never stopped."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metablocks.errors import LawError
from metablocks.laws.compare import fixed_draws
from metablocks.recipe import Experiment
from metablocks.runs import checkpoint
from metablocks.runs.state import TrainingState
from metablocks.runs.train import meta_step
from metablocks.types import Progress


def goes_on_bit_for_bit(make: Callable[[], Experiment], *, first: int = 1, then: int = 1) -> None:
    """Law 14: n + m meta-steps are n, a checkpoint, and m by a new experiment, bit for bit.

    `make` builds the experiment; an epoch ends after every meta-step. Compared are the checkpoints
    at the end: parameters, buffers, the optimiser and its schedule, losses, random states.

    >>> from metablocks.recipe import build, load
    >>> goes_on_bit_for_bit(lambda: build(load("reptile_sinusoid", ["hardware.device=cpu"])))
    """
    with TemporaryDirectory() as folder, fixed_draws():
        stopped, ends = Path(folder) / "stopped.pt", [Path(folder) / f"{n}.pt" for n in range(2)]
        whole, half, state = make(), make(), TrainingState()
        torch.manual_seed(0)
        _train(half, state, first)
        checkpoint.save(stopped, half, state)
        state = TrainingState()
        torch.manual_seed(0)
        _train(whole, state, first + then)
        checkpoint.save(ends[0], whole, state)
        resumed = make()
        torch.manual_seed(12345)
        state = checkpoint.restore(stopped, resumed)
        _train(resumed, state, then)
        checkpoint.save(ends[1], resumed, state)
        same_checkpoint(ends[1], ends[0])


def same_checkpoint(got: Path, expected: Path) -> None:
    """Law 14: two checkpoints hold the same, bit for bit."""
    mine, theirs = (_leaves(path) for path in (got, expected))
    if mine.keys() != theirs.keys():
        raise LawError(f"resume: one of two has {', '.join(sorted(mine.keys() ^ theirs.keys()))}")
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            if not torch.equal(mine[name], value):
                apart = float((mine[name].double() - value.double()).abs().max())
                raise LawError(f"resume: {name} is another: by {apart:.1e}")
        elif mine[name] != value:
            raise LawError(f"resume: {name} is {mine[name]!r}, expected {value!r}")


def _train(experiment: Experiment, state: TrainingState, steps: int) -> None:
    for _ in range(steps):
        progress = Progress(state.step / experiment.steps_per_epoch)
        state.record(meta_step(experiment, state.step, progress))
        if experiment.scheduler:
            experiment.scheduler.step()


def _leaves(path: Path) -> dict[str, Any]:
    """The leaves of a checkpoint, by their path."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    leaves, _ = pytree.tree_flatten_with_path(content)
    return {pytree.keystr(place): leaf for place, leaf in leaves}
