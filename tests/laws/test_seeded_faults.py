"""Faults that meta-learning code has had, one for each law of every protocol, found by that very law.

A fault is the smallest wrong copy of a right block. The law holds for the right one on the very problem
on which it breaks for the wrong one, so that it is the fault it sees, and nothing else.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import kronecker_laws
import policy_laws
import pytest
import small_problems as problem
import wrong_blocks as faulty

from metablocks import (
    KFO,
    Adjoint,
    FinalStepLoss,
    FullBatch,
    LearningRate,
    Loop,
    Minibatches,
    MTMask,
    Progress,
    SecondOrder,
    Stream,
    TruncatedOrder,
    UniformStepLoss,
    Unrolled,
    Vmap,
    lslr,
    per_step_batch_norm,
)
from metablocks.errors import LawError
from metablocks.gradcheck import check_gradients
from metablocks.laws import executors
from metablocks.laws.cases import Case
from metablocks.laws.check import run_law
from metablocks.laws.table import LAWS
from metablocks.pieces import Pieces
from metablocks.recipe import load
from metablocks.tasks import Strokes, Text
from metablocks.verify import verify


@dataclass(frozen=True)
class Fault:
    """What is wrong, the law of its protocol that says so, and how its error starts."""

    protocol: str
    law: str
    wrong: Any
    right: Any
    error: str
    drawn: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], Any] = nullcontext
    """What makes the block wrong, where the fault is not in the block's own class."""

    def __repr__(self) -> str:
        made = getattr(self.wrong, "func", self.wrong)
        return f"{self.protocol}-{self.law}-{getattr(made, '__name__', type(made).__name__)}"


SMALL, NORMED = Case(steps=2), Case(steps=2, width=3, norm="batch", tasks=2)
FINAL, EVERY = FinalStepLoss(), UniformStepLoss()
ORDERED = {"case": SMALL, "order": SecondOrder(), "step_loss": FINAL}
TWO = Case(steps=2, tasks=2)
NOW = {"progress": Progress()}
QUADRATIC = Case(kind="quadratic", steps=2, width=3)

