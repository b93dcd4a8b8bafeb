"""Long trainings: memory, threads and open files stay what they are, whatever the executor."""

import json
import os
import subprocess
import sys

import long_training
import pytest

STEPS = 5500
MOST = 2 * 2**20
"""Bytes that resident memory may grow by in 5 000 meta-steps: pages that the allocator leaves."""


@pytest.mark.long
@pytest.mark.parametrize("case", long_training.CASES)
def test_nothing_grows_in_five_thousand_meta_steps(case):
    """After a warm-up of five hundred; the shapes of tasks change from step to step."""
    ended = subprocess.run(
        [sys.executable, long_training.__file__, case, str(STEPS)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    first, *others = json.loads(ended.stdout)
    for held in others:
        assert held.pop("memory") <= first["memory"] + MOST
        assert held == {name: number for name, number in first.items() if name != "memory"}
