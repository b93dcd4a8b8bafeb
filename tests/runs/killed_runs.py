"""A run that is killed again and again: `python killed_runs.py OUT KILLS`, which only the tests start.

It trains `OUT/whole/…` undisturbed, and `OUT/killed/…` in children of its own (forked, so that nothing is
imported twice), each of which kills itself with SIGKILL at the n-th event of a kind and leaves the run
to the next. The first ten moments are chosen, those after them random. Prints a line of JSON: for each
child the kind of event, the epoch in progress afterwards, and the signal or exit status that ended it.
"""

import json
import os
import random
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
CHOSEN = [
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


def moments(count: int) -> list[tuple[str, int]]:
    """The chosen moments, and random ones to make up `count`, as many of each kind.

    "call" is one of any function. None is later in its process than some meta-steps.
    """
    draw = random.Random(0)
    most = {"meta-step": 3, "validation": 1, "part of a checkpoint": 90, "sync": 9, "rename": 5}
    most |= {"line of a log": 2, "deletion": 1, "call": 60_000}
    kinds = [kind for kind in most for _ in range(-(-count // len(most)))]
    draw.shuffle(kinds)
    return [*CHOSEN, *((kind, draw.randint(1, most[kind])) for kind in kinds)][:count]


def kill_at(kind: str, number: int) -> None:
    """Kill this process at the `number`-th event of a kind, before it takes place."""
    if kind == "call":
        return kill_at_call(number)
    owner, name = EVENTS[kind]
    function, calls = getattr(owner, name), []

    def count(*args, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(owner, name, count)


def kill_at_call(number: int) -> None:
    """Kill this process at the `number`-th call of any function, wherever that is."""
    left = number

    def count(frame, event, argument):
        nonlocal left
        left -= event in ("call", "c_call")
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


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


def epoch(run: Path) -> int:
    """The epoch in progress, by the log, counted from 1."""
    log = RunDirectory(run).metrics
    return 1 + (log.read_text().count("\n") if log.exists() else 0)


if __name__ == "__main__":
    out, kills = Path(sys.argv[1]), moments(int(sys.argv[2]))
    recipe = [*RECIPE, "--set", f"outer.epochs={6 + 3 * len(kills) // 10}"]  # more than they take
    sys.stdout, printed = sys.stderr, sys.stdout
    plots.draw = lambda directory: []
    tqdm.monitor_interval = 0  # no thread, which a fork would not take along
    assert main(["run", *recipe, "--out", str(out / "whole")]) == 0
    assert threading.active_count() == 1
    arguments, ended = [*recipe, "--out", str(out / "killed")], []
    for kill in [*kills, None]:
        status = child(arguments, kill)
        (run,) = (out / "killed").iterdir()
        ended.append((kill and kill[0], epoch(run), status))
        arguments = ["--resume", str(run), "--save-every", "0.000000001", "--quiet"]
    print(json.dumps(ended), file=printed)
