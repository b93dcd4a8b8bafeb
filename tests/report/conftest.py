"""Runs of seconds and the report on them, once for all tests that look at one."""

import json
import shutil
from pathlib import Path

import pytest

from metablocks.cli import main

NAME = 'a <b>$x$ & "y" </script>'
SHORT = [
    *("--set", "outer.epochs=3"),
    *("--set", "outer.steps_per_epoch=1"),
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "evaluation.tasks=7"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.inner_steps=2"),
    *("--set", "hardware.device=cpu"),
]
IMAGES = ["--set", "model.filters=4", "--set", "tasks.queries=2", "--set", "inner.steps=2"]
RUNS = {
    "sinusoid": ["maml_sinusoid", "--set", f"name={json.dumps(NAME)}"],
    "strokes 0": ["maml_pp_strokes", *IMAGES],
    "strokes 1": ["maml_pp_strokes", *IMAGES, "--set", "seed=1"],
    "curvature": ["meta_curvature_strokes", *IMAGES],
}


@pytest.fixture(scope="session")
def short_run():
    """Makes a run of seconds, and returns its folder."""

    def run(arguments, out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("metablocks.runs.plots.draw", lambda directory: [])
            assert main(["run", *arguments, *SHORT, "--quiet", "--out", str(out)]) == 0
        (folder,) = out.iterdir()
        return folder

    return run


@pytest.fixture(scope="session")
def runs(short_run, tmp_path_factory):
    """Runs of seconds, by name, and one of a version that recorded less."""
    paths = {n: short_run(a, tmp_path_factory.mktemp("runs")) for n, a in RUNS.items()}
    paths["old"] = Path(shutil.copytree(paths["sinusoid"], tmp_path_factory.mktemp("old") / "run"))
    (paths["old"] / "test.npz").unlink()
    forget(paths["old"])
    return paths


def forget(run: Path) -> None:
    """Take out of the files what older versions did not write, and give the run another seed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("rates", "negative_rates", "step_loss"):
            row.pop(name, None)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    record = json.loads((run / "run.json").read_text())
    del record["origins"]
    (run / "run.json").write_text(json.dumps(record))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("seed: 0", "seed: 5"))


@pytest.fixture(scope="session")
def folder(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports")
    assert main(["report", *map(str, runs.values()), "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    return folder
