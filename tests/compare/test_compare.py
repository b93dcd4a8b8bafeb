"""The command `compare`: recipes to a table, runs to the same table, what is wrong to a reason."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from metablocks.cli import main
from metablocks.compare.entries import absorb, read_entries
from metablocks.compare.jobs import plan_runs
from metablocks.compare.request import Request
from metablocks.recipe import load

TINY = [
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "outer.epochs=2"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.inner_steps=2"),
    *("--set", "hardware.device=cpu"),
]
TASKS = ["--tasks", "4"]
COLUMNS = (
    "recipe title seeds failed_runs measure inner_steps tasks mean interval_95 difference "
    "difference_interval_95 difference_paired difference_std_over_seeds std_over_tasks "
    "worst_decile std_over_seeds test_loss train_loss ensemble_mean ensemble_interval_95 "
    "ensemble_members meta_steps tasks_per_step seconds_per_step seconds_per_step_ratio "
    "seconds peak_memory_bytes peak_memory_ratio memory_beyond_start_bytes"
)


def compare(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["compare", *arguments])
    return status, out.getvalue(), err.getvalue()


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two recipes, two seeds, six meta-steps: the first seed finished before, the second trained."""
    out, before = tmp_path_factory.mktemp("comparisons"), tmp_path_factory.mktemp("before")
    recipes = ["maml_sinusoid", "fomaml_sinusoid"]
    same = ["--set", "outer.steps_per_epoch=3", "--set", "evaluation.tasks=4"]
    for recipe in recipes:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["run", recipe, *TINY, *same, "--out", str(before), "--quiet"]) == 0
    budget = ["--steps", "6", "--seeds", "2", "--jobs", "2", *TASKS, "--out", str(out)]
    finished = sorted(before.iterdir())
    status, printed, progress = compare(*recipes, *map(str, finished), *TINY, *budget)
    assert status == 0, progress
    return only(out), printed, progress, finished


@pytest.fixture(scope="module")
def folder(trained):
    return trained[0]


@pytest.fixture(scope="module")
def runs(folder, trained):
    paths = [*trained[3], *(folder / "runs").iterdir()]
    return [str(path) for path in sorted(paths, key=lambda path: path.name)]


