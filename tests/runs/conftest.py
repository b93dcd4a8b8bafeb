"""A finished run of seconds, once for all tests that look at one or damage a copy of it."""

import shutil
from pathlib import Path

import pytest
from small_runs import FEW, only_run

from metablocks.cli import main


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr("metablocks.runs.plots.draw", lambda directory: [])


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", *FEW, "--out", str(out)]) == 0
    return only_run(out)


@pytest.fixture
def run(undisturbed, tmp_path):
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))
