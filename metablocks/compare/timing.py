"""Speed of training on this machine, measured before a comparison that is limited in minutes.

A process of its own, as a run is, times one recipe and prints a line of JSON. Meta-steps are timed at
points spread evenly over the epochs, since an annealed order or step loss changes what a meta-step
costs. At each point the first one, which warms up, does not count, and the median of the others does:
it bears with a busy machine.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from metablocks.compare.entries import Entry
from metablocks.compare.jobs import Display, Job, python, run_jobs
from metablocks.compare.request import Request
from metablocks.errors import RunError
from metablocks.memory import keep_freed_memory
from metablocks.recipe import Experiment, build, load
from metablocks.runs.files import write_text
from metablocks.runs.train import final_scores, meta_step
from metablocks.types import Progress

POINTS = 8
_SECONDS = 0.8  # of timed meta-steps at one point, at least,
_STEPS = 3  # and at least so many
_BATCHES = 4  # of validation tasks


class Pace(NamedTuple):
    """Seconds that training takes."""

    step: float
    """Of one meta-step, the mean over the whole training."""
    validation: float


def measure_paces(trained: Sequence[Entry], request: Request) -> list[Pace]:
    """Time every recipe in processes of its own, as many side by side as runs will be.

    Raises `RunError` if one fails, `KeyboardInterrupt` on Ctrl-C.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for index, entry in enumerate(trained):
            assert entry.recipe is not None
            file, log = Path(folder, f"{index}.yaml"), Path(folder, str(index))
            write_text(file, entry.recipe.to_yaml())
            given = [file, request.allow, request.data, request.device]
            arguments = json.dumps(given, default=str)  # of paths
            timing = ("-m", "metablocks.compare.timing", arguments)
            jobs.append(Job(f"timing {entry.label}", (*python(), *timing), log))
        if run_jobs(jobs, side_by_side=request.jobs, display=Display(jobs, quiet=request.quiet)):
            raise KeyboardInterrupt
        for job in jobs:
            if job.status != 0:
                raise RunError(f"{job.title} failed: {job.error}")
        return [Pace(*json.loads(job.output.read_text().splitlines()[-1])) for job in jobs]


def measure(experiment: Experiment, *, points: int = POINTS, seconds: float = _SECONDS) -> Pace:
    """Time meta-steps at `points` of the training, and a validation.

    The learner trains a little meanwhile; the experiment is not to be used afterwards.
    """
    count = min(points, experiment.epochs)
    middles = [(point + 0.5) * experiment.epochs / count for point in range(count)]
    steps = [_step_time(experiment, epoch, seconds) for epoch in middles]
    return Pace(fmean(steps), _validation_time(experiment))


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
    tasks = min(_BATCHES * batch, all_tasks)
    started = time.perf_counter()
    final_scores(experiment, "validation", tasks=tasks)
    return (time.perf_counter() - started) * all_tasks / tasks


def _main() -> None:
    recipe, allow, data, device = json.loads(sys.argv[1])
    keep_freed_memory()  # as a run does
    experiment = build(load(recipe, (), allow), device=device, data=data)
    print(json.dumps(measure(experiment)))


if __name__ == "__main__":
    _main()
