"""Data sets and models of torchvision load, whatever torch lies beside it."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]

FAKE = """
import sys, torch
if not hasattr(torch.ops.torchvision, "nms"):
    raise RuntimeError("operator torchvision::nms does not exist")
"""


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, every warning an error of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, REPO]))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_real_modules_load_and_the_import_stays_usable() -> None:
    done = python(
        "from metablocks.torchvision_import import torchvision_module as load\n"
        "first = load('datasets')\n"
        "import torchvision, torchvision.datasets\n"
        "assert first is load('datasets') is torchvision.datasets\n"
        "assert first.Omniglot.folder == 'omniglot-py'\n"
        "assert load('models') is torchvision.models\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_an_install_that_works_gets_nothing_declared() -> None:
    done = python(
        "import metablocks.torchvision_import as module\n"
        "try:\n"
        "    import torchvision\n"
        "except RuntimeError:\n"
        "    print('does not import here')\n"
        "else:\n"
        "    module.torchvision_module('datasets'); print(module._DECLARED)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("[]", "does not import here")


def test_missing_operators_are_declared_and_the_half_import_forgotten(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import early\n" + FAKE)
    (package / "early.py").write_text("")
    (package / "datasets.py").write_text("")
    done = python(
        "from metablocks.torchvision_import import torchvision_module as load, _DECLARED\n"
        "assert load('datasets').__file__.endswith('datasets.py') and len(_DECLARED) == 1\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_another_failure_of_the_import_is_passed_on(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('another thing is wrong')")
    done = python(
        "from metablocks.torchvision_import import torchvision_module as load; load('datasets')",
        tmp_path,
    )
    assert done.returncode == 1
    assert "another thing is wrong" in done.stderr


def test_without_torchvision_it_says_which_one_to_install() -> None:
    done = python(
        "import sys; sys.modules['torchvision'] = None\n"
        "import torch, metablocks, metablocks.cli\n"
        "from metablocks.errors import MissingError\n"
        "from metablocks.torchvision_import import torchvision_module\n"
        "try: torchvision_module('datasets')\n"
        "except MissingError as error: print(error)\n"
    )
    assert "torchvision==0." in done.stdout, done.stderr
