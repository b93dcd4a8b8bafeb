"""The command line of `tools/fuzz`: searches in processes, one report.

Exit status: 0 where nothing was found, 1 where something was, 2 for bad arguments, 130 for Ctrl-C.
"""

import argparse
import json
import queue
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
from typing import Any, TextIO

import torch

from tools.fuzzing.data import draw_data_sets
from tools.fuzzing.search import Found, Search
from tools.fuzzing.trial import attempt

MAIN = Path(__file__).with_name("main.py")
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
    counts: Counter[str] = Counter()
    messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    processes: list[subprocess.Popen[str]] = []
    found, running, status = 0, set(range(jobs)), 0
    ends = time.monotonic() + 60 * minutes + GRACE
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        print(f"seed {seed}, {minutes:g} minutes, {jobs} at a time", flush=True)
        # What is blocked here stays so in them: they never hear of Ctrl-C.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for job in range(jobs):
            processes.append(_start(seed + 1_000_000 * job, minutes, out))
            listener = (job, processes[job], messages)
            threading.Thread(target=_listen, args=listener, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while running and not interrupted.is_set():
            try:
                job, message = messages.get(timeout=POLL)
            except queue.Empty:
                if time.monotonic() < ends:
                    continue
                for job in running:
                    found += _lost(out, seed + 1_000_000 * job, "never came to an end")
                break
            if message is None:
                running.discard(job)
                if code := processes[job].wait():
                    found += _lost(out, seed + 1_000_000 * job, f"ended with status {code}")
            elif "found" in message:
                found += 1
                print(message["found"], flush=True)
            else:
                counts.update(message)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        print("\ninterrupted", file=sys.stderr)
        status = 130
    for job in range(jobs if status else 0):  # none of them is to blame
        _current(out, seed + 1_000_000 * job).unlink(missing_ok=True)
    print(
        f"{counts['ran'] + counts['refused'] + counts['failed']} recipes: {counts['ran']} ran, "
        f"{counts['refused']} were refused with a place, {counts['failed']} failed while a finding "
        f"was made small; {found} finding{'s' * (found != 1)}"
    )
    return status or int(found > 0)


def _start(seed: int, minutes: float, out: Path) -> "subprocess.Popen[str]":
    words = ["--worker", "--seed", str(seed), "--minutes", str(minutes), "--out", str(out)]
    command = [sys.executable, str(MAIN), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _listen(job: int, process: "subprocess.Popen[str]", messages: "queue.Queue[Any]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            messages.put((job, json.loads(line)))
    messages.put((job, None))


def _work(seed: int, minutes: float, out: Path, to: TextIO | None = None) -> int:
    """One process's search; what it does goes to its parent, a line of JSON at a time."""
    stream = to or sys.stdout
    until, told = time.monotonic() + 60 * minutes, 0.0
    current = _current(out, seed)
    current.parent.mkdir(parents=True, exist_ok=True)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=stream, flush=True)

    def tell(text: str) -> None:
        nonlocal told
        current.write_text(text, encoding="utf-8")
        if time.monotonic() > told + 1:
            report()

    def report() -> None:
        nonlocal told
        told = time.monotonic()
        say(dict(search.counts))
        search.counts.clear()

    with tempfile.TemporaryDirectory() as folder:
        search = Search(draw_data_sets(Path(folder)), tell)
        number = seed
        while time.monotonic() < until:
            if finding := search.round(number, until):
                say({"found": _written(finding, out, f"{number}-{len(search.known)}")})
            number += 1
    report()
    current.unlink(missing_ok=True)
    return 0


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


def _current(out: Path, seed: int) -> Path:
    """What a process is at: all that is left of it where it dies."""
    return out / f"running-{seed}.yaml"


def _lost(out: Path, seed: int, what: str) -> int:
    path = _current(out, seed)
    if path.exists():
        print(f"a process {what} at this recipe:\n\n{path.read_text(encoding='utf-8')}")
        print(f"again: tools/fuzz --recipe {path}")
    else:
        print(f"a process {what} before its first recipe")
    return 1


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
