"""Every command of the README runs as it is printed, on less work, or is run elsewhere."""

import contextlib
import io
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from metablocks import arguments
from metablocks.cli import main
from metablocks.recipe import load
from tools.fuzzing.small_images import draw_omniglot

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
INLINE = [
    " ".join(code.split())
    for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))
]

LESS = {
    "outer.epochs": 1,
    "outer.steps_per_epoch": 1,
    "outer.tasks_per_step": 2,
    "evaluation.tasks": 2,
    "evaluation.every": 80,
    "hardware.device": "cpu",
}
SMALL = [word for field, value in LESS.items() for word in ("--set", f"{field}={value}")]
PROSE = {  # what stands in the text with its placeholders, and a command that it means
    "--resume RUN --set outer.epochs=90": "run --resume RUN --set outer.epochs=9",
    "run RECIPE --from RUN": "run maml_sinusoid --from RUN",
    "replay RUN --step 7": "replay RUN --step 7",
    "metablocks verify my_module:MyRule": "verify my_module:MyRule",
    "metablocks verify kfo --set hidden=1": "verify kfo --set hidden=1",
    "metablocks check maml_pp_strokes": "check maml_pp_strokes",
    "metablocks blocks": "blocks",
    "tools/metablocks schema > recipe.schema.json": "schema",
    "tools/metablocks show --algorithms": "show --algorithms",
    "metablocks run … --memory 4GiB": "run maml_sinusoid --memory 4GiB",
}
TORCHRUN = "torchrun --nproc-per-node 2 -m metablocks run maml_strokes"
ELSEWHERE = {  # of these, the file that runs them
    "tools/test": "tools/test",  # the suite itself
    "tools/bench": "tests/tools/test_bench.py",
    "tools/fuzz": "tests/fuzz/test_random_recipes.py",
    "tools/docs FOLDER": "tests/tools/test_docs.py",
    "metablocks compare": "tests/compare/test_compare.py",
    "run quickstart": "README.md",  # in a block of commands, too
    TORCHRUN: "tests/runs/test_runs_over_processes.py",  # in a block alone
}


def printed() -> list[str]:
    """The commands of the README's blocks, without comments."""
    lines = [line for fence in FENCES for line in fence.splitlines()]
    return [re.split(r"\s+#", line)[0] for line in lines]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data, and a module of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    halves = {"images_background": {"A": 40}, "images_evaluation": {"B": 20}}
    draw_omniglot(folder / "data", halves)
    (folder / "my_module.py").write_text(
        "import metablocks as mb\n\n\n"
        "class MyRule(mb.UpdateRule):\n"
        "    def forward(self, updates, state, step):\n"
        "        return {name: -0.1 * u for name, u in updates.items()}, state\n"
    )
    return folder


def run_in(folder: Path, words: list[str]) -> str:
    """Run a command in a folder on less work; returns what it printed."""
    command = words[0]
    if command == "run" and "--resume" not in words:
        words = [*words, *SMALL, "--quiet"]
    if command == "verify":
        words = [*words, "--examples", "1"]
    output, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(words)
    finally:
        os.chdir(before)
    assert status == 0, output.getvalue()
    return output.getvalue()


def filled(text: str, folder: Path) -> list[str]:
    """The words of a command, with a run and data of the folder in the places of the README's."""
    runs = sorted((folder / "runs").glob("*")) if (folder / "runs").exists() else []
    ours = next((str(run) for run in runs if "maml_sinusoid" in run.name), "")
    found = {
        "runs/maml_sinusoid-…": ours,
        "RUN": ours,
        "runs/…": str(runs[0]) if runs else "",
        "../shared/data": str(folder / "data"),
    }
    return [found.get(word, word) for word in text.split()]


def test_the_commands_of_the_blocks_run_in_their_order(place):
    commands = printed()
    assert len(commands) > 10
    for text in commands:
        tool, *words = filled(text, place)
        if text in ELSEWHERE:
            continue
        assert tool == "tools/metablocks"
        assert (ROOT / tool).is_file()
        words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
        if words[0] == "compare":  # run in tests/compare
            assert [load(name).name for name in arguments.parse(words).names]
            continue
        if words[0] == "report":  # run in tests/report
            assert all((place / run).is_dir() for run in arguments.parse(words).run_dirs)
            continue
        out = run_in(place, words)
        if target:
            (place / target).write_text(out)


def test_the_commands_of_the_text_run(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    if not (place / "runs").exists():
        run_in(place, ["run", "maml_sinusoid"])
    for text in PROSE.values():
        run_in(place, filled(text, place))
    sys.modules.pop("my_module", None)


def test_no_command_of_the_text_is_left_out():
    kinds = (
        r"(tools/\w+|metablocks|run|replay|check|eval|compare|report|verify)\b( \S|$)|--\S+ \S+ --"
    )
    commands = {code for code in INLINE if re.match(kinds, code)}
    assert commands == {*PROSE, *ELSEWHERE} - {"tools/test", TORCHRUN}
    for file in ELSEWHERE.values():
        assert (ROOT / file).is_file()


def test_the_options_and_extras_of_the_text_exist():
    _, commands = arguments.parsers()
    actions = [action for parser in commands.values() for action in parser._actions]
    options = {option for action in actions for option in action.option_strings}
    named = {word for code in INLINE for word in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert named <= options
    assert len(named) > 8
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installs = [code for code in INLINE if code.startswith("pip ")]
    extras = [name for code in installs for name in re.findall(r"\[(\w+)\]", code)]
    assert {"laws", "transformers"} <= set(extras) <= set(project["optional-dependencies"])
    assert set(installs) == {"pip install .", *(f'pip install "metablocks[{e}]"' for e in extras)}
