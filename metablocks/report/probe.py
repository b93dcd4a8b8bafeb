"""How fast a recipe trains here: `python -m metablocks.report.probe RECIPE.yaml`, a line of JSON.

A process of its own, as a run is. Meta-steps are timed at points spread evenly over the epochs, since
an annealed order or step loss changes what a meta-step costs. At each point the first one, which
warms up, does not count, and the median of the others does: it bears with a busy machine.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from metablocks.recipe import Experiment, build, load
from metablocks.report.budgets import Pace
from metablocks.runs.train import final_scores, meta_step
from metablocks.types import Progress

POINTS = 8
_SECONDS = 0.4  # of timed meta-steps at one point, at least,
_STEPS = 3  # and at least so many
_BATCHES = 4  # of validation tasks


@dataclass(frozen=True)
class Timing:
    """What was measured, in seconds."""

    steps: tuple[float, ...]
    """Of a meta-step, at each point of the training."""
    validation: float


def measure(experiment: Experiment, *, points: int = POINTS, seconds: float = _SECONDS) -> Timing:
    """Times of meta-steps over the training, and of a validation.

    The learner trains a little meanwhile; the experiment is not to be used afterwards.
    """
    epochs = experiment.epochs
    count = min(points, epochs)
    middles = [(point + 0.5) * epochs / count for point in range(count)]
    steps = tuple(_step_time(experiment, epoch, seconds) for epoch in middles)
    return Timing(steps, _validation_time(experiment))


def combine(rounds: Sequence[Timing]) -> Pace:
    """The pace that several rounds tell: at each point the fastest, which was disturbed the least.

    >>> combine([Timing((1.0, 4.0), 9.0), Timing((2.0, 3.0), 8.0)])
    Pace(step=2.0, validation=8.0)
    """
    points = zip(*(timing.steps for timing in rounds), strict=True)
    return Pace(fmean(map(min, points)), min(timing.validation for timing in rounds))


def _step_time(experiment: Experiment, epoch: float, least: float) -> float:
    progress = Progress(epoch)
    meta_step(experiment, 0, progress)
    times: list[float] = []
    while len(times) < _STEPS or sum(times) < least:
        started = time.perf_counter()
        meta_step(experiment, len(times) + 1, progress)
        times.append(time.perf_counter() - started)
    return median(times)


def _validation_time(experiment: Experiment) -> float:
    batch, all_tasks = experiment.tasks_per_step, experiment.evaluation.tasks
    final_scores(experiment, "validation", tasks=min(batch, all_tasks))
    some = min(_BATCHES * batch, all_tasks)
    started = time.perf_counter()
    final_scores(experiment, "validation", tasks=some)
    return (time.perf_counter() - started) * all_tasks / some


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args()
    experiment = build(load(args.recipe, (), args.allow), device=args.device, data=args.data)
    print(json.dumps(asdict(measure(experiment))))


if __name__ == "__main__":
    _main()
