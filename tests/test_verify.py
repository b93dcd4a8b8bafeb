"""`metablocks verify`: reports that say what breaks, on which case, and how to see it again."""

import contextlib
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import metablocks as mb
from metablocks.cli import main
from metablocks.errors import BlockError, LawError, RecipeError
from metablocks.laws import check, gradients, parametrize_with_laws, rules
from metablocks.laws.blocks import as_block
from metablocks.laws.cases import Case
from metablocks.recipe.slots import SLOTS
from metablocks.verify import named_block, verify

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """As the command has it: the working directory is where modules are looked for."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def report_of(capsys, *arguments):
    status = main(["verify", *arguments, "--examples", "3"])
    return status, capsys.readouterr()


def verdicts(text):
    """The table's rows: the law, and its verdict."""
    rows = [line.strip().split("  ") for line in text.splitlines() if line.startswith("  ")]
    return {row[0]: next(part for part in row[1:] if part) for row in rows if len(row) > 1}


def again(text):
    """The Python of the first counterexample."""
    lines = text.partition("again, in Python:")[2].splitlines()[2:]
    end = next((n for n, line in enumerate(lines) if line[:1].isdigit()), len(lines))
    return "\n".join(line.removeprefix(" " * 6) for line in lines[:end])


# ---- three blocks of one's own


def test_a_right_rule_holds_every_law_that_applies(capsys):
    status, (out, err) = report_of(capsys, "right_rule:PowerRate", "--set", "power=3.0")
    assert (status, err) == (0, "")
    assert out.startswith("PowerRate(power=3.0), by the laws of the rule protocol\n")
    assert verdicts(out)["finite differences"] == "holds"
    assert "does not apply  it draws no random numbers" in out
    assert out.endswith("laws that apply hold\n")


def test_a_subtly_wrong_rule_breaks_the_law_meant_for_it_on_the_smallest_case(capsys):
    status, (out, _) = report_of(capsys, "subtly_wrong_rule:Normalised")
    assert status == 1
    broken = [law for law, verdict in verdicts(out).items() if verdict == "BREAKS"]
    assert broken == ["finite differences"]
    assert "smallest  case=Case(), step_loss=FinalStepLoss()\n" in out
    assert "1 of 9 laws broken" in out
    with pytest.raises(LawError, match="finite differences: relative error"):
        exec(again(out), {})


def test_a_loss_that_is_steep_within_a_ten_thousandth_breaks_no_law():
    from right_rule import PowerRate

    fields = {"depth": 2, "width": 3, "activation": "gelu", "norm": "batch", "tasks": 3, "steps": 3}
    small = Case(**fields, seed=66).problem()
    gradients.finite_differences(rules.learner_of(PowerRate, small), small.tasks)


def test_a_rule_that_crashes_gives_a_row_and_the_line_of_its_file_once(capsys):
    status, (out, err) = report_of(capsys, "crashing_rule:RowWise")
    assert (status, err) == (1, "")
    assert verdicts(out)["fits the gradients"] == "CRASHES"
    flat = " ".join(out.split())
    assert flat.count("IndexError: Dimension out of range") == 1
    assert "— at crashing_rule.py:10 in " in flat
    assert "also in remembers nothing, draws once a task" in flat
    assert "Traceback" not in out
    with pytest.raises(IndexError):
        exec(again(out), {})


# ---- what it is asked about


def answers(step, steps, progress):
    return step > 0


def every_step(*, first: int = 0):
    return mb.TruncatedOrder(last=first)


