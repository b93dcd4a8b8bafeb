"""`tools/metablocks`: from a folder that links to it, and its name in the hints."""

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from metablocks.arguments import parsers
from metablocks.cli import main
from metablocks.errors import command

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
    assert done.stdout == f"{typed} -P -m metablocks run a b\n"


def test_hints_repeat_the_command_as_it_was_typed(monkeypatch):
    monkeypatch.delenv("METABLOCKS_COMMAND", raising=False)
    assert (
        command("run", "--resume", Path("runs/my run")) == "metablocks run --resume 'runs/my run'"
    )
    monkeypatch.setenv("METABLOCKS_COMMAND", "tools/metablocks")
    assert command("recipes") == "tools/metablocks recipes"


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["new"], ["run", "no_such_recipe"], ["run", ""], ["check", "no_such_recipe"]),
        *([name, "--help"] for name in parsers()[1]),
        ["compare", "quickstart", "quickstart"],
    ],
    ids=" ".join,
)
def test_every_command_in_help_hints_and_templates_is_as_it_was_typed(words, monkeypatch, capsys):
    monkeypatch.setenv("METABLOCKS_COMMAND", "my tools/metablocks")
    with contextlib.suppress(SystemExit):
        main(words)
    text = " ".join((output := capsys.readouterr()).out.split() + output.err.split())
    text = re.sub(r"usage: metablocks|-m metablocks", "", text)
    text = text.replace("'my tools/metablocks' ", "")
    commands = "|".join(parsers()[1])
    assert not re.search(rf"metablocks ({commands})\b", text)
