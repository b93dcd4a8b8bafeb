"""On any machine: what only a device shows, on one like CUDA and on one like mps, without float64."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# Ten seconds each or more: PyTorch and the whole command, in a process that has the device.
@pytest.mark.parametrize("device", [pytest.param("pretend", marks=pytest.mark.long), "pretend-mps"])
def test_commands_laws_and_learners_run_on_the_pretend_device(device):
    files = [HERE / "on_pretend_device.py", HERE / "laws" / "test_mask.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, f"--device={device}", *map(str, files)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
