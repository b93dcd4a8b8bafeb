"""`tools/metablocks`: from a folder that links to it, and its name in the hints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from metablocks.runs.directory import command

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize("linked", [False, True])
def test_it_finds_its_checkout_through_a_link_and_hands_on_how_it_was_typed(tmp_path, linked):
    """In a checkout of its own, whose Python prints what it is given."""
    tools = tmp_path / "checkout" / "tools"
    tools.mkdir(parents=True)
    shutil.copy(TOOLS / "metablocks", tools)
    (tools / "environment.sh").write_text('python="$root/python"\n')
    python = tools.parent / "python"
    python.write_text('#!/bin/sh\necho "$METABLOCKS_COMMAND" "$@"\n')
    python.chmod(0o755)
    typed = tools / "metablocks"
    if linked:
        typed = tmp_path / "bin" / "mb"
        typed.parent.mkdir()
        typed.symlink_to(tools / "metablocks")
    done = subprocess.run([typed, "run", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{typed} -m metablocks run a b\n"


def test_hints_repeat_the_command_as_it_was_typed(monkeypatch):
    monkeypatch.delenv("METABLOCKS_COMMAND", raising=False)
    assert (
        command("run", "--resume", Path("runs/my run")) == "metablocks run --resume 'runs/my run'"
    )
    monkeypatch.setenv("METABLOCKS_COMMAND", "tools/metablocks")
    assert command("recipes") == "tools/metablocks recipes"
