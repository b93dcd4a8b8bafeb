"""The command: help, typos, exit statuses, pipes."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import metablocks
from metablocks import arguments, cli
from metablocks.arguments import parsers
from metablocks.cli import main
from metablocks.errors import RunError
from metablocks.recipe import load
from metablocks.recipe.schema import fields
from metablocks.recipe.slots import SLOTS

COMMANDS = [
    "run",
    "check",
    "show",
    "blocks",
    "new",
    "recipes",
    "schema",
    "eval",
    "replay",
    "compare",
    "report",
    "verify",
    "laws",
]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu"], 'did you mean "run"?'),
        (
            ["check", "quickstart", "--sett", "a=1"],
            'unknown argument --sett; did you mean "--set"?',
        ),
        (["run", "quickstart", "--devcie=cpu"], '--devcie=cpu; did you mean "--device"?'),
        (["--vresion"], 'unknown argument --vresion; did you mean "--version"?'),
        (["recipes", "extra"], "unknown argument extra"),
        (["run", "quickstart", "--epochs", "3"], "--epochs; a field is set by --set PATH=VALUE"),
        ([], "a command is missing; it is one of run, check, show, blocks, new, recipes"),
        (["check"], "RECIPE"),
        (["check", "quickstart", "--set"], "argument --set: expected one argument"),
        (["eval", "x", "--tasks", "0"], "takes a whole number, 1 or more, given 0"),
        (["eval", "x", "--steps", "two"], "takes a whole number, 0 or more, given two"),
        (
            ["eval", "x", "--seed", "4294967296"],
            "0 to 4294967295, given 4294967296",
        ),
        (["eval", "x", "--split", "tset"], 'did you mean "test"?'),
        (["eval", "x", "--checkpoint", "lats"], 'did you mean "last"?'),
        (["run", "quickstart", "--data", "nowhere"], "nowhere is not a folder"),
        (
            ["run", "quickstart", "--memory", "lots"],
            "argument --memory: memory is 'lots'; it takes",
        ),
        (["run", "quickstart", "--memory", '4GiB"'], "argument --memory: memory is '4GiB\"'; it"),
        (["run"], "metablocks run: no recipe; give one, or --resume RUN_DIR"),
        (["run", "--resume", "nowhere"], "nowhere: no such folder; give one that metablocks run"),
        (["run", "quickstart", "--resume", "nowhere"], "nowhere: no such folder; give one that"),
        (["eval", "."], ".: has no recipe.yaml; it is not the folder of a run"),
        (["blocks", "rul"], 'no slot is called "rul"; did you mean "rule"?'),
        (["blocks", "xyz"], 'no slot is called "xyz"; there are: tasks, model, surgery, '),
        (["blocks", "annealed"], '"annealed"; it is a block of order and step_loss'),
    ],
)
def test_wrong_arguments_exit_with_2_and_a_reason(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"examples:\n  metablocks {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_argument_is(command):
    actions = parsers()[1][command]._actions
    assert [action.dest for action in actions if not action.help] == []


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"metablocks {metablocks.__version__}\n"


def test_recipes_lists_name_title_and_citation(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split("  ")[0] == "maml_sinusoid" and line.endswith("Finn, Abbeel, Levine 2017")
        for line in lines
    )


@pytest.mark.parametrize("slot", SLOTS)
def test_blocks_lists_every_block_and_field_of_a_slot(slot, capsys):
    assert main(["blocks", slot]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{slot}: {SLOTS[slot].question}\n")
    for name, target in SLOTS[slot].blocks.items():
        assert f"\n  {name} ({target.__module__}:{target.__qualname__})\n" in out
    for name in SLOTS[slot].context:
        assert f"- {name} " not in out


def test_blocks_takes_types_defaults_equation_and_source_from_the_code(capsys):
    assert main(["blocks"]) == 0
    out = capsys.readouterr().out
    assert "- granularity  one of scalar, layer, tensor, parameter; default scalar\n" in out
    assert "- lr            a finite number at least 0; required\n" in out
    assert "u = −α ∘ g" in out
    assert "v_k = max(1/N − e/(N·E), 0.03/N)" in out
    assert "Source: Kingma, Ba 2015" in out


def test_schema_has_every_block_and_field(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) >= {"name", "inner", "hardware"}
    for slot in SLOTS.values():
        entries = [
            e["properties"] for e in schema["$defs"][slot.name]["anyOf"] if "properties" in e
        ]
        known = {entry["block"].get("const"): set(entry) - {"block"} for entry in entries}
        for name, target in slot.blocks.items():
            assert known[name] == set(fields(target, slot.context))


@pytest.fixture
def trainer(monkeypatch):
    calls = []

    def train_recipe(recipe, **arguments):
        calls.append((recipe, arguments))
        return 0

    monkeypatch.setattr("metablocks.runs.train_recipe", train_recipe, raising=False)
    return calls


def test_run_hands_over_the_recipe_and_the_arguments(trainer, tmp_path, capsys):
    argv = ["run", "quickstart", "--set", "seed=3", "--out", str(tmp_path), "--quiet"]
    assert main(argv) == 0
    recipe, arguments = trainer[0]
    assert recipe.hash == load("quickstart", ["seed=3"]).hash
    assert arguments == {
        "out": tmp_path,
        "data": None,
        "device": None,
        "resume": None,
        "start": None,
        "save_every": 10.0,
        "quiet": True,
        "tensorboard": False,
        "argv": argv,
    }


def test_resume_takes_the_recipe_of_the_run(trainer, tmp_path):
    (tmp_path / "recipe.yaml").write_text(load("maml_sinusoid").to_yaml())
    assert main(["run", "--resume", str(tmp_path)]) == 0
    assert trainer[0][0].hash == load("maml_sinusoid").hash
    assert trainer[0][1]["resume"] == tmp_path


def test_eval_hands_over_its_arguments(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        "metablocks.runs.evaluate_run",
        lambda run_dir, **arguments: calls.append((run_dir, arguments)) or 0,
        raising=False,
    )
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "run.json").write_text('{"recipe": "", "data": {}}')
    assert main(["eval", str(tmp_path), "--steps", "0", "--tasks", "7", "--allow", "pkg"]) == 0
    assert calls == [
        (
            tmp_path,
            {
                "allow": ["pkg"],
                "checkpoint": "best",
                "tasks": 7,
                "steps": 0,
                "split": "test",
                "seed": None,
                "data": None,
                "device": None,
            },
        )
    ]


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (RunError("the disk is full"), 1, "the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_run_that_fails_or_is_stopped_says_so_by_its_status(
    raised, status, message, monkeypatch, capsys
):
    def train_recipe(recipe, **arguments):
        raise raised

    monkeypatch.setattr("metablocks.runs.train_recipe", train_recipe, raising=False)
    assert main(["run", "quickstart"]) == status
    assert capsys.readouterr().err == message


def test_output_into_a_pipe_that_closes_early_is_no_error():
    root = Path(metablocks.__file__).parents[1]
    command = [sys.executable, "-m", "metablocks", "blocks"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"},
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, b"")


@pytest.mark.parametrize(
    ("redirection", "status", "says"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        pytest.param(
            ">/dev/full",
            1,
            "the output was not written: No space left on device\n",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full"),
        ),
    ],
)
def test_output_that_is_closed_or_cannot_be_written_is_no_traceback(redirection, status, says):
    root = Path(metablocks.__file__).parents[1]
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m metablocks recipes {redirection}",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, says)


def test_every_command_is_documented_and_implemented():
    parser, commands = arguments.parsers()
    assert list(commands) == COMMANDS == list(cli._COMMANDS)
    assert isinstance(parser, argparse.ArgumentParser)
