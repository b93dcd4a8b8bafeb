"""Runs: every recipe trains, directories hold what they promise, and nothing is lost on the way."""

import copy
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from covering_recipes import covering_first
from small_runs import SMALL, finish, only_run, start, wait_for_epochs

import metablocks
from metablocks.cli import main
from metablocks.errors import RunError
from metablocks.executors import Share
from metablocks.recipe import build, load
from metablocks.runs import Scores
from metablocks.runs.examples import read_test
from metablocks.runs.train import Stopped, _stop_signals, meta_step
from metablocks.tasks.base import SPLITS
from metablocks.types import Progress
from tools.fuzzing.resume_law import same_checkpoint
from tools.fuzzing.small_images import cifar_parts, draw_mini_imagenet, draw_omniglot, write_cifar

TINY = [
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "outer.steps_per_epoch=1"),
    *("--set", "outer.epochs=1"),
    *("--set", "evaluation.tasks=3"),
    *("--set", "hardware.device=cpu"),
]


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory):
    """A small one of each, with enough classes for 20 ways of Omniglot and images for 5 + 15."""
    parent = tmp_path_factory.mktemp("data")
    halves = {"images_background": {"A": 30, "B": 30}, "images_evaluation": {"C": 40}}
    draw_omniglot(parent, halves)
    return write_cifar(draw_mini_imagenet(parent, images=20), cifar_parts(images=20))


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run that interrupted ones are compared with."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", *SMALL, "--out", str(out)]) == 0
    return only_run(out)


@pytest.mark.parametrize("path", covering_first(tasks=True))
def test_every_shipped_recipe_trains_one_step(
    path, tmp_path, data_sets, own_folder, private_cache, monkeypatch, capsys
):
    """With few filters, and two inner steps in evaluation, as they cost the most; without plots.

    Of each, `metablocks check` takes a first step in tests/recipe/test_recipe_record.py.
    """
    name = path.stem
    monkeypatch.setattr("metablocks.runs.plots.draw", lambda directory: [])
    monkeypatch.chdir(own_folder)
    shipped_recipe = load(name)
    conv = shipped_recipe.at("model.block") == "conv4"
    batch_norm = conv or shipped_recipe.at("model.block") == "torchvision"
    small = [f"evaluation.inner_steps={min(2, shipped_recipe.at('inner.steps'))}"]
    small += ["model.filters=4"] if conv else []
    words = [word for setting in small for word in ("--set", setting)]
    drawn = ("sinusoid", "linear", "logistic", "strokes", "text", "folders")
    data = [] if shipped_recipe.at("tasks.block") in drawn else ["--data", str(data_sets)]
    out = tmp_path / "runs"
    assert main(["run", name, *TINY, *words, *data, "--out", str(out), "--quiet"]) == 0
    run = only_run(out)
    assert run.name.startswith(name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recipe = load(str(run / "recipe.yaml"))
    folded = {"append_linear", "insert_tnet", "insert_lora"}
    reduced = {entry["block"] for entry in recipe.at("surgery")} & folded
    parts = {"deployment": reduced, "ensemble": recipe.at("evaluation.ensemble") > 1, "test": True}
    metrics = ["metrics"] if "metrics" in rows[0] else []  # of the estimator
    rules = recipe.at("inner.rule")
    learned = any(rule["block"] in ("lslr", "meta_sgd") or rule.get("learn") for rule in rules)
    assert [sorted(row) for row in rows] == [
        [
            "epoch",
            "lr",
            *metrics,
            *["rates"] * learned,
            "step",
            "step_loss",
            "train_loss",
            "validation",
        ],
        [name for name, there in parts.items() if there],
    ]
    test = read_test(run / "test.npz")
    assert test["scores"].mean(0).tolist() == pytest.approx(rows[-1]["test"]["mean"], rel=1e-5)
    transforms = {rule["block"] for rule in rules} & {"kfo", "meta_curvature"}
    assert ("spectrum" in test) == bool(transforms)
    support_loss = recipe.at("inner.support_loss") or {"block": None}
    assert ("weights" in test) == (support_loss["block"] == "weighted")
    assert ("curves" in test) == (support_loss["block"] == "learned_loss")
    assert ("example" in test) == (recipe.at("tasks.block") not in ("logistic", "text"))
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"] == recipe.hash
    if data or recipe.at("tasks.block") in ("text", "folders"):
        assert len(record["data"]["checksum"]) == 64
    printed = capsys.readouterr().out
    assert str(run) in printed
    assert ("transductive" in printed) == record["transductive"] == batch_norm


def test_a_run_states_versions_costs_and_scores_and_draws_plots(undisturbed, capsys):
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["versions"]["metablocks"] == metablocks.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["argv"][0] == "run"
    cost = json.loads((undisturbed / "times.jsonl").read_text().splitlines()[0])
    names = ["epoch", "seconds", "training_seconds", "peak_memory", "memory_at_start"]
    assert list(cost) == names
    assert 0 <= cost["training_seconds"] <= cost["seconds"]
    assert 10 * 2**20 < cost["memory_at_start"] <= cost["peak_memory"] + 4 * 2**20
    for plot in ("training.png", "adaptation.png"):
        assert (undisturbed / plot).read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(undisturbed)]) == 0
    printed = capsys.readouterr().out
    assert "mean ± 95 % confidence interval over tasks" in printed
    assert "std  worst 10 %" in printed