class Grouped(nn.Module):
    """A norm of one's own."""

    def __init__(self, channels, *, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=eps)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("block", "protocol", "code"),
    [
        (mb.KFO, "rule", "KFO()"),
        (mb.Vmap(chunk=2), "executor", "Vmap(chunk=2, compile=False)"),
        (mb.Adjoint, "estimator", "Adjoint()"),
        (answers, "order", "answers"),
        (every_step, "order", "every_step()"),
        (mb.UniformStepLoss(), "step_loss", "UniformStepLoss(initial=False)"),
        (mb.per_step_batch_norm, "norm", "per_step_batch_norm"),
        (mb.tasks.Sinusoid(shots=5, queries=5), "tasks", None),
        (partial(mb.tasks.Linear, shots=2, queries=3), "tasks", "Linear(shots=2, queries=3)"),
        (Grouped, "norm", "Grouped"),
        (lambda: mb.Chain(mb.KFO(), mb.lslr(0.1)), "rule", "make()"),
        (partial(mb.LearningRate, 0.1, learn=True), "rule", "LearningRate(0.1, learn=True)"),
    ],
)
def test_the_protocol_shows_in_the_block(block, protocol, code):
    made = as_block(block)
    assert (made.protocol, made.code) == (protocol, code or repr(block))


def test_a_function_with_other_names_is_a_block_of_the_stated_protocol():
    def odd(k, of, when):
        return k > 0

    assert as_block(odd, protocol="order").argument is odd
    with pytest.raises(BlockError, match="state its protocol"):
        as_block(odd)
    with pytest.raises(BlockError, match="is not of the protocol order"):
        as_block(mb.Vmap(), protocol="order")


@pytest.mark.parametrize("block", [answers, Grouped, mb.Vmap(chunk=2), mb.Reptile()])
def test_functions_modules_and_instances_are_held_to_their_laws(block):
    report = verify(block, examples=2)
    assert report.ok, str(report)


def test_a_law_that_a_block_refuses_everywhere_does_not_apply():
    def make():
        return mb.Chain(mb.KFO(adapt_transform=True, rate=0.1), mb.lslr(0.1))

    rows = {row.law: row for row in verify(make, examples=2).rows}
    assert rows["finite differences"].verdict == "does not apply"
    assert "refused: KFO with adapt_transform" in rows["finite differences"].message


@pytest.mark.parametrize("init", [[0.1, 0.2], {"head.*": 0.1, "*": 0.2}], ids=str)
def test_rates_that_fit_some_problems_alone_are_held_to_the_laws_there(init):
    report = verify(partial(mb.LearningRate, init, learn=True), examples=2)
    verdicts = {row.law: row.verdict for row in report.rows}
    assert report.ok, str(report)
    assert verdicts["finite differences"] == verdicts["one gradient"] == "holds"
    assert verdicts["reads the step"] == ("holds" if isinstance(init, list) else "does not apply")


def test_a_block_that_is_never_the_same_is_said_to_be_so():
    seen = []

    def forgetful(steps, progress):
        seen.append(steps)
        weights = torch.zeros(steps + 1, dtype=torch.float64)
        weights[len(seen) % (steps + 1)] = 1.0
        return weights

    row = verify(forgetful, protocol="step_loss", examples=3).rows[0]
    assert row.verdict == "breaks"
    assert "a weighting:" in row.message


# ---- in one's own pytest


@parametrize_with_laws([mb.UniformStepLoss, mb.TruncatedOrder(last=0)], examples=1)
def test_every_law_of_the_protocol_is_a_test(law):
    law()


def test_a_law_that_fails_is_a_failed_test_with_its_reproduction(monkeypatch):
    from subtly_wrong_rule import Normalised

    monkeypatch.setattr(check, "SHRINK_SECONDS", 0.0)
    laws = {law.law.name: law for law in check.checks([Normalised], examples=3)}
    laws["zero Hessian"]()
    with pytest.raises(pytest.skip.Exception, match="does not start as the identity"):
        laws["identity at first"]()
    with pytest.raises(LawError, match=r"finite differences breaks on case=Case\(") as caught:
        laws["finite differences"]()
    assert 'run_law(Normalised(), "finite differences", protocol="rule"' in str(caught.value)


