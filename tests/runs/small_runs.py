"""Runs of seconds, in this process and in one that can be killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

SMALL = [  # seconds of work: 8 epochs of 20 meta-steps
    "maml_sinusoid",
    *("--set", "outer.tasks_per_step=4"),
    *("--set", "outer.steps_per_epoch=20"),
    *("--set", "outer.epochs=8"),
    *("--set", "evaluation.tasks=8"),
    *("--set", "evaluation.every=2"),
    *("--set", "hardware.device=cpu"),
    *("--set", "outer.schedule={block: cosine, final: 1e-4}"),
]
FEW = [  # less of it: 3 epochs of 2 meta-steps, each validated
    *SMALL,
    *("--set", "outer.epochs=3"),
    *("--set", "outer.steps_per_epoch=2"),
    *("--set", "evaluation.every=1"),
    "--quiet",
]


def only_run(out: Path) -> Path:
    (run,) = out.iterdir()
    return run


def start(out: Path, *arguments: str, resume: Path | None = None) -> "subprocess.Popen[str]":
    where = ["--resume", str(resume)] if resume else [*SMALL, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "metablocks", "run", *where, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def wait_for_epochs(out: Path, epochs: int) -> Path:
    """The run's directory, once so many epochs are in its log."""
    for _ in range(3000):
        for log in out.glob("*/metrics.jsonl"):
            if log.read_text().count("\n") >= epochs:
                return log.parent
        time.sleep(0.02)
    raise TimeoutError(f"no {epochs} epochs in {out}")
