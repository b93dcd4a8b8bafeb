"""A run that is killed at chosen moments: `python killed_runs.py OUT`, which only the test starts.

It trains `OUT/whole/…` undisturbed, and `OUT/killed/…` in children of its own (forked, so that nothing is
imported twice), each of which kills itself with SIGKILL at the n-th event of a kind and leaves the run
to the next. Prints a line of JSON: the signal or exit status that ended each child.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from metablocks.cli import main
from metablocks.learner import MetaLearner
from metablocks.runs import plots, sealed
from metablocks.runs.directory import RunDirectory

RECIPE = [
    "maml_sinusoid",
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "outer.steps_per_epoch=3"),
    *("--set", "outer.epochs=9"),
    *("--set", "evaluation.tasks=4"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.ensemble=2"),
    *("--set", "hardware.device=cpu"),
    *("--save-every", "0.000000001"),  # a checkpoint after every meta-step
    "--quiet",
]
EVENTS = {
    "meta-step": (MetaLearner, "backward"),
    "validation": (MetaLearner, "evaluate"),
    "part of a checkpoint": (sealed._Summing, "write"),
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "line of a log": (RunDirectory, "append"),
    "deletion": (RunDirectory, "keep_members"),
}
KILLS = [
    ("meta-step", 2),
    ("validation", 1),
    ("part of a checkpoint", 30),
    ("rename", 2),
    ("line of a log", 1),
    ("sync", 9),
    ("line of a log", 2),
    ("rename", 5),
    ("deletion", 1),
    ("meta-step", 4),
]


def kill_at(kind: str, number: int) -> None:
    """Kill this process at the `number`-th event of a kind, before it takes place."""
    owner, name = EVENTS[kind]
    function, calls = getattr(owner, name), []

    def count(*args, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(owner, name, count)


def child(arguments: list[str], kill: tuple[str, int] | None) -> int:
    """Run the command in a child; the signal (negative) or exit status that ended it."""
    process = os.fork()
    if not process:
        try:
            if kill:
                kill_at(*kill)
            os._exit(main(["run", *arguments]))
        finally:
            os._exit(99)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    sys.stdout, printed = sys.stderr, sys.stdout
    plots.draw = lambda directory: []
    tqdm.monitor_interval = 0  # no thread, which a fork would not take along
    assert main(["run", *RECIPE, "--out", str(out / "whole")]) == 0
    assert threading.active_count() == 1
    statuses = [child([*RECIPE, "--out", str(out / "killed")], KILLS[0])]
    (run,) = (out / "killed").iterdir()
    resume = ["--resume", str(run), "--save-every", "0.000000001", "--quiet"]
    statuses += [child(resume, kill) for kill in [*KILLS[1:], None]]
    print(json.dumps(statuses), file=printed)
