"""Compiled executors: the numbers of the plain ones, compiled once, and loud where that is not to be.

But for the last test, `torch.compile` stands aside: the traced graph runs as it is.
"""

import copy
import functools
import itertools
import pickle

import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import sinusoids as batch
from torch import nn
from torch.utils import _pytree as pytree

import metablocks as mb
from metablocks.executors.compiled import Compiler, _check, _Flat, _Unfit
from metablocks.laws import gradients
from metablocks.laws.compare import assert_close

pytestmark = pytest.mark.usefixtures("placed")

UNROLLED, ADJOINT = mb.Unrolled(), mb.Adjoint()
MLP = functools.partial(problem.regression, hidden=(3,))
CONV = functools.partial(problem.classification, layers=1, filters=2)
COMPILED = {  # what is compiled was traced before: all pairs for the trace, some for the rest
    mb.Loop(compile="trace"): itertools.product((MLP, CONV), (UNROLLED, ADJOINT)),
    mb.Vmap(compile="trace"): itertools.product((MLP, CONV), (UNROLLED, ADJOINT)),
    mb.Loop(compile="trace", workers=2, channels_last=True): [(CONV, UNROLLED), (CONV, ADJOINT)],
    mb.Loop(compile=True): [(MLP, UNROLLED)],
    mb.Vmap(compile=True): [(CONV, ADJOINT)],
    mb.Vmap(chunk=2, compile="auto"): [(CONV, UNROLLED), (MLP, ADJOINT)],
}


@pytest.fixture
def compilations(monkeypatch):
    """The graphs handed to `torch.compile`, which gives them back."""
    graphs: list[torch.fx.GraphModule] = []

    def stand_in(graph, **options):
        assert options == {"dynamic": False, "fullgraph": True}
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", stand_in)
    return graphs


def learner(executor, model=None, **blocks):
    blocks = {"steps": 2, "rule": mb.LearningRate(0.1), **blocks}
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return mb.MetaLearner(net, loss=F.mse_loss, executor=executor, **blocks)


@pytest.mark.parametrize(
    ("executor", "make", "estimator"),
    [
        pytest.param(executor, *pair, id=f"{executor}-{pair[0].func.__name__}-{pair[1]}")
        for executor, pairs in COMPILED.items()
        for pair in pairs
    ],
)
def test_compiled_is_the_plain_loop(make, executor, estimator, compilations, place, monkeypatch):
    # "auto" takes what is compiled, not what this machine is fastest with at the moment.
    best_time = "metablocks.executors.compiled._best_time"
    monkeypatch.setattr(best_time, lambda run, _: isinstance(run, _Flat))
    executor = copy.deepcopy(executor)
    small = make(steps=2, **place)

    def assemble(executor):
        return small.learner(
            mb.meta_sgd(0.1),
            executor=executor,
            estimator=estimator,
            step_loss=mb.UniformStepLoss(),
        )

    compiled = assemble(executor)
    for _ in range(2):  # the call that compiles, and the one that runs what was compiled
        gradients.one_gradient(
            small, [executor], lambda e: compiled if e is executor else assemble(e)
        )
    assert executor._compiler.count == (2 if repr(executor).startswith("Vmap(chunk=2") else 1)
    assert bool(compilations) == (executor.compile != "trace")


def test_one_compilation_serves_other_numbers(compilations, within):
    executor = mb.Vmap(compile=True)
    ours = learner(executor, step_loss=mb.AnnealedStepLoss(epochs=4))
    plain = learner(mb.Loop(), step_loss=mb.AnnealedStepLoss(epochs=4))
    for epoch in (0, 1, 2):  # the weights of the step loss change, and which of them count does not
        progress = mb.Progress(epoch=epoch)
        for first in (0, 3):
            got = ours.meta_gradient(batch(first=first), progress=progress)
            due = plain.meta_gradient(batch(first=first), progress=progress)
            torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))
        with torch.no_grad():
            for parameters in (ours.parameters(), plain.parameters()):
                next(iter(parameters)).mul_(1.5)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda ours: batch(count=4), id="another number of tasks"),
        pytest.param(lambda ours: ours.eval() and batch(), id="another mode"),
        pytest.param(lambda ours: ours.model[0].bias.requires_grad_(False) is None, id="frozen"),
    ],
)
def test_what_changes_the_computation_is_compiled_anew(change, compilations, within):
    ours = learner(mb.Vmap(compile=True))
    ours.meta_gradient(batch())
    tasks = change(ours) or batch()
    got = ours.meta_gradient(tasks)
    assert len(compilations) == 2
    ours.executor = mb.Loop()
    torch.testing.assert_close(
        got.grads, ours.meta_gradient(tasks).grads, rtol=within(1e-10), atol=within(1e-12)
    )


def test_learners_that_share_an_executor_do_not_share_what_is_compiled(compilations, within):
    executor = mb.Vmap(compile=True)
    one = learner(executor, rule=mb.LearningRate(0.1))
    other = learner(executor, rule=mb.LearningRate(0.3, granularity="tensor"))
    for _ in range(2):
        one.meta_gradient(batch())
        got = other.meta_gradient(batch())
    due = learner(mb.Loop(), rule=mb.LearningRate(0.3)).meta_gradient(batch())
    torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))
    assert len(compilations) == 2


def test_an_evaluation_is_not_compiled(compilations):
    learner(mb.Vmap(compile=True)).evaluate(batch())
    assert not compilations


