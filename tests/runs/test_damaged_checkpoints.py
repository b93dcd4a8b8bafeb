"""A checkpoint that is not what was written is recognised, and the one before is used."""

import copy
import json
from pathlib import Path

import pytest
import torch

from metablocks.cli import main
from metablocks.errors import DamagedError, RunError
from metablocks.recipe import build, load
from metablocks.runs import checkpoint
from metablocks.runs.sealed import write_sealed
from metablocks.runs.state import TrainingState
from metablocks.runs.train import meta_step
from metablocks.types import Progress
from tools.fuzzing.resume_law import same_checkpoint

pytestmark = pytest.mark.usefixtures("without_plots")
ADAM = ["model.hidden=[2]", "outer.tasks_per_step=1", "hardware.device=cpu"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An experiment after a meta-step, and its checkpoint: small, to be damaged in many places."""
    experiment, state = build(load("maml_sinusoid", ADAM)), TrainingState()
    state.record(meta_step(experiment, 0, Progress()))
    path = tmp_path_factory.mktemp("small") / "checkpoint.pt"
    checkpoint.save(path, experiment, state)
    return experiment, path


def unfinished(run: Path) -> None:
    """The run as it was before its test."""
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))


def test_a_flipped_bit_anywhere_is_recognised(small, tmp_path):
    """Every 23rd bit: each place of a byte, in every part of the file, and all of its last line."""
    experiment, path = small
    whole = path.read_bytes()
    other = tmp_path / "checkpoint.pt"
    last_line = 8 * (len(whole) - 95)
    for bit in [*range(0, last_line, 23 * 8 + 1), *range(last_line, 8 * len(whole), 9)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        other.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"checkpoint\.pt: not a"):
            checkpoint.restore(other, experiment)
    other.write_bytes(whole)
    assert checkpoint.restore(other, experiment).step == 1


def test_a_file_cut_short_anywhere_is_recognised(small, tmp_path):
    experiment, path = small
    whole = path.read_bytes()
    other = tmp_path / "checkpoint.pt"
    lengths = range(0, len(whole), len(whole) // 60)
    for length in [*lengths, *range(len(whole) - 97, len(whole), 8), len(whole) - 1]:
        other.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"checkpoint\.pt: not a"):
            checkpoint.restore(other, experiment)


@pytest.mark.parametrize("name", ["empty", "text", "zeros", "another's", "a list", "a folder"])
def test_a_foreign_file_is_recognised(name, small, tmp_path):
    experiment, _ = small
    path = tmp_path / "checkpoint.pt"
    if name == "a folder":
        path.mkdir()
    elif name == "another's":
        torch.save({"weight": torch.zeros(2)}, path)
    elif name == "a list":
        torch.save([1, 2], path)
    else:
        path.write_bytes({"empty": b"", "text": b"a text\n" * 99, "zeros": bytes(4096)}[name])
    with pytest.raises(DamagedError, match=r"checkpoint\.pt: no"):
        checkpoint.restore(path, experiment)


def missing(content, section, *path):
    entry = content[section]
    for key in path[:-1]:
        entry = entry[key]
    del entry[path[-1]]


def changed(value):
    def change(content, section, *path):
        entry = content
        *places, last = section, *path
        for key in places:
            entry = entry[key]
        entry[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (
            missing,
            ("learner", "model.body.linear0.bias"),
            "learner.model.body.linear0.bias is missing",
        ),
        (
            changed(torch.zeros(3)),
            ("learner", "model.body.linear0.bias"),
            "a tensor [3] of torch.float32, exp",
        ),
        (
            changed(torch.zeros(2).double()),
            ("learner", "model.body.linear0.bias"),
            "of torch.float64, expected",
        ),
        (
            changed("zero"),
            ("learner", "model.body.linear0.bias"),
            "is a str, expected a tensor [2]",
        ),
        (changed(torch.zeros(2)), ("learner", "model.9.bias"), "model.9.bias"),
        (missing, ("optimizer", "state"), "optimizer.state is missing"),
        (missing, ("optimizer", "state", 0, "exp_avg"), "optimizer.state.0.exp_avg is missing"),
        (
            changed(torch.zeros(1)),
            ("optimizer", "state", 0, "exp_avg"),
            "optimizer.state.0.exp_avg is",
        ),
        (changed("fast"), ("optimizer", "param_groups", 0, "lr"), "lr is a str, expected a number"),
        (changed([]), ("optimizer", "param_groups"), "param_groups is 0 values, expected 1 values"),
        (changed(torch.zeros(4)), ("random", "cpu"), "random.cpu is a tensor [4]"),
        (changed(torch.zeros_like(torch.get_rng_state())), ("random", "cpu"), "mt19937 state"),
        (changed("three"), ("state", "step"), "state.step"),
        (missing, ("state", "ranking"), None),  # has a default: older checkpoints lack it
        (changed([[1]]), ("state", "ranking"), "state.ranking.0.1"),
        (changed(1), ("state", "best_score"), None),  # of a version to come
        (changed([]), ("state",), "state"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(change, path, message, small, tmp_path):
    """In files that are whole: of another version, or made by hand."""
    experiment, whole = small
    content = torch.load(whole, weights_only=True)
    change(content, *path)
    other = tmp_path / "checkpoint.pt"
    with other.open("wb") as file:
        write_sealed(file, content)
    if message is None:
        assert checkpoint.restore(other, experiment).step == 1
        return
    before = copy.deepcopy(experiment.learner.state_dict())
    with pytest.raises(RunError) as error:
        checkpoint.restore(other, experiment)
    assert str(error.value).startswith(
        f"{other}: a whole checkpoint that does not fit this recipe: "
    )
    assert message in str(error.value)
    for name, tensor in experiment.learner.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_older_versions_wrote_is_read(small, tmp_path):
    """Format 2: the recipe's hash, no checksum, no torch, and no counters that came later."""
    experiment, whole = small
    content = torch.load(whole, weights_only=True)
    del content["torch"], content["state"]["kept"]
    old = {**content, "format": 2, "recipe": experiment.recipe.hash}
    path = tmp_path / "checkpoint.pt"
    torch.save(old, path)
    state = checkpoint.restore(path, experiment)
    checkpoint.save(tmp_path / "again.pt", experiment, state)
    same_checkpoint(tmp_path / "again.pt", whole)


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_the_checkpoint_before_is_used_with_one_message(how, tested, run, undisturbed, capsys):
    last = run / "checkpoint.pt"
    if how == "gone":
        last.unlink()
    else:
        whole = bytearray(last.read_bytes())
        whole[len(whole) // 2] ^= 8
        last.write_bytes(whole if how == "flipped" else whole[:-5000])
    if not tested:
        unfinished(run)
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["eval", str(run), "--checkpoint", "last"]) == 0
    printed = capsys.readouterr()
    assert "last checkpoint (epoch 2)" in printed.out
    assert printed.err.startswith(f"{last}: no")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(f"; the checkpoint before it is used: {run}/previous.pt\n")
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert capsys.readouterr().err == printed.err
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    same_checkpoint(last, undisturbed / "checkpoint.pt")
    assert (run / "checkpoint.damaged").is_file() == (how != "gone")  # set aside, not deleted
    epochs = [json.loads(line)["epoch"] for line in (run / "times.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]


def test_with_both_damaged_both_are_named_and_nothing_is_changed(run, capsys):
    for name in ("checkpoint.pt", "previous.pt"):
        (run / name).write_bytes(b"")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{run}/checkpoint.pt: not a readable checkpoint")
    assert f"; and {run}/previous.pt: not a readable checkpoint" in message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_of_a_damaged_best_checkpoint_another_of_its_epoch_is_used(run, undisturbed, capsys):
    state = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    assert state["best_epoch"] == 3
    unfinished(run)
    (run / "best.pt").write_bytes(b"foreign")
    assert main(["eval", str(run)]) == 1
    assert capsys.readouterr().err.startswith(f"{run}/best.pt: not a readable checkpoint")
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    message = f"{run}/checkpoint.pt is of the same epoch and is used"
    assert message in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_best_checkpoint_that_is_nowhere_is_named(run, capsys):
    for name in ("checkpoint.pt", "previous.pt"):
        content = torch.load(run / name, weights_only=True)
        content["state"] |= {"best_epoch": 1, "ranking": [(1, 0.0)]}
        with (run / name).open("wb") as file:
            write_sealed(file, content)
    assert main(["run", "--resume", str(run), "--quiet"]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{run}/best.pt: not of epoch 1, the best; the last checkpoint is ")
    assert message.endswith(f"evaluated by metablocks eval {run} --checkpoint last")
