"""A loss or meta-gradient that is not finite: the run stops or skips, and the step can be replayed."""

import copy
import json
import logging
import math

import pytest
import torch
from small_runs import FEW, only_run
from torch import nn

import metablocks as mb
from metablocks.cli import main
from metablocks.errors import RunError
from metablocks.meta_steps import meta_steps
from metablocks.recipe import build, load
from metablocks.tasks import Sinusoid
from metablocks.types import Progress, TaskBatch
from tools.fuzzing.resume_law import same_checkpoint

pytestmark = pytest.mark.usefixtures("without_plots")
SKIP = ["--set", "outer.nonfinite=skip"]


@pytest.fixture
def poisoned(monkeypatch):
    """Task 14 of the training split, one of meta-step 4's, has a nan in its support set."""
    sample = Sinusoid.sample

    def sample_poisoned(source, split, indices):
        tasks = sample(source, split, indices)
        if split == "train" and 14 in indices:
            tasks.support[0][list(indices).index(14), 0] = math.nan
        return tasks

    monkeypatch.setattr(Sinusoid, "sample", sample_poisoned)


def test_stop_names_step_tasks_and_parameters_and_keeps_what_was_saved(poisoned, tmp_path, capsys):
    assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "the training loss is nan at meta-step 4, which was not taken" in message
    assert "the gradient of model.body.linear0.weight, model.body.linear0.bias, " in message
    assert "by itself, too, task 14, by its index in the source" in message
    run = only_run(tmp_path)
    assert message.endswith(f"To see where it begins: metablocks replay {run} --step 4\n")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["state"]["step"] == 2


def test_skip_goes_on_and_counts_and_resumes_bit_for_bit(poisoned, tmp_path, capsys):
    assert main(["run", *FEW, *SKIP, "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().err.count("at meta-step 4, which was not taken") == 1
    run = only_run(tmp_path / "one")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in rows] == [None, 1, None, None]
    assert all(math.isfinite(row["train_loss"]) for row in rows[:-1])
    expected = run / "before.pt"
    (run / "checkpoint.pt").replace(expected)  # as if torn: gone on from the one before
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    same_checkpoint(run / "checkpoint.pt", expected)


def test_an_epoch_of_skipped_steps_alone_ends_the_run(tmp_path, monkeypatch, capsys):
    sample = Sinusoid.sample

    def sample_nan(source, split, indices):
        tasks = sample(source, split, indices)
        tasks.query[1].fill_(math.nan)
        return tasks

    monkeypatch.setattr(Sinusoid, "sample", sample_nan)
    assert main(["run", *FEW, *SKIP, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("no meta-step of epoch 1 was taken: all skipped\n")


def learner_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    model = mb.per_step_batch_norm(model, 1)
    learner = mb.MetaLearner(
        model, loss=nn.functional.mse_loss, steps=1, rule=mb.LearningRate(0.1, learn=True)
    )
    x = torch.randn(3, 3, 5, 2)
    batches = [(TaskBatch((b, b[..., :1]), (b, b[..., :1])), Progress()) for b in x]
    batches[1][0].query[0][2] = math.inf
    return learner, batches


def test_a_skipped_step_moves_nothing_not_even_a_statistic(caplog):
    """Law: with skip, the parameters, buffers and optimiser are those without the batch."""
    learner, batches = learner_and_batches()
    other = copy.deepcopy(learner)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (learner, other)]
    with caplog.at_level(logging.WARNING):
        results = list(meta_steps(learner, optimizers[0], batches, nonfinite="skip"))
    assert [result.skipped for result in results] == [False, True, False]
    assert "by itself, too, task 2, by its place in the batch" in caplog.text
    assert "at meta-step 2, which was not taken" in caplog.text
    list(meta_steps(other, optimizers[1], [batches[0], batches[2]]))
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert learner.executor == other.executor


def test_stop_leaves_the_statistics_as_they_were():
    learner, batches = learner_and_batches()
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(RunError, match="at meta-step 1, which was not taken"):
        next(meta_steps(learner, torch.optim.SGD(learner.parameters(), lr=0.1), [batches[1]]))
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_train_maml_takes_it_too(poisoned, caplog):
    model = nn.Linear(1, 1)
    source = Sinusoid(shots=5, queries=5)
    arguments = {"iterations": 5, "tasks_per_step": 4, "progress": False}
    with pytest.raises(RunError, match=r"meta-step 4, which .*task 14, by its index in the source"):
        mb.train_maml(copy.deepcopy(model), source, **arguments)
    _, history = mb.train_maml(model, source, nonfinite="skip", **arguments)
    assert [math.isnan(loss) for loss in history.losses] == [False, False, False, True, False]
    assert "which was not taken" in caplog.text


def test_a_recipe_says_which(tmp_path):
    assert build(load("maml_sinusoid")).nonfinite == "stop"
    assert main(["check", "maml_sinusoid", "--set", "outer.nonfinite=ignore"]) == 2


def test_replay_names_task_and_operation(poisoned, tmp_path, capsys):
    assert main(["run", *FEW, "--out", str(tmp_path)]) == 1
    run = only_run(tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert main(["replay", str(run), "--step", "4"]) == 1
    head, trained, _, *tasks = capsys.readouterr().out.splitlines()
    assert head.endswith("meta-step 4, by way of checkpoint.pt (after meta-step 2)")
    assert trained.startswith(
        "as trained, in float32: loss nan; not finite: the gradient of model."
    )
    assert [task.partition(":")[0].strip() for task in tasks] == [
        f"task {n}" for n in range(12, 16)
    ]
    assert "Backward0' returned nan values" in tasks[2]
    assert all("every gradient is finite" in task for task in [*tasks[:2], tasks[3]])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert main(["replay", str(run), "--step", "7"]) == 2
    assert f"--step 7: {run} has 6 meta-steps" in capsys.readouterr().err


def test_replay_repeats_the_step_as_it_was(tmp_path, capsys):
    """From the beginning and from a checkpoint, over the end of an epoch with its schedule."""
    seen = []
    backward = mb.MetaLearner.backward

    def spy(learner, *args, **options):
        result = backward(learner, *args, **options)
        seen.append(f"{float(result.loss):.6g}")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mb.MetaLearner, "backward", spy)
        assert main(["run", *FEW, "--out", str(tmp_path)]) == 0
    run = only_run(tmp_path)
    for path in run.glob("*.pt"):
        if torch.load(path, weights_only=True)["state"]["step"] == 6:
            path.unlink()
    capsys.readouterr()
    for step in (1, 3, 6):
        assert main(["replay", str(run), "--step", str(step)]) == 0
        head, trained, *_ = capsys.readouterr().out.splitlines()
        assert f"in float32: loss {seen[step - 1]};" in trained
        assert ("the beginning" in head) == (step < 5)


def test_what_only_float32_cannot_hold_is_said(tmp_path, capsys):
    huge = ["--set", "inner.rule[0].init=1e13"]
    assert main(["run", *FEW, *huge, "--out", str(tmp_path)]) == 1
    assert "the gradient of" in capsys.readouterr().err
    assert main(["replay", str(only_run(tmp_path)), "--step", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "finite in float64: the range or the precision of float32 is not enough"