def test_random_draws_are_not_compiled(compilations):
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    with pytest.warns(mb.CompileWarning, match=r"not compiled.*draws random numbers \(.*bernoulli"):
        first = learner(mb.Loop(compile=True), model=net).meta_gradient(batch())
    due = learner(mb.Loop(), model=net).meta_gradient(batch())
    torch.testing.assert_close(first.grads, due.grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (lambda graph: _fail, "RuntimeError: no C\\+\\+ compiler"),
        (lambda graph: lambda *x: [2 * y for y in graph(*x)], "differ .* by 1.0e\\+00, relatively"),
        (lambda graph: lambda *x: [y * torch.nan for y in graph(*x)], "nan in other places"),
    ],
)
def test_what_does_not_compile_or_is_wrong_says_so_once_and_runs_as_it_is(
    stand_in, reason, monkeypatch, recwarn, within
):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: stand_in(graph))
    ours = learner(mb.Vmap(compile=True))
    with pytest.warns(mb.CompileWarning, match=f"run as it is: .*{reason}") as caught:
        ours.meta_gradient(batch())
    assert caught[0].filename == __file__
    got = ours.meta_gradient(batch())
    due = learner(mb.Loop()).meta_gradient(batch())
    torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))
    assert not recwarn.list


@pytest.mark.parametrize("off", [0.5, 3.0])
def test_what_rounding_explains_is_measured_where_it_is_more_than_usual(off, recwarn):
    """One result as near to the truth as the function's own passes, one three times as far does not."""
    flat = _Flat(lambda x: (x + 3e4) - 3e4, pytree.tree_structure((0.0,)))
    leaves = [torch.rand(1000, dtype=torch.float32)]
    own = flat(*leaves)
    error = own[0] - leaves[0]
    assert error.norm() / own[0].norm() > 5e-4  # the usual is 3.5e-4
    got = [leaves[0] - off * error]
    if off < 2:
        _check(got, own, flat, leaves)
    else:
        with pytest.raises(_Unfit, match=r"explains 3e-04, and .*e-04 as measured in double"):
            _check(got, own, flat, leaves)


def _fail(*_, **options):
    raise RuntimeError("no C++ compiler\nand many lines more")


def test_copies_and_pickles_compile_for_themselves(compilations):
    executor = mb.Vmap(compile=True)
    learner(executor).meta_gradient(batch())
    for twin in (copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))):
        assert twin == executor
        learner(twin).meta_gradient(batch())
    assert len(compilations) == 3


def test_auto_keeps_the_faster(monkeypatch, compilations):
    for seconds, count in (([1.0, 2.0, 3.0], 0), ([2.0, 1.0, 3.0], 1), ([3.0, 2.0, 1.0], 1)):
        times = iter(seconds)
        monkeypatch.setattr("metablocks.executors.compiled._best_time", lambda *_, t=times: next(t))
        compiler = Compiler("auto")
        for number in (1.0, 2.0):
            assert compiler(lambda x: x + 1, "key", torch.tensor(number)) == number + 1
        assert compiler.count == count
    assert len(compilations) == 3


def test_tensors_that_the_tracer_would_take_for_constants_are_not_compiled(compilations):
    class Images:
        def __init__(self, pixels):
            self.pixels = pixels

    compiler = Compiler("trace")
    with pytest.warns(mb.CompileWarning, match="its arguments hold Images, whose tensors would be"):
        compiler(lambda images: images.pixels + 1, "key", Images(torch.tensor(1.0)))
    assert compiler(lambda images: images.pixels + 1, "key", Images(torch.tensor(2.0))) == 3.0


def test_auto_goes_on_with_the_trace_where_it_does_not_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", _fail)
    monkeypatch.setattr(
        "metablocks.executors.compiled._best_time", lambda run, _: run.__class__ is _Flat
    )
    compiler = Compiler("auto")
    with pytest.warns(mb.CompileWarning, match=r"not compiled, but only traced: .*no C\+\+ comp"):
        compiler(lambda x: x + 1, "key", torch.tensor(1.0))
    assert compiler.count == 1


@pytest.mark.parametrize("block", [mb.Loop, mb.Vmap])
def test_other_settings_are_refused(block):
    with pytest.raises(mb.MetablocksError, match=r'compile is "yes"|compile is \'yes\''):
        block(compile="yes")


def test_the_compiler_itself(within):
    """No stand-in: batch norm, second order, and the numbers of the loop."""
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    ours = learner(mb.Vmap(compile=True), model=net, steps=1)
    due = learner(mb.Loop(), model=net, steps=1)
    for first in (0, 3):
        got = ours.meta_gradient(batch(first=first))
        expected = due.meta_gradient(batch(first=first))
        assert_close("compiled = Loop", got.grads, expected.grads, within(1e-12))
    assert ours.executor._compiler.count == 1


def test_what_was_made_long_ago_is_made_again_and_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr("metablocks.executors.compiled._MOST", 2)
    compiler = Compiler("trace")
    for number in (1, 2, 3, 1):
        assert compiler(lambda x, n=number: x + n, number, torch.ones(1)) == 1 + number
    assert compiler.count == 2


def test_fused_attention_without_dropout_is_not_taken_for_random(within):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(1, 4), nn.Linear(4, 1)

        def forward(self, x):
            x = self.body(x)[None, None]
            return self.head(F.scaled_dot_product_attention(x, x, x)[0, 0])

    net = Attending()
    ours = learner(mb.Loop(compile="trace"), net, order=mb.FirstOrder())
    plain = learner(mb.Loop(), net, order=mb.FirstOrder())
    actual, expected = ours.meta_gradient(batch()).grads, plain.meta_gradient(batch()).grads
    torch.testing.assert_close(actual, expected, rtol=within(1e-10), atol=within(1e-12))
    assert ours.executor._compiler.count == 1
