"""One meta-step of a run again, in float64 and with anomaly detection: why is it not finite?

    the nearest checkpoint before it, or the beginning → the meta-steps between, as they were → the step

The step is judged as the run computed it, and then in float64 under `Loop`, every task by itself,
where autograd says which operation makes the first nan. What is drawn at random within a task (dropout)
is drawn from the run's random state at the step, but is not, number for number, what the run drew:
other tasks came before it, and float64 draws otherwise.
"""

import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from metablocks.devices import has_float64
from metablocks.errors import RecipeError, RunError, first_line
from metablocks.learner import MetaGradient, MetaLearner
from metablocks.meta_steps import nonfinite_names, single
from metablocks.recipe import Experiment, from_text
from metablocks.runs import checkpoint
from metablocks.runs.directory import RunDirectory
from metablocks.runs.loading import build_seeded, open_run
from metablocks.runs.state import TrainingState
from metablocks.runs.train import advance, training_tasks
from metablocks.types import Progress, Tasks


class Replayed(NamedTuple):
    """The result of `replay`: a report, and whether every task is finite in float64."""

    text: str
    finite: bool


def replay(
    run_dir: Path,
    step: int,
    *,
    allow: Sequence[str] = (),
    data: Path | None = None,
    device: str | None = None,
) -> Replayed:
    """Repeat meta-step `step`, counted from 1, and report what is found; writes nothing.

    Raises `RecipeError` for a step that the run does not have, and `RunError` if nothing before it is
    kept, or one before it is not finite.
    """
    directory, recipe, folder = open_run(run_dir, allow, data)
    experiment = build_seeded(recipe, folder, device)
    total = experiment.epochs * experiment.steps_per_epoch
    if step > total:
        raise RecipeError(f"--step {step}: {run_dir} has {total} meta-steps")
    state, origin = _restore_before(directory, experiment, step - 1)
    if origin is None and "from" in directory.read_record():
        raise RunError(
            f"{run_dir}: no checkpoint of before meta-step {step} is left, and the run began with the "
            "weights of another"
        )
    advance(experiment, state, step - 1)
    learner, precision = experiment.learner, recipe.at("hardware.precision")
    progress = Progress(state.step / experiment.steps_per_epoch)
    with experiment.precision():
        result = learner.meta_gradient(training_tasks(experiment, state.step), progress=progress)
    device = str(experiment.device) if has_float64(experiment.device) else "cpu"
    exact = ["hardware.precision=float64", "hardware.executor={block: loop}"]
    drawn = torch.get_rng_state()
    precise = from_text(recipe.to_yaml(), recipe.source, exact, recipe.allow)
    twin = build_seeded(precise, folder, device)
    twin.learner.load_state_dict(learner.state_dict())
    tasks, first, finite = training_tasks(twin, state.step), state.step * twin.tasks_per_step, True
    lines = [
        f"{recipe.name}, meta-step {step}, by way of {origin or 'the beginning'}",
        f"as trained, in {precision}: {_words(result)}",
        "in float64, each task by itself, by its index in the source:",
    ]
    for place in range(len(tasks)):
        torch.set_rng_state(drawn)
        words, is_finite = _judge(twin.learner, single(tasks, place), progress)
        finite &= is_finite
        lines.append(f"  task {first + place}: {words}")
    if finite and result.nonfinite:
        lines.append(f"finite in float64: the range or the precision of {precision} is not enough")
    return Replayed("\n".join(lines), finite)


def _restore_before(
    directory: RunDirectory, experiment: Experiment, steps: int
) -> tuple[TrainingState, str | None]:
    """Put back the newest checkpoint after at most so many meta-steps, and return its name.

    The name is None if there is none: the beginning is nearest.
    """
    found: list[tuple[int, Path]] = []
    for path in sorted(directory.path.glob("*.pt")):
        with suppress(RunError):
            found.append((checkpoint.read_state(path, experiment.recipe).step, path))
    found = [each for each in found if each[0] <= steps]
    if not found:
        return TrainingState(), None
    taken, nearest = max(found)
    return checkpoint.restore(nearest, experiment), f"{nearest.name} (after meta-step {taken})"


def _judge(learner: MetaLearner, task: Tasks, progress: Progress) -> tuple[str, bool]:
    """The loss and gradient of a task in words, and whether they are finite."""
    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        torch.autograd.set_detect_anomaly(True),
    ):
        try:
            result = learner.meta_gradient(task, progress=progress)
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            places = [_place(str(warning.message)) for warning in caught]
            return f"{first_line(error)}{''.join(places)}", False
    return _words(result), result.nonfinite is None


def _words(result: MetaGradient) -> str:
    names = nonfinite_names(result)
    gradient = f"not finite: the gradient of {names}" if names else "every gradient is finite"
    return f"loss {float(result.loss):.6g}; {gradient}"


def _place(message: str) -> str:
    """The line of code that made an operation, from anomaly detection's warning about it.

    The innermost that is neither torch's nor metablocks', or the innermost.

    >>> _place('''Error detected in PowBackward0. Traceback of forward call that caused the error:
    ...   File "/my/net.py", line 7, in forward
    ...     return x ** 0.5
    ... ''')
    ' made at /my/net.py:7: return x ** 0.5'
    """
    frames = re.findall(r'File "(.*)", line (\d+), in .*\n +(.*)', message)
    inside = [str(Path(torch.__file__).parent), str(Path(__file__).parents[1])]
    own = [frame for frame in frames if not frame[0].startswith(tuple(inside))]
    path, line, code = (own or frames or [("", "", "")])[-1]
    return f" made at {path}:{line}: {code}" if frames else ""
