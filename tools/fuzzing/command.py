"""The command line of `tools/fuzz`: searches in processes, one report.

Exit status: 0 where nothing was found, 1 where something was, 2 for bad arguments, 130 for Ctrl-C.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.fuzzing.data import draw_data_sets
from tools.fuzzing.search import Found, Search
from tools.fuzzing.trial import attempt

EXAMPLES = """examples:
  tools/fuzz                              ten minutes from a seed that the clock gives
  tools/fuzz --minutes 30 --jobs 2        longer, in two processes
  tools/fuzz --recipe fuzz_found/7-1.yaml one recipe again, as a finding says
"""
GRACE = 120.0
"""Seconds after the end in which a process may finish its last recipe before it is given up."""
POLL = 0.5
"""Seconds after which Ctrl-C is heard at the latest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Search, or try one recipe again."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    if options.recipe:
        return _again(options.recipe)
    seed = options.seed if options.seed is not None else int(time.time()) % 100_000
    if options.worker:
        return _work(seed, options.minutes, options.out)
    return _search(seed, options.minutes, options.jobs, options.out)


def _search(seed: int, minutes: float, jobs: int, out: Path) -> int:
    ends = time.monotonic() + 60 * minutes + GRACE
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        print(f"seed {seed}, {minutes:g} minutes, {jobs} at a time", flush=True)
        # What is blocked here stays so in them: they never hear of Ctrl-C.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for number in range(seed, seed + 1_000_000 * jobs, 1_000_000):
            processes[number] = _start(number, minutes, out)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while any(process.poll() is None for process in processes.values()):
            if interrupted.wait(POLL) or time.monotonic() > ends:
                break
    finally:
        statuses = {number: process.poll() for number, process in processes.items()}
        for process in processes.values():
            process.kill()
            process.wait()
        signal.signal(signal.SIGINT, before)
    counts: Counter[str] = Counter()
    for number, status in statuses.items():
        counts += _ended(out, number, status, interrupted=interrupted.is_set())
    if interrupted.is_set():
        print("\ninterrupted", file=sys.stderr)
    found = counts["found"]
    print(
        f"{counts['ran'] + counts['refused'] + counts['failed']} recipes: {counts['ran']} ran, "
        f"{counts['refused']} were refused with a place, {counts['failed']} failed while a finding "
        f"was made small; {found} finding{'s' * (found != 1)}"
    )
    return 130 if interrupted.is_set() else int(found > 0)


def _start(seed: int, minutes: float, out: Path) -> "subprocess.Popen[bytes]":
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = ["--worker", "--seed", str(seed), "--minutes", str(minutes), "--out", str(out)]
    return subprocess.Popen([sys.executable, "-m", "tools.fuzzing.command", *words], env=env)


def _work(seed: int, minutes: float, out: Path) -> int:
    """One process's search; what it is at, and its counts, stand in a file, for when it dies."""
    until = time.monotonic() + 60 * minutes
    path = _state(out, seed)
    path.parent.mkdir(parents=True, exist_ok=True)

    def tell(text: str) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"at": text, "counts": search.counts}), encoding="utf-8")
        new.replace(path)

    with tempfile.TemporaryDirectory() as folder:
        search = Search(draw_data_sets(Path(folder)), tell)
        number = seed
        while time.monotonic() < until:
            if finding := search.round(number, until):
                search.counts["found"] += 1
                print(_written(finding, out, f"{number}-{len(search.known)}"), flush=True)
            number += 1
    tell("")
    return 0


def _state(out: Path, seed: int) -> Path:
    return out / f"running-{seed}.json"


def _ended(out: Path, seed: int, status: int | None, *, interrupted: bool) -> "Counter[str]":
    """The counts of a process; one that has died, and was not interrupted, is a finding."""
    path = _state(out, seed)
    state: dict[str, Any] = {"at": "", "counts": {}}
    path.with_suffix(".new").unlink(missing_ok=True)
    if path.exists():
        state = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    counts = Counter(state["counts"])
    if status == 0 or interrupted:
        return counts
    counts["found"] += 1
    what = "never came to an end" if status is None else f"ended with status {status}"
    if not state["at"]:
        print(f"a process {what} before its first recipe")
        return counts
    recipe = path.with_suffix(".yaml")
    recipe.write_text(state["at"], encoding="utf-8")
    print(f"a process {what} at this recipe:\n\n{state['at']}")
    print(f"again: tools/fuzz --recipe {recipe}")
    return counts


def _again(path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = attempt(path.read_text(encoding="utf-8"), draw_data_sets(Path(folder)))
        except Exception:
            traceback.print_exc()
            return 1
    print(f"refused: {outcome.refused}" if outcome.refused else "runs")
    return 0


def _written(finding: Found, out: Path, name: str) -> str:
    """Write a finding below `out`; what to print of it."""
    path = out / f"{name}.yaml"
    path.write_text(finding.text, encoding="utf-8")
    path.with_suffix(".txt").write_text(finding.error, encoding="utf-8")
    return (
        f"\n{finding.error}\nfrom this recipe ({path}):\n\n{finding.text}\n"
        f"again: tools/fuzz --recipe {path}\n"
    )


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"{text} minutes; it takes a number above 0")
    return value


def _jobs(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} processes; it takes 1 or more")
    return value


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz",
        description="Random recipes over every slot: each runs with finite numbers, or is refused "
        "with its place when it is built. What does neither is made small and written down.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, help="where to begin; from the clock unless given")
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes (1)")
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz_found"), help="folder of findings (fuzz_found)"
    )
    parser.add_argument("--recipe", type=_file, metavar="FILE", help="try this one recipe, no more")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