def test_the_best_checkpoint_is_what_is_tested_and_evaluated_later(undisturbed, capsys):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    judged = {row["epoch"]: row["validation"]["mean"][-1] for row in rows if "validation" in row}
    assert sorted(judged) == [2, 4, 6, 8]
    state = torch.load(undisturbed / "best.pt", weights_only=True)["state"]
    assert state["best_epoch"] == min(judged, key=judged.get)
    assert main(["eval", str(undisturbed)]) == 0
    test = Scores(**rows[-1]["test"])
    assert f"{test.text(10)}" in capsys.readouterr().out
    assert main(["eval", str(undisturbed), "--steps", "2", "--split", "train", "--tasks", "4"]) == 0
    assert "train, 4 tasks" in capsys.readouterr().out


def test_another_seed_takes_other_tasks_says_so_and_every_result_is_saved(undisturbed, capsys):
    """Of the run's own seed they are its test tasks; the run's other files stay as they were."""
    saved = undisturbed / "evaluations.jsonl"
    saved.unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()}
    for words in ([], ["--seed", "0"], ["--seed", "7"], ["--seed", "7", "--tasks", "4"]):
        assert main(["eval", str(undisturbed), *words]) == 0
        out = capsys.readouterr().out
        assert f"saved in {saved}" in out
        other = "the test tasks of seed 7; the run was trained and tested on those of seed 0"
        assert (other in out) == ("7" in words)
    test = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    own, same, others, few = map(json.loads, saved.read_text().splitlines())
    assert own == same == {"checkpoint": "best", "seed": 0, "scores": test}
    assert (others["seed"], others["scores"]["tasks"]) == (7, test["tasks"])
    assert others["scores"]["by_task"] != test["by_task"]
    assert few["scores"]["by_task"] == others["scores"]["by_task"][:4]  # the same batch
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_that_cannot_be_written_is_evaluated_all_the_same(
    undisturbed, capsys, monkeypatch
):
    def refuse(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("metablocks.runs.directory.os.fsync", refuse)
    assert main(["eval", str(undisturbed)]) == 0
    out = capsys.readouterr().out
    assert "mean ± 95 % confidence interval over tasks" in out
    assert re.search(
        r"not saved: .*evaluations\.jsonl: cannot be written \(Permission denied\)", out
    )


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, tmp_path):
    """Half a line in the log, of a kill while it was written, is dropped."""
    process = start(tmp_path)
    run = wait_for_epochs(tmp_path, 3)
    process.send_signal(signal.SIGKILL)
    finish(process)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 99, "st')
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    same_checkpoint(run / "checkpoint.pt", undisturbed / "checkpoint.pt")


