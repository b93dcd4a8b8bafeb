"""What a process holds: kept for what comes, or given back."""

import json
import subprocess
import sys

import pytest

from metablocks.memory import keep_freed_memory, release_freed_memory

FAULTS = """
import resource, torch
from metablocks.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**23)  # 32 MiB, which are 8192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
print([faults() for _ in range(20)][-5:])
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="glibc's allocator alone has the setting")
def test_memory_that_is_kept_is_not_cleared_page_by_page():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 100


@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_what_the_environment_says_of_freed_memory_stands(setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_giving_back_what_is_free_needs_nothing_to_be_free():
    release_freed_memory()
    release_freed_memory()