FAULTS = [
    Fault(
        "rule",
        "fits the gradients",
        faulty.InPlace,
        faulty.Rate,
        "fits the gradients, which a rule leaves",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "remembers nothing",
        faulty.Remembers,
        faulty.Rate,
        "remembers nothing from task to task",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "draws once a task",
        faulty.MaskPerStep,
        MTMask,
        "draws once a task: init and forward both",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "reads the step",
        partial(faulty.FirstRate, 0.1, per_step=True),
        partial(LearningRate, 0.1, per_step=True),
        "reads the step: it is made for 2 steps, but its updates at step 0",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "goes down",
        faulty.SignForgotten,
        faulty.Rate,
        "goes down: at step 0",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "zero Hessian",
        faulty.ConstantRate,
        faulty.Rate,
        "zero Hessian: relative error",
        {"case": SMALL},
    ),
    Fault(
        "rule",
        "finite differences",
        faulty.GainCutOff,
        faulty.Rate,
        "finite differences: relative error .* is rule.gain",
        {"case": SMALL, "step_loss": FINAL},
    ),
    Fault(
        "rule",
        "plain autograd",
        faulty.MaskTwice,
        MTMask,
        "plain autograd, gradient: relative error",
        ORDERED,
    ),
    Fault(
        "rule",
        "one gradient",
        faulty.CountsItsCalls,
        faulty.Rate,
        "Vmap.* = Loop|Adjoint.* = Unrolled",
        ORDERED,
    ),
    Fault(
        "rule",
        "mean of tasks",
        faulty.ScalesByTheLastTask,
        faulty.Rate,
        "a batch is the mean of its tasks",
        {"case": TWO},
    ),
    Fault(
        "rule",
        "identity at first",
        faulty.ScalesConvolutions,
        faulty.Identity,
        "identity, loss: relative error",
        {"case": Case(kind="conv")},
    ),
    Fault(
        "rule", "purity", faulty.LeavesHooks, faulty.Rate, "purity: these changed", {"case": SMALL}
    ),
    Fault(
        "order",
        "decides every step",
        faulty.Alternates,
        SecondOrder(),
        "decides every step: .* changed its mind",
        {"steps": 3, **NOW},
    ),
    Fault(
        "order",
        "decides every step",
        faulty.CountsInSilence,
        SecondOrder(),
        "decides every step: .* keeps something",
        {"steps": 3, **NOW},
    ),
    Fault(
        "order",
        "plain autograd",
        faulty.Alternates,
        SecondOrder(),
        "plain autograd, gradient",
        {"case": Case(), **NOW},
    ),
    Fault(
        "order",
        "one gradient",
        faulty.Alternates,
        SecondOrder(),
        "Adjoint.* = Unrolled|Vmap.* = Loop",
        {"case": Case(), "rule": partial(lslr, 0.1), **NOW},
    ),
    Fault(
        "start",
        "plain autograd",
        faulty.Drifts(),
        faulty.Doubled(),
        "plain autograd, (loss|gradient)",
        ORDERED | NOW | {"rule": partial(lslr, 0.1)},
    ),
    Fault(
        "start",
        "finite differences",
        faulty.HalfCutOff(),
        faulty.Doubled(),
        "finite differences: relative error",
        {"case": SMALL, "rule": partial(lslr, 0.1), "step_loss": FINAL},
    ),
    Fault(
        "start",
        "one gradient",
        faulty.Drifts(),
        faulty.Doubled(),
        "Vmap.* = Loop|Adjoint.* = Unrolled",
        ORDERED | NOW | {"rule": partial(lslr, 0.1)},
    ),
    Fault(
        "start",
        "mean of tasks",
        faulty.Drifts(),
        faulty.Doubled(),
        "a batch is the mean of its tasks",
        {"case": TWO},
    ),
    Fault(
        "start",
        "purity",
        faulty.WritesParameters(),
        faulty.Doubled(),
        "purity: these changed",
        {"case": SMALL},
    ),
    Fault(
        "batches",
        "plain autograd",
        faulty.Wanders(),
        FullBatch(),
        "plain autograd, (loss|gradient)",
        ORDERED | NOW | {"rule": partial(lslr, 0.1)},
    ),
    Fault(
        "batches",
        "finite differences",
        faulty.Wanders(),
        Stream(),
        "finite differences: relative error",
        {"case": SMALL, "rule": partial(lslr, 0.1), "step_loss": FINAL},
    ),
    Fault(
        "batches",
        "one gradient",
        faulty.Wanders(),
        Minibatches(2),
        "Vmap.* = Loop|Adjoint.* = Unrolled",
        ORDERED | NOW | {"rule": partial(lslr, 0.1)},
    ),
    Fault(
        "batches",
        "mean of tasks",
        faulty.Wanders(),
        Stream(),
        "a batch is the mean of its tasks",
        {"case": TWO},
    ),
    Fault(
        "step_loss",
        "a weighting",
        faulty.one_percent_too_much,
        EVERY,
        "a weighting: .* whose sum is 1.01",
        {"steps": 4, **NOW},
    ),
    Fault(
        "step_loss",
        "a weighting",
        faulty.single_precision,
        EVERY,
        "a weighting: .* gave torch.float32",
        {"steps": 4, **NOW},
    ),
    Fault(
        "step_loss",
        "a weighting",
        faulty.counts_in_silence,
        EVERY,
        "a weighting: .* keeps something",
        {"steps": 4, **NOW},
    ),
    Fault(
        "step_loss",
        "a weighting",
        faulty.changes,
        EVERY,
        "a weighting: changes is not a function",
        {"steps": 4, **NOW},
    ),
    Fault(
        "step_loss",
        "weighted sum",
        faulty.changes,
        EVERY,
        "weighted sum, loss",
        {"case": SMALL, **NOW},
    ),
    Fault(
        "step_loss",
        "one gradient",
        faulty.changes,
        EVERY,
        "Adjoint.* = Unrolled|Vmap.* = Loop",
        {"case": SMALL, "rule": partial(lslr, 0.1), **NOW},
    ),
    Fault(
        "estimator",
        "equals Unrolled",
        Adjoint(),
        Adjoint(),
        "Adjoint.* = Unrolled, gradient: relative error",
        {"case": SMALL, "step_loss": EVERY},
        lambda: mock.patch.object(Pieces, "add", lambda self, adjoint, slope: adjoint),
    ),
    Fault(
        "estimator",
        "zero Hessian",
        faulty.DetachedParameters(),
        Unrolled(),
        "zero Hessian: relative error",
        {"case": SMALL},
    ),
    Fault(
        "estimator",
        "closed form",
        faulty.AlwaysFirstOrder(),
        Unrolled(),
        "quadratic: relative error",
        {"case": QUADRATIC, "rate": 0.1},
    ),
    Fault(
        "estimator",
        "finite differences",
        faulty.Half(),
        Unrolled(),
        "finite differences: .* furthest apart is rule",
        {"case": SMALL, "rule": partial(lslr, 0.1), "step_loss": FINAL},
    ),
    Fault(
        "estimator",
        "one gradient",
        faulty.CallsMatter(),
        Unrolled(),
        "Vmap.* = Loop, gradient",
        {"case": TWO},
    ),
    Fault(
        "estimator",
        "mean of tasks",
        faulty.CallsMatter(),
        Unrolled(),
        "a batch is the mean",
        {"case": TWO},
    ),
    Fault(
        "estimator",
        "names what is idle",
        faulty.ZerosForIdle(),
        Unrolled(),
        "names what is idle: the loss does not",
        {"case": Case()},
    ),
    Fault(
        "estimator",
        "purity",
        faulty.MovesParameters(),
        Unrolled(),
        "purity: these changed: model",
        {"case": Case()},
    ),
    Fault(
        "executor", "adds up", faulty.SumForMean(), Loop(), "adds up: relative error", {"tasks": 3}
    ),
    Fault(
        "executor",
        "adds up",
        faulty.DropsTheFifth(),
        Loop(),
        "adds up: relative error",
        {"tasks": 5},
    ),
    Fault(
        "executor",
        "equals Loop",
        faulty.DropsLater(),
        Loop(),
        r"DropsLater\(.*\) = Loop, loss",
        {"case": TWO},
    ),
    Fault(
        "executor",
        "equals Loop, batch norm",
        faulty.GradOfVmap(),
        Vmap(),
        r"GradOfVmap\(.*\) = Loop, gradient",
        {"case": NORMED},
    ),
    Fault(
        "executor",
        "mean of tasks",
        faulty.FirstTwice(),
        Loop(),
        "a batch is the mean",
        {"case": TWO},
    ),
    Fault(
        "executor",
        "draws are independent",
        faulty.OneSeed(),
        Loop(),
        "draws: copies of a task",
        {"case": Case(), "seed": 3},
    ),
    Fault(
        "executor",
        "purity",
        faulty.WritesShared(),
        Loop(),
        "purity: these changed: model",
        {"case": Case()},
    ),
    Fault(
        "executor",
        "tasks of unequal size",
        faulty.Cuts(),
        Loop(),
        "tasks of unequal size: relative",
        {"case": Case()},
    ),
    Fault(
        "norm",
        "keeps the function",
        faulty.softer,
        per_step_batch_norm,
        "keeps the function at step 0",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "is not aliased",
        faulty.shared_statistics,
        per_step_batch_norm,
        "not aliased: .*running_mean shares its memory",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "a row for each step",
        faulty.per_step(faulty.FirstRow),
        per_step_batch_norm,
        "a row for each step: steps 0 and 1",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "ignores what is stored",
        faulty.per_step(faulty.Stored),
        per_step_batch_norm,
        "training ignores what is stored",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "plain autograd",
        faulty.CountingNorm,
        faulty.Centred,
        "plain autograd, loss",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "one gradient",
        faulty.CountingNorm,
        faulty.Centred,
        "Vmap.* = Loop|Adjoint.* = Unrolled",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "mean of tasks",
        faulty.CountingNorm,
        faulty.Centred,
        "a batch is the mean",
        {"case": NORMED},
    ),
    Fault(
        "norm",
        "finite differences",
        faulty.ConstantMean,
        faulty.Centred,
        "finite differences: relative",
        {"case": NORMED},
    ),
    Fault(
        "norm", "purity", faulty.Hooked, faulty.Centred, "purity: these changed", {"case": NORMED}
    ),
    Fault(
        "tasks",
        "fits its description",
        faulty.WrongWidth,
        faulty.Source,
        "fits its description: support of task 0 of train",
        {"tasks": 2},
    ),
    Fault(
        "tasks",
        "fits its description",
        faulty.FewTokens,
        partial(Text, length=8, shots=1, queries=1),
        "support of task 0 of train: inputs are not int64 in 0 … 63",
        {"tasks": 2},
    ),
    Fault(
        "tasks",
        "chunking",
        faulty.OneStream,
        faulty.Source,
        "chunking: task 3 of train is another alone",
        {"indices": [7, 3]},
    ),
    Fault(
        "tasks",
        "purity",
        faulty.GlobalDraws,
        faulty.Source,
        r"purity: sampling train moves the global .*\(numpy\)",
        {"tasks": 2, "seed": 1},
    ),
    Fault(
        "tasks",
        "splits apart",
        faulty.OneSplit,
        faulty.Source,
        "splits apart: tasks of validation are tasks of train",
        {"tasks": 2},
    ),
    Fault(
        "tasks",
        "splits apart",
        faulty.SharedClasses,
        partial(Strokes, ways=3, shots=1, queries=2),
        "splits apart: .* inputs of validation stand in train",
        {"tasks": 2},
    ),
]