def test_all_files_are_there(folder):
    assert folder.name.startswith("maml_sinusoid-fomaml_sinusoid-")
    names = {path.name for path in folder.iterdir()}
    files = {"table.md", "table.csv", "comparison.json", "comparison.png", "training.png"}
    assert names == files | {"runs", "recipes", "logs"}
    for picture in ("comparison.png", "training.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_table_has_its_columns_and_the_numbers_of_the_runs(folder):
    table = rows(folder)
    assert list(table[0]) == COLUMNS.split()
    assert [row["recipe"] for row in table] == ["maml_sinusoid", "fomaml_sinusoid"]
    content = json.loads((folder / "comparison.json").read_text())
    for row, entry in zip(table, content["rows"], strict=True):
        assert (row["seeds"], row["tasks"], row["measure"]) == ("0 1", "8", "mse")
        assert (row["meta_steps"], row["inner_steps"]) == ("6", "2")
        means = [run["metrics"][-1]["test"]["mean"][-1] for run in entry["runs"]]
        assert float(row["mean"]) == pytest.approx(sum(means) / 2, rel=1e-12)
        assert float(row["seconds_per_step"]) > 0
        assert int(row["peak_memory_bytes"]) > int(row["memory_beyond_start_bytes"]) >= 0
        assert row["ensemble_mean"] == ""
    assert float(table[0]["difference"]) == 0.0


def test_every_run_is_a_complete_recipe_of_the_budget(runs):
    recipes = [load(f"{run}/recipe.yaml") for run in runs]
    assert sorted((r.name[:4], r.at("seed")) for r in recipes) == [
        ("FOMA", 0),
        ("FOMA", 1),
        ("MAML", 0),
        ("MAML", 1),
    ]
    for recipe in recipes:
        assert recipe.at("outer.epochs") * recipe.at("outer.steps_per_epoch") == 6
        assert recipe.at("evaluation.tasks") == 4


def test_what_is_printed_is_what_is_saved(trained):
    folder, printed, progress, _ = trained
    saved = (folder / "table.md").read_text()
    advice = json.loads((folder / "comparison.json").read_text())["recommendation"]
    assert f"use {advice['recipe']}: " in printed
    for text in (printed, saved):
        flat = " ".join(text.split())
        assert advice["reason"] in flat
        assert "rule: the best test score leads" in flat
        assert "machine: " in flat
        assert "times were measured with 2 runs side by side" in flat
        assert (
            "mean ± 95 % confidence interval over the tasks of all seeds; lower is better" in flat
        )
    assert "2 epochs × 3 = 6 meta-steps" in progress
    assert "2 of 2, fomaml_sinusoid, seed 1: done in" in progress


def test_finished_runs_are_read_and_grouped_by_recipe(folder, runs, tmp_path):
    status, printed, _ = compare(*reversed(runs), "--out", str(tmp_path), "--quiet")
    assert status == 0
    before, after = rows(folder), list(reversed(rows(only(tmp_path))))
    by_name = {row["recipe"]: row for row in after}
    for row in before:
        again = by_name[row["recipe"]]
        to_the_first = {c for c in row if c.startswith("difference") or c.endswith("_ratio")}
        same = set(COLUMNS.split()) - to_the_first
        assert {c: again[c] for c in same} == {c: row[c] for c in same}
    assert not (only(tmp_path) / "runs").exists()
    assert "recorded by the runs: " in printed


def test_what_is_trained_already_is_not_trained_again(folder, runs, tmp_path):
    recipe = str(folder / "recipes" / "maml_sinusoid.yaml")
    (entry,) = absorb(read_entries([recipe, *runs]))[:1]
    assert [run.seed for run in entry.finished] == [0, 1]
    planned = plan_runs([entry], (0, 1, 2), tmp_path, Request((recipe,)))
    assert [job.title for job in planned] == ["maml_sinusoid, seed 2"]


def test_the_same_run_twice_counts_once_and_a_copy_is_refused(runs, tmp_path):
    (entry,) = read_entries([runs[0], runs[0]])
    assert len(entry.finished) == 1
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    status, _, err = compare(runs[0], str(copy))
    assert status == 2
    assert "runs of the same recipe with the same seed" in err


def test_a_failing_run_fails_its_row_alone(runs, tmp_path):
    wild = tmp_path / "wild.yaml"
    text = load(f"{runs[0]}/recipe.yaml", ["inner.rule[0].init=1e30"]).to_yaml()
    wild.write_text(text)
    out = tmp_path / "out"
    status, printed, err = compare(str(wild), *runs, "--out", str(out), "--quiet")
    assert status == 1
    assert "training diverged" in err
    assert "Traceback" not in err
    first, *others = rows(only(out))
    assert (first["recipe"], first["failed_runs"], first["mean"]) == ("wild", "1", "")
    assert all(float(row["mean"]) > 0 and row["failed_runs"] == "0" for row in others)
    cells = [line for line in (only(out) / "table.md").read_text().splitlines() if "| wild" in line]
    assert "failed" in cells[0]
    assert "training diverged" in (only(out) / "table.md").read_text()
    (entry,) = json.loads((only(out) / "comparison.json").read_text())["rows"][0]["failures"]
    assert entry["status"] == 1
    assert "use " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maml_sinusoid", "quickstart"], "tasks.block is sinusoid in maml_sinusoid, strokes in"),
        (["maml_sinusoid", "{other}"], "tasks.shots is 5 in maml_sinusoid, 10 in other"),
        (["maml_sinusoid", "{fewer}"], "evaluation.tasks is 600 in maml_sinusoid, 50 in fewer"),
        (["maml_sinusoid", "meta_sgd_sinusoid"], "the recipes state different budgets: maml_sinu"),
        (["maml_sinusoid", "fomaml_sinusod"], 'did you mean "fomaml_sinusoid"?'),
        (["maml_sinusoid", "fomaml_sinusoid", "--step", "3"], 'did you mean "--steps"?'),
        (["maml_sinusoid", "fomaml_sinusoid", "--set", "inner.stps=3"], 'did you mean "steps"?'),
        (["maml_sinusoid", "fomaml_sinusoid", "--steps", "5"], "take --steps 120 or more"),
        (["maml_sinusoid", "fomaml_sinusoid", "--seeds", "0"], "takes how many seeds"),
        (["maml_sinusoid", "fomaml_sinusoid", "--minutes", "0"], "takes minutes, a number above 0"),
        (["maml_sinusoid", "--steps", "5", "--minutes", "1"], "not allowed with argument"),
        (["maml_sinusoid"], "compare takes two or more recipes or runs"),
        ([], "RECIPE|RUN_DIR"),
        (["maml_sinusoid", "maml_sinusoid"], "the same recipe is given twice"),
        (["{folder}"], "its runs are"),
        (["{folder}/runs"], "not the folder of a run; its runs are"),
        (["{run}x"], "no such recipe or run; did you mean"),
        (
            ["{run}", "fomaml_sinusoid", "--tasks", "9"],
            "evaluation.tasks is 4 in fomaml_sinusoid",
        ),
        (["{run}", "{run2}", "--tasks", "4"], "--tasks: all that is given is trained already"),
        (["{run}", "{run2}", "--steps", "9"], "all that is given is trained already"),
        (["{run}", "{run2}", "--seeds", "3"], "--seeds: all that is given is trained already"),
        (["{run}", "--seeds", "3"], "--seeds: all that is given is trained already"),
        (["{run}", "{run2}", "--set", "inner.steps=3"], "--set: all that is given is trained alre"),
        (["{run}", "{elsewhere}"], "were made of other data: checksum aaaa, bbbb"),
        (
            ["maml_sinusoid", "{longer}", "--steps", "240"],
            "maml_sinusoid and longer differ in noth",
        ),
        (["{unfinished}", "{run}"], "this run is not finished; metablocks run --resume"),
        (["maml_sinusoid", "fomaml_sinusoid", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_trained(
    arguments, message, folder, runs, tmp_path
):
    variants = {
        "other": "tasks.shots=10",
        "fewer": "evaluation.tasks=50",
        "longer": "outer.steps_per_epoch=300",
    }
    for name, override in variants.items():
        (tmp_path / f"{name}.yaml").write_text(load("maml_sinusoid", [override]).to_yaml())
    shutil.copytree(runs[0], tmp_path / "unfinished")
    log = tmp_path / "unfinished" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    places = {name: tmp_path / f"{name}.yaml" for name in variants}
    places |= {"run": runs[0], "run2": runs[1], "folder": folder}
    places |= {"unfinished": tmp_path / "unfinished"}
    for name, checksum, run in (("run", "aaaa", runs[0]), ("elsewhere", "bbbb", runs[1])):
        if "{elsewhere}" in arguments:  # another seed of the recipe, on other data
            places[name] = shutil.copytree(run, tmp_path / name)
            record = json.loads((tmp_path / name / "run.json").read_text())
            record["data"] = {"checksum": checksum}
            (tmp_path / name / "run.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    given = [argument.format(**places) for argument in arguments]
    status, printed, err = compare(*given, "--out", str(out))
    assert (status, printed) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


def test_recipes_of_one_name_are_told_apart_by_what_differs(tmp_path):
    for name, steps in (("a", 1), ("b", 3)):
        path = tmp_path / name / "maml.yaml"
        path.parent.mkdir()
        path.write_text(load("maml_sinusoid", [f"inner.steps={steps}"]).to_yaml())
    found = read_entries([str(tmp_path / name / "maml.yaml") for name in "ab"])
    assert [each.label for each in found] == ["maml inner.steps=1", "maml inner.steps=3"]
