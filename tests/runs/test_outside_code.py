"""Files of somebody else's run no code: only `--allow` on the command line of a call allows it."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, only_run

from metablocks.cli import main
from metablocks.recipe import load

TINY = [*SMALL, "--set", "outer.epochs=1", "--set", "outer.steps_per_epoch=1", "--quiet"]
ATTACK = """
from pathlib import Path
from metablocks.rules import LearningRate

Path({marker!r}).write_text("this code ran")

class Rule(LearningRate):
    def __init__(self):
        super().__init__(0.005)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs with nothing wrong about them."""
    out = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        assert main(["run", *TINY, "--set", f"seed={seed}", "--out", str(out / f"{seed}")]) == 0
    return [only_run(out / f"{seed}") for seed in (0, 1)]


@pytest.fixture
def attack(finished, tmp_path, monkeypatch):
    """Copies of the runs, whose two text files ask for a module that leaves a mark when imported."""
    marker = tmp_path / "the code ran"
    (tmp_path / "attacking.py").write_text(ATTACK.format(marker=str(marker)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runs = []
    for number, run in enumerate(finished):
        copy = Path(shutil.copytree(run, tmp_path / f"run-{number}"))
        rule = "  rule: [{block: attacking:Rule}]\n"
        lines = (copy / "recipe.yaml").read_text().splitlines(keepends=True)
        start = next(i for i, line in enumerate(lines) if line.startswith("  rule:"))
        end = next(i for i, line in enumerate(lines) if i > start and line[:3].strip())
        (copy / "recipe.yaml").write_text("".join([*lines[:start], rule, *lines[end:]]))
        record = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps(record | {"allow": ["attacking"]}))
        runs.append(copy)
    yield runs, marker
    sys.modules.pop("attacking", None)


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{run}"],
        ["eval", "{run}", "--checkpoint", "last"],
        ["run", "--resume", "{run}"],
        ["run", "{run}/recipe.yaml"],
        ["run", "{run}/recipe.yaml", "--resume", "{run}"],
        ["check", "{run}/recipe.yaml"],
        ["check", "{run}/recipe.yaml", "--gradients"],
        ["show", "{run}/recipe.yaml"],
        ["compare", "{run}/recipe.yaml", "maml_sinusoid"],
    ],
    ids=" ".join,
)
def test_what_a_file_names_is_not_imported(command, attack, capsys):
    (run, _), marker = attack
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main([word.format(run=run) for word in command]) == 2
    printed = capsys.readouterr().err
    assert "to run it, allow it: --allow attacking" in printed
    hint = "this run was made with --allow attacking; if you trust that code, add --allow attacking"
    assert (hint in printed) == (f"{run}/recipe.yaml" not in [w.format(run=run) for w in command])
    assert not marker.exists()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_finished_runs_are_compared_without_their_code(attack, tmp_path):
    runs, marker = attack
    out = str(tmp_path / "out")
    assert main(["compare", *map(str, runs), "--out", out, "--quiet"]) == 0
    assert main(["compare", *map(str, runs), "maml_sinusoid", "--out", out, "--quiet"]) == 2
    assert not marker.exists()


def test_allowed_on_the_command_line_it_is(attack, capsys):
    """So the attack is one: with `--allow` the module is imported, and leaves its mark."""
    (run, _), marker = attack
    assert main(["eval", str(run), "--allow", "attacking"]) == 1
    assert "was written with another recipe" in capsys.readouterr().err
    assert marker.exists()


def test_a_run_records_the_file_and_the_hash_of_code_from_outside(finished, tmp_path, monkeypatch):
    file = tmp_path / "recorded.py"
    file.write_text(
        "from metablocks import LearningRate\n\ndef rule():\n    return LearningRate(0.005)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--set", "inner.rule=[{block: recorded:rule}]", "--allow", "recorded"]
    assert main(["run", *TINY, *words, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((only_run(tmp_path / "out") / "run.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["code"] == {"recorded": {"file": str(file.resolve()), "sha256": digest}}
    assert json.loads((finished[0] / "run.json").read_text())["code"] == {}
    sys.modules.pop("recorded")


@pytest.mark.parametrize(
    "allow", ["attacking", ["no name; at all"], [1, None], {"attacking": 1}, None, "absent"]
)
def test_a_record_that_holds_no_names_of_packages_gives_no_hint(allow, attack, capsys):
    (run, _), marker = attack
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"allow": allow}))
    assert main(["eval", str(run)]) == 2
    printed = capsys.readouterr().err
    assert "to run it, allow it: --allow attacking" in printed
    assert "made with" not in printed
    assert not marker.exists()


def test_no_hint_where_nothing_outside_was_used(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (copy / "recipe.yaml").write_text(load("maml_sinusoid").to_yaml().replace("steps:", "stps:"))
    assert main(["eval", str(copy)]) == 2
    assert "made with" not in capsys.readouterr().err
