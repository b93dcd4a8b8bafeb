"""The table of numbered laws: what the command prints, and what the package cites."""

import re
from pathlib import Path

import metablocks
from metablocks.cli import main
from metablocks.laws.numbered import LAWS


def test_the_command_prints_every_law(capsys):
    assert main(["laws"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(LAWS)


def test_every_number_that_the_package_cites_is_in_the_table():
    files = Path(metablocks.__file__).parent.rglob("*.py")
    cited = {int(n) for file in files for n in re.findall(r"[Ll]aw (\d+)", file.read_text())}
    assert cited
    assert cited <= set(LAWS)
