"""Runs over processes, as torchrun starts them: `python ranks_of_runs.py OUT`, started by the tests.

The processes are forked, so that nothing is imported twice. Prints a line of JSON for each run: its name,
the exit status of each process, what rank 0 printed, and all that went to stderr.

`torchrun … ranks_of_runs.py restarted OUT` is one process of a run whose rank 1 kills itself when it is
first started.
"""

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch
from several_ranks import fork
from tqdm import tqdm

from metablocks.cli import main
from metablocks.errors import DataError
from metablocks.learner import MetaLearner
from metablocks.runs import plots
from metablocks.tasks import Sinusoid

RECIPE = [
    "maml_sinusoid",
    *("--set", "outer.tasks_per_step=3"),
    *("--set", "outer.steps_per_epoch=4"),
    *("--set", "outer.epochs=3"),
    *("--set", "evaluation.tasks=4"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.ensemble=2"),
    *("--set", "evaluation.inner_steps=1"),
    *("--set", "hardware.device=cpu"),
    *("--set", "hardware.precision=float64"),
    "--quiet",
]
EVERY_STEP = ("--save-every", "0.000000001")
FAR = ("--set", "inner.rule[0].init=1e30")


def signalled(number: int, call: int) -> None:
    """This process gets a signal, or for 0 an error, before it takes a meta-step, counted from 1."""
    backward, calls = MetaLearner.backward, []

    def count(*args, **options):
        calls.append(call)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            if not number:
                raise ZeroDivisionError("of one process")
        return backward(*args, **options)

    MetaLearner.backward = count


def without_data(call: int) -> None:
    """This process cannot read its tasks when it asks for some for the `call`-th time."""
    sample, calls = Sinusoid.sample, []

    def count(*args):
        calls.append(call)
        if len(calls) == call:
            raise DataError("cat/1.png: not an image")
        return sample(*args)

    Sinusoid.sample = count


def run(
    name: str, processes: int, *arguments: str, kill: tuple[int, int | None, int] | None = None
) -> None:
    """Run the command in so many processes; in that of rank `kill[0]` comes the signal `kill[1:]`.

    None for its number: that process lacks data.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def work(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            if kill and rank == kill[0]:
                without_data(kill[2]) if kill[1] is None else signalled(*kill[1:])
            status = main(list(arguments))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

        statuses = fork(processes, work)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    print(json.dumps([name, statuses, *texts]), flush=True)


def only(folder: Path) -> str:
    (path,) = folder.iterdir()
    return str(path)


def restarted(out: str) -> int:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        signalled(signal.SIGKILL, 6)
    return main(["run", *RECIPE, *EVERY_STEP, "--out", out])


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.draw = lambda directory: []
    tqdm.monitor_interval = 0  # no thread, which a fork would not take along
    if sys.argv[1] == "restarted":
        sys.exit(restarted(sys.argv[2]))
    out = Path(sys.argv[1])

    def train(
        name: str, processes: int, *more: str, kill: tuple[int, int | None, int] | None = None
    ) -> None:
        run(name, processes, "run", *RECIPE, *more, "--out", str(out / name), kill=kill)

    assert main(["run", *RECIPE, "--out", str(out / "alone")]) == 0
    for processes in (2, 3, 4):  # of 3 tasks
        train(f"of {processes}", processes)
    train("killed", 3, *EVERY_STEP, kill=(1, signal.SIGKILL, 6))
    run("killed, on 2", 2, "run", "--resume", only(out / "killed"), "--quiet")
    train("first killed", 2, *EVERY_STEP, kill=(0, signal.SIGKILL, 6))
    run("first killed, on 3", 3, "run", "--resume", only(out / "first killed"), "--quiet")
    train("broken", 3, *EVERY_STEP, kill=(1, 0, 6))
    run("broken, on 2", 2, "run", "--resume", only(out / "broken"), "--quiet")
    train("first broken", 2, *EVERY_STEP, kill=(0, 0, 6))
    for rank in (0, 1):
        train(f"without data in {rank}", 2, kill=(rank, None, 10))
        train(f"without any data in {rank}", 2, kill=(rank, None, 1))
    train("stopped", 2, kill=(1, signal.SIGTERM, 6))
    run("stopped, on 1", 1, "run", "--resume", only(out / "stopped"), "--quiet")
    run("eval", 2, "eval", only(out / "of 2"), "--checkpoint", "ensemble")
    run("eval last", 2, "eval", only(out / "of 2"), "--checkpoint", "last", "--tasks", "1")
    train("far", 2, *FAR)
    train("skipped", 2, *FAR, "--set", "outer.nonfinite=skip")
    train("measured", 2, "--memory", "4GiB")
    run("no such", 2, "run", "no_such_recipe")
    run("check", 2, "check", "maml_sinusoid")
