"""`compare --plan`: commands for a scheduler, and a comparison of what they leave."""

import shlex

from test_compare import TASKS, TINY, compare, only, rows

from metablocks.cli import main


def test_a_plan_is_a_command_for_each_training_and_its_runs_are_compared(tmp_path):
    out = tmp_path / "a folder"
    names = ["maml_sinusoid", "fomaml_sinusoid"]
    budget = ["--steps", "6", "--seeds", "2", *TASKS, "--out", str(out)]
    status, printed, errors = compare(*names, *budget, *TINY, "--plan")
    assert status == 0
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert [words[:2] for words in commands] == [["metablocks", "run"]] * 4
    assert not (only(out) / "runs").exists()
    for words in commands:
        assert main([*words[1:], "--quiet"]) == 0
    reading = shlex.split(errors.splitlines()[-1].partition("then: ")[2])
    assert reading[:2] == ["metablocks", "compare"]
    assert reading[2] == f"{only(out)}/runs/*"
    runs = map(str, sorted((only(out) / "runs").iterdir()))
    status, _, errors = compare(*runs, "--out", str(tmp_path / "compared"))
    assert (status, errors) == (0, "")
    table = rows(only(tmp_path / "compared"))
    assert [(row["recipe"], row["seeds"], row["meta_steps"]) for row in table] == [
        ("fomaml_sinusoid", "0 1", "6"),
        ("maml_sinusoid", "0 1", "6"),
    ]