@pytest.fixture
def where(device):
    """Not the pretended device, on which some kernels abort."""
    return "cpu" if device.type == "pretend" else device


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_each_fault_is_found_by_the_law_meant_for_it(fault, where):
    given = {"protocol": fault.protocol, "device": where} | fault.drawn
    run_law(fault.right, fault.law, **given)
    with fault.patch(), pytest.raises(LawError, match=fault.error):
        run_law(fault.wrong, fault.law, **given)


def test_every_law_of_every_protocol_finds_a_fault():
    assert {(fault.protocol, fault.law) for fault in FAULTS} == {
        (protocol, law.name) for protocol, laws in LAWS.items() for law in laws
    }


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (faulty.SignForgotten, "goes down"),
        (faulty.CountsInSilence(), "decides every step"),
        (faulty.counts_in_silence, "a weighting"),
        (faulty.single_precision, "a weighting"),
        (faulty.OneSplit, "splits apart"),
    ],
)
def test_verify_finds_it_by_that_law_alone(wrong, law):
    report = verify(wrong, examples=2)
    assert [row.law for row in report.rows if row.verdict == "breaks"] == [law], str(report)
    assert all(row.verdict != "crashes" for row in report.rows)


def test_a_gradient_check_takes_enough_tasks_to_find_an_executor_that_loses_the_fifth():
    executor = "hardware.executor={block: 'wrong_blocks:DropsTheFifth'}"
    recipe = load("maml_sinusoid", [executor], ["wrong_blocks"])
    report = check_gradients(recipe, device="cpu")
    assert [problem.partition(":")[0] for problem in report.parts[0].problems] == [
        "Unrolled() under DropsTheFifth() = Unrolled() under Loop()"
    ]


# ---- laws of one shipped block


@pytest.mark.parametrize(
    ("wrong", "right", "law", "error"),
    [
        (
            faulty.TransposedFactor,
            KFO,
            kronecker_laws.kfo_is_a_kronecker_product,
            "KFO is a Kronecker product: relative error",
        ),
        (
            partial(faulty.TooFar, adapt_transform=True, rate=0.1),
            partial(KFO, adapt_transform=True, rate=0.1),
            kronecker_laws.kfo_adapts_down_the_slope,
            "KFO adapts down the slope, step 1: relative error",
        ),
        (
            faulty.OneTooFew(last=1),
            TruncatedOrder(last=1),
            policy_laws.truncation_ends,
            r"OneTooFew\(last=3\) = SecondOrder\(\): relative error",
        ),
    ],
)
def test_each_fault_of_a_shipped_block_is_found_by_its_law(wrong, right, law, error, place):
    small = problem.regression(**place)
    law(right, small)
    with pytest.raises(LawError, match=error):
        law(wrong, small)


def test_without_batch_norm_the_gradient_of_a_vmap_is_right(place):
    """So it is batch norm that a net must have to show it."""
    executors.equals_the_loop(faulty.GradOfVmap(), problem.regression(**place))