def test_a_law_that_fails_is_shrunk_in_seconds(monkeypatch):
    """After the first failure no other problem is tried for longer than the limit."""
    tried = []

    def slow(step, steps, progress):
        tried.append(step)
        time.sleep(0.02)
        return None

    monkeypatch.setattr(check, "SHRINK_SECONDS", 0.1)
    assert verify(slow, examples=3).rows[0].verdict == "breaks"
    assert len(tried) < 100


# ---- every shipped block

MADE_UP = ("sinusoid", "linear", "logistic", "strokes")  # others: tests/tasks, on small data


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (slot.name, name)
        for slot in map(SLOTS.__getitem__, ("rule", "order", "step_loss", "estimator", "executor"))
        for name in slot.blocks
    ]
    + [("norm", "per_step_batch_norm")]
    + [("tasks", name) for name in MADE_UP],
)
def test_every_shipped_block_holds_the_laws_of_its_protocol(protocol, name, device):
    report = verify(named_block(name, protocol=protocol), device=device, examples=2)
    assert report.ok, str(report)


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["../right_rule:PowerRate"],
            '"../right_rule:PowerRate" is no path to a block; it takes package',
        ),
        (["right_rul:PowerRate"], "No module named 'right_rul'"),
        (["right_rule:PowerRat"], 'has no "PowerRat"; did you mean "PowerRate"?'),
        (["kof"], 'no block is called "kof"; did you mean "kfo"?'),
        (["annealed"], '"annealed" is of order and step_loss; say which: --as order'),
        (["kfo", "--as", "rul"], '"rul" is not a protocol; did you mean "rule"?'),
        (
            ["xyz"],
            'no block is called "xyz"; it takes a path, my_pkg.my_module:MyRule',
        ),
        (["kfo", "--as", "xyz"], '"xyz" is not a protocol; there are: start, batches, rule,'),
        (["kfo", "--set", "xyz=1"], "--set xyz=1: unknown field; KFO takes: hidden,"),
        (["kfo", "--as", "order"], 'no block is called "kfo"'),
        (["kfo", "--set", "hiden=1"], 'unknown field; did you mean "hidden"? KFO takes: hidden,'),
        (["kfo", "--set", "hidden"], "no = in it; it takes field=value"),
        (["kfo", "--set", "hidden=many"], "--set hidden=many"),
        (["kfo", "--set", "hidden=-1"], "hidden: takes a whole number, 0 or more, given -1"),
        (["pathlib:Path"], "Path is not a block"),
        (["right_rule:torch"], "is a module; it takes a class or function"),
        (["metablocks.rules:LearningRate"], "LearningRate needs init: --set init=VALUE"),
        (["mini_imagenet"], "mini-ImageNet is not on this machine"),
        (["vmap", "--device", "abacus"], '"abacus" is no device; it takes auto, cpu'),
    ],
)
def test_bad_input_is_refused_with_what_would_work(arguments, message, capsys):
    assert main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in out + err


def test_without_hypothesis_it_says_what_to_install(monkeypatch, capsys):
    for name in ("metablocks.laws.strategies", "metablocks.laws.table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("metablocks.laws.strategies", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert main(["verify", "kfo"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("metablocks verify: the strategies of the laws draw with hypothesis")
    assert "pip install 'metablocks[laws]'" in err


def test_a_module_that_fails_to_import_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    assert main(["verify", "broken_module:Rule"]) == 2
    assert (
        "failed: ModuleNotFoundError: No module named 'no_such_package'" in capsys.readouterr().err
    )
    with contextlib.suppress(KeyError):
        del sys.modules["broken_module"]


def test_ctrl_c_ends_it_with_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mb.UpdateRule, "init", interrupted)
    assert main(["verify", "kfo"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_named_and_given_blocks_raise_what_the_command_prints():
    with pytest.raises(RecipeError, match="no block is called"):
        named_block("nothing")
    with pytest.raises(BlockError, match="is not a block"):
        as_block(dict)