def test_a_signal_to_stop_saves_and_says_how_to_go_on(undisturbed, tmp_path, capsys):
    """The signals share one handler; see `test_the_signals_are_wishes_to_stop`."""
    process = start(tmp_path)
    run = wait_for_epochs(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    status, stdout, stderr = finish(process)
    assert status == 130
    assert f"To go on: metablocks run --resume {run}" in stdout.splitlines()[-1]
    assert "Traceback" not in stderr
    state = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    assert state["step"] > 0
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert "going on after meta-step" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    times = [json.loads(line) for line in (run / "times.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in times] == list(range(1, 9))
    for name, seconds in state["spent"].items():  # the interrupted epoch costs its first part too
        assert times[state["epochs"]][name] >= seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_signals_are_wishes_to_stop(number):
    first = signal.signal(
        number, signal.default_int_handler
    )  # whatever the tests were started with
    try:
        with _stop_signals(Share()) as signals:
            signals.stop_if_wished()
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.default_int_handler  # the second acts as ever
            with pytest.raises(Stopped):
                signals.stop_if_wished()
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, first)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_signals(Share()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_reader_has_gone_trains_to_its_end(undisturbed, tmp_path):
    process = start(tmp_path)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_finished_run_resumes_to_its_summary(undisturbed, capsys):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert main(["run", "--resume", str(undisturbed), "--quiet"]) == 0
    assert "test, 8 tasks" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_runs_never_share_a_directory_and_stay_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main(["run", "maml_sinusoid", *TINY, "--quiet"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert Path.cwd() == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_saved_recipe_runs_as_it_is(undisturbed, tmp_path):
    saved = str(undisturbed / "recipe.yaml")
    assert main(["run", saved, "--quiet", "--out", str(tmp_path)]) == 0
    again = only_run(tmp_path)
    assert (again / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["run", "--resume", "{run}", "--set", "inner.steps=2"],
            1,
            "with another recipe (inner.steps: 1 → 2)",
        ),
        (["run", "--resume", "{nowhere}"], 2, "no such folder"),
        (["eval", "{nowhere}"], 2, "no such folder"),
        (["eval", "{damaged}"], 1, "best.pt: not a readable checkpoint"),
        (["eval", "{damaged}", "--checkpoint", "last"], 1, "no such checkpoint"),
        (
            ["eval", "{old}"],
            1,
            "a checkpoint of format 1; this version of metablocks reads formats 2",
        ),
        (
            ["run", "maml_sinusoid", *TINY, "--out", "{file}"],
            1,
            "--out takes a folder that can be written",
        ),
        (
            ["run", "maml_sinusoid", *TINY, "--set", "inner.rule[0].init=1e30", "--out", "{out}"],
            1,
            "training diverged",
        ),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    arguments, status, message, undisturbed, tmp_path, capsys
):
    damaged, old = tmp_path / "damaged", tmp_path / "old"
    for run in (damaged, old):
        run.mkdir()
        for name in ("recipe.yaml", "run.json"):
            (run / name).write_bytes((undisturbed / name).read_bytes())
    (damaged / "best.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"format": 1}, old / "best.pt")
    (tmp_path / "file").write_text("")
    places = {
        "run": undisturbed,
        "nowhere": tmp_path / "nowhere",
        "damaged": damaged,
        "old": old,
        "file": tmp_path / "file",
        "out": tmp_path / "out",
    }
    assert main([argument.format(**places) for argument in arguments]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_gradient_that_is_not_finite_moves_nothing():
    experiment = build(load("maml_sinusoid", ["inner.steps=0", "hardware.device=cpu"]))
    learner = experiment.learner
    before = copy.deepcopy(learner.state_dict())
    learner.loss = lambda prediction, target: (0 * prediction).square().sum().sqrt()  # ∞ · 0
    with pytest.raises(RunError, match="the meta-gradient is not finite at meta-step 1"):
        meta_step(experiment, 0, Progress())
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_per_step_rates_refuse_more_steps_than_trained(tmp_path, capsys):
    rule = "inner.rule=[{block: lslr, init: 0.01}]"
    tiny = [*TINY, "--set", rule, "--set", "evaluation.inner_steps=1", "--out", str(tmp_path)]
    assert main(["run", "maml_sinusoid", *tiny, "--quiet"]) == 0
    assert main(["eval", str(only_run(tmp_path)), "--steps", "5"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("--steps 5: ")
    assert "take at most 1" in message


def test_an_executor_is_chosen_before_training_and_stated_in_the_recipe(tmp_path, capsys):
    small = [
        *("maml_sinusoid", "--memory", "2 GiB", "--out", str(tmp_path), "--quiet"),
        *("--set", "outer.epochs=1", "--set", "outer.steps_per_epoch=2"),
        *("--set", "outer.tasks_per_step=4", "--set", "evaluation.tasks=4"),
        *("--set", "evaluation.inner_steps=1", "--set", "hardware.device=cpu"),
    ]
    assert main(["run", *small]) == 0
    assert re.search(r"executor: (Loop|Vmap)\(.*\): .* ms and .*B", capsys.readouterr().err)
    (run,) = tmp_path.iterdir()
    assert " ms and " in json.loads((run / "run.json").read_text())["executor"]
    chosen = load(run / "recipe.yaml").at("hardware.executor.block")
    assert chosen in ("loop", "vmap")
    assert main(["run", "--resume", str(run), "--quiet"]) == 0


LACKING = """
from metablocks.errors import DataError
from metablocks.tasks import Sinusoid

class Lacking:
    kind, input_shape, outputs = "regression", (1,), 1

    def __init__(self, *, lacks: str):
        self.lacks = lacks

    def sample(self, split, indices):
        if split == self.lacks:
            raise DataError(f"there are no classes of {split}")
        return Sinusoid(shots=2, queries=2).sample(split, indices)
"""


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_of_every_split_are_there_before_training_begins(
    split, tmp_path, monkeypatch, capsys
):
    (tmp_path / "lacking.py").write_text(LACKING)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = f"tasks={{block: lacking:Lacking, lacks: {split}}}"
    out = tmp_path / "runs"
    command = ["run", "maml_sinusoid", *TINY, "--set", tasks, "--allow", "lacking", "--quiet"]
    assert main([*command, "--out", str(out)]) == 2
    assert f"there are no classes of {split}\n" in capsys.readouterr().err
    assert not out.exists()
