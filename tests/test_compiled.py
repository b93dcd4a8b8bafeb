"""Compiled executors: the numbers of the plain ones, compiled once, and loud where that is not to be.

But for the tests of the compiler itself, PyTorch's stands aside: the traced graphs run as they are.
"""

import copy
import dataclasses
import functools
import linecache
import pickle
import re

import numpy as np
import pytest
import small_problems as problem
import torch
import torch.nn.functional as F
from small_learners import sinusoids as batch
from torch import nn

import metablocks as mb
from metablocks.executors.graphs import difference
from metablocks.executors.leaves import Forms
from metablocks.laws import gradients
from metablocks.laws.compare import assert_close

pytestmark = pytest.mark.usefixtures("placed")

UNROLLED, ADJOINT = mb.Unrolled(), mb.Adjoint()
MLP = functools.partial(problem.regression, hidden=(3,))
CONV = functools.partial(problem.classification, layers=1, filters=2)
COMPILED = {  # any two of a block go together; on an MLP tests/tools/test_bench.py has all of them
    mb.Loop(compile="trace"): [(MLP, UNROLLED), (CONV, ADJOINT)],
    mb.Vmap(compile="trace"): [(MLP, ADJOINT), (CONV, UNROLLED)],
    mb.Loop(compile="trace", workers=2, channels_last=True): [(CONV, ADJOINT)],
    mb.Loop(compile=True): [(MLP, UNROLLED)],
    mb.Vmap(compile=True): [(CONV, ADJOINT)],
    mb.Vmap(chunk=2, compile=True): [(CONV, UNROLLED), (MLP, mb.Adjoint(graphs=1))],
}


@pytest.fixture
def compilations(monkeypatch):
    """The graphs handed to PyTorch's compiler, which takes arguments of the same layouts alone."""
    graphs: list[torch.fx.GraphModule] = []

    def stand_in(graph, leaves):
        graphs.append(graph)
        layouts = [(leaf.shape, leaf.stride()) for leaf in leaves]

        def run(leaves):
            assert [(leaf.shape, leaf.stride()) for leaf in leaves] == layouts
            return graph(*leaves)

        return run

    monkeypatch.setattr("metablocks.executors.graphs.fused", stand_in)
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
def test_compiled_is_the_plain_loop(make, executor, estimator, compilations, place):
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
    assert executor._compiler.count == (2 if "chunk=2" in repr(executor) else 1)
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
    assert len(compilations) == 5  # carry 0 and the step, forwards and back, and the query pass


def test_the_sources_of_graphs_are_not_kept(compilations):
    """Or memory would grow with every kind of tasks, though the kinds that are kept are bounded."""

    def kept():
        return {name for name in linecache.cache if "eval_with_key" in name}

    before = kept()
    ours = learner(mb.Loop(compile="trace"))
    ours.meta_gradient(batch())
    assert ours.executor._compiler.count == 1
    assert kept() <= before


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
    assert len(compilations) == 2 * 5
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
    assert len(compilations) == 2 * 5


@pytest.mark.parametrize(
    "executor", [mb.Loop(compile=True), mb.Vmap(compile=True, chunk=2)], ids=repr
)
def test_evaluations_are_compiled_once_for_any_number_of_steps(executor, compilations, within):
    ours, plain = learner(copy.deepcopy(executor)), learner(mb.Loop())
    for steps in (2, 0, 5):
        got = ours.evaluate(batch(), steps=steps, metric=F.l1_loss)
        due = plain.evaluate(batch(), steps=steps, metric=F.l1_loss)
        torch.testing.assert_close(got, due, rtol=within(1e-10), atol=within(1e-12))
    assert len(compilations) == (6 if executor.__class__ is mb.Vmap else 3)


def test_running_statistics_that_a_pass_writes_are_traced(compilations, within):
    """The prediction of the pass is not used, and what the norm writes is."""
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    ours, plain = (learner(executor, net) for executor in (mb.Loop(compile=True), mb.Loop()))
    got = ours.evaluate(batch(), norm_statistics="support")
    due = plain.evaluate(batch(), norm_statistics="support")
    torch.testing.assert_close(got, due, rtol=within(1e-10), atol=within(1e-12))
    assert compilations


def test_the_number_of_steps_and_their_index_compile_nothing(compilations, within):
    """Rates of each step, norms of each step, a rule that counts, query losses at every carry."""
    # No bias before the norm: Adam would make a step of the rounding of its gradient, which is zero.
    body = [nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)]
    net = nn.Sequential(*body, nn.Tanh(), nn.Linear(4, 1))
    net = mb.models.per_step_batch_norm(net, 7, statistics="running")

    def assemble(executor, estimator):
        rule = mb.Chain(mb.Adam(), mb.lslr(0.1))
        return learner(
            executor, net, rule=rule, steps=7, step_loss=mb.UniformStepLoss(), estimator=estimator
        )

    for executor, estimator in (
        (mb.Loop(compile=True), mb.Unrolled()),
        (mb.Vmap(compile=True), mb.Adjoint()),
    ):
        ours, plain = assemble(executor, estimator), assemble(mb.Loop(), mb.Unrolled())
        for steps in (7, 3, 1):
            ours.steps = plain.steps = steps
            got, due = ours.meta_gradient(batch()), plain.meta_gradient(batch())
            for one, other in (
                (got.grads, due.grads),
                (got.buffer_changes, due.buffer_changes),
            ):
                torch.testing.assert_close(one, other, rtol=within(1e-9), atol=within(1e-11))
    assert len(compilations) == 2 * 5


def test_a_block_that_reads_its_index_is_made_for_each(compilations, within):
    class Halving(mb.UpdateRule):
        negates = True

        def forward(self, updates, state, step):
            rate = (0.2 if step.index == 0 else 0.1) / step.steps
            return {name: -rate * u for name, u in updates.items()}, state

    class Biased(mb.StepAware):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.bias[self.inner_step]

    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), Biased(), nn.Linear(3, 1))
    plain = learner(mb.Loop(), net, rule=Halving(), steps=3)
    ours = learner(mb.Loop(compile=True), net, rule=Halving(), steps=3)
    for _ in range(2):
        got, due = ours.meta_gradient(batch()), plain.meta_gradient(batch())
        torch.testing.assert_close(got.grads, due.grads, rtol=within(1e-10), atol=within(1e-12))
    # Carry 0, there and back. Checked at two steps: two steps there and back, three query passes; then
    # three steps of three, and the query pass at carry 3.
    assert len(compilations) == 2 + 2 * 2 + 3 + 3 * 2 + 1


@pytest.mark.parametrize("estimator", [UNROLLED, ADJOINT], ids=repr)
def test_dropout_draws_what_the_loop_draws(estimator, compilations):
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    due = learner(mb.Loop(), model=net).meta_gradient(batch())
    ours = learner(mb.Loop(compile=True), model=net, estimator=estimator)
    for _ in range(2):
        got = ours.meta_gradient(batch())
        torch.testing.assert_close(got.grads, due.grads, rtol=1e-12, atol=1e-14)
    assert len(compilations) == 5


def test_draws_that_no_trace_sees_are_not_compiled(compilations):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + np.random.rand())

    with pytest.warns(mb.CompileWarning, match=r"not compiled.*draws random numbers \(numpy\)"):
        first = learner(mb.Loop(compile=True), model=Noisy(1, 1)).meta_gradient(batch())
    torch.manual_seed(0)
    due = learner(mb.Loop(), model=Noisy(1, 1)).meta_gradient(batch())
    torch.testing.assert_close(first.grads, due.grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (lambda graph: _fail, "RuntimeError: no C\\+\\+ compiler"),
        (lambda graph: lambda x: [2 * y for y in graph(*x)], "differ .* by .*, relatively"),
        (lambda graph: lambda x: [y * torch.nan for y in graph(*x)], "nan in other places"),
    ],
)
def test_what_does_not_compile_or_is_wrong_says_so_once_and_runs_as_it_is(
    stand_in, reason, monkeypatch, recwarn, within
):
    monkeypatch.setattr("metablocks.executors.graphs.fused", lambda graph, _: stand_in(graph))
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
    x = torch.rand(1000, dtype=torch.float32)
    own = (x + 3e4) - 3e4
    error = own - x
    assert error.norm() / own.norm() > 5e-4  # the usual is 3.5e-4
    got = [x - off * error]

    def in_double():
        return [(x.double() + 3e4) - 3e4]

    message = difference(got, [own], in_double)
    if off < 2:
        assert message is None
    else:
        assert re.search(r"explains 3e-04, and .*e-04 as measured in double", message)


def test_what_is_infinite_hides_nothing():
    inf = torch.tensor([torch.inf, 1.0])
    assert difference([inf], [inf], list) is None
    for other in ([torch.inf, 2.0], [1.0, 1.0]):
        assert "differ" in difference([torch.tensor(other)], [inf], list)


def test_what_is_lazily_negated_has_another_form():
    """Its memory, which compiled code reads, holds other numbers."""
    forms, numbers = Forms(), torch.ones(3, dtype=torch.complex64)
    kinds = (numbers.imag, numbers.conj().imag, numbers, numbers.conj())
    assert len({id(forms.flatten(tensor).form) for tensor in kinds}) == 4
    assert forms.flatten(numbers.imag).form is forms.flatten(numbers.imag).form


def test_what_cannot_be_traced_is_tried_once(monkeypatch):
    tried = []

    def refuse(function, leaves):
        tried.append(function)
        raise ValueError("no")

    monkeypatch.setattr("metablocks.executors.compiled.trace", refuse)
    with pytest.warns(mb.CompileWarning, match="run as it is: ValueError: no"):
        learner(mb.Loop(compile="trace")).meta_gradient(batch())
    assert len(tried) == 1


def test_it_says_so_once_if_every_call_makes_something_anew(monkeypatch, recwarn):
    monkeypatch.setattr("metablocks.executors.compiled._ANEW", 2)
    monkeypatch.setattr("metablocks.executors.compiled.Compiler._prepare", lambda *given: None)
    ours = learner(mb.Vmap(compile="trace"), nn.Linear(1, 1), steps=0)
    for count in (1, 1, 2):
        ours.meta_gradient(batch(count=count))
    with pytest.warns(mb.CompileWarning, match="the last 2 tasks or chunks were each traced anew"):
        ours.meta_gradient(batch(count=3))
    for count in (4, 5, 6):
        ours.meta_gradient(batch(count=count))
    assert not recwarn.list


def _fail(*_, **options):
    raise RuntimeError("no C++ compiler\nand many lines more")


def test_copies_and_pickles_compile_for_themselves(compilations):
    executor = mb.Vmap(compile=True)
    learner(executor).meta_gradient(batch())
    for twin in (copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))):
        assert twin == executor
        learner(twin).meta_gradient(batch())
    assert len(compilations) == 3 * 5


def test_tensors_that_the_tracer_would_take_for_constants_are_not_compiled(compilations, within):
    class Images:
        def __init__(self, pixels):
            self.pixels = pixels

    class Net(nn.Linear):
        def forward(self, images):
            return super().forward(images.pixels)

    def tasks(scale):
        given = [batch()[index] for index in range(3)]
        return [
            mb.Task(*((Images(scale * x), y) for x, y in (task.support, task.query)))
            for task in given
        ]

    ours, plain = learner(mb.Loop(compile="trace"), Net(1, 1)), learner(mb.Loop(), Net(1, 1))
    plain.load_state_dict(ours.state_dict())
    with pytest.warns(mb.CompileWarning, match="its arguments hold Images, whose tensors would be"):
        ours.meta_gradient(tasks(1.0))
    got, due = ours.meta_gradient(tasks(2.0)), plain.meta_gradient(tasks(2.0))
    torch.testing.assert_close(got.grads, due.grads, rtol=0, atol=0)


@pytest.mark.parametrize("block", [mb.Loop, mb.Vmap])
def test_other_settings_are_refused(block):
    with pytest.raises(mb.MetablocksError, match=r'compile is "yes"|compile is \'yes\''):
        block(compile="yes")


@pytest.mark.parametrize(
    "estimator", [pytest.param(UNROLLED, marks=pytest.mark.long), ADJOINT], ids=repr
)
def test_the_compiler_itself(estimator, within):
    """No stand-in: batch norm, rates of each step, dropout, second order, and the numbers of the loop."""
    net = nn.Sequential(
        nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 1)
    )
    blocks = {"model": net, "steps": 3, "step_loss": mb.UniformStepLoss()}
    ours = learner(mb.Loop(compile=True), rule=mb.lslr(0.1), estimator=estimator, **blocks)
    due = learner(mb.Loop(), rule=mb.lslr(0.1), **blocks)
    for first in (0, 3):
        got = ours.meta_gradient(batch(first=first))
        expected = due.meta_gradient(batch(first=first))
        assert_close("compiled = Loop", got.grads, expected.grads, within(1e-12))
    assert ours.executor._compiler.count == 1


def test_what_was_made_long_ago_is_made_again_and_not_kept_for_ever(monkeypatch, compilations):
    monkeypatch.setattr("metablocks.executors.compiled._MOST", 2)
    ours = learner(mb.Vmap(compile=True))
    for count in (1, 2, 3, 1):
        ours.meta_gradient(batch(count=count))
    assert len(compilations) == 4 * 5
    assert ours.executor._compiler.count == 2


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


IMPLICIT = mb.Implicit(proximal=2.0, cg_steps=2)


@pytest.mark.parametrize(
    ("estimator", "batches", "executor"),  # any two go together
    [
        (mb.Reptile(), mb.FullBatch(), mb.Vmap),
        (mb.Reptile(), mb.Minibatches(2), mb.Loop),
        (IMPLICIT, mb.FullBatch(), mb.Loop),
        (IMPLICIT, mb.Minibatches(2), mb.Vmap),
    ],
)
def test_other_estimators_are_one_piece_for_each_number_of_steps(
    estimator, batches, executor, within
):
    blocks = {"estimator": estimator, "batches": batches, "steps": 2}
    ours, plain = (learner(executor(compile=how), **blocks) for how in ("trace", False))
    for steps in (2, 1, 2):
        ours.steps = plain.steps = steps
        got, due = ours.meta_gradient(batch()), plain.meta_gradient(batch())
        for one, other in ((got.grads, due.grads), (got.metrics, due.metrics)):
            torch.testing.assert_close(one, other, rtol=within(1e-10), atol=within(1e-12))


def test_what_rounding_does_to_the_whole_is_measured_too(compilations, monkeypatch):
    """Its check goes to double precision, the tasks with it."""
    asked = []

    def no_difference(got, expected, in_double):
        asked.append(in_double())

    monkeypatch.setattr("metablocks.executors.compiled.difference", no_difference)
    ours = learner(mb.Vmap(compile=True), nn.Sequential(nn.Linear(1, 1)).float())
    ours.meta_gradient(batch().to(torch.float32))
    assert len(asked) == 4 + 1  # the pieces and the whole
    floats = [t for answer in asked for t in answer if t.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}


def test_an_estimator_with_a_call_of_its_own_is_no_longer_cut_as_its_class(within):
    class Doubled(mb.Unrolled):
        def __call__(self, inner, meta, buffers, task):
            result = super().__call__(inner, meta, buffers, task)
            return result._replace(grads={name: 2 * g for name, g in result.grads.items()})

    got = learner(mb.Loop(compile="trace"), estimator=Doubled()).meta_gradient(batch())
    due = learner(mb.Loop()).meta_gradient(batch())
    doubled = {name: 2 * g for name, g in due.grads.items()}
    torch.testing.assert_close(got.grads, doubled, rtol=within(1e-10), atol=within(1e-12))


def mlp(*layers):
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), *layers, nn.Linear(5, 1))


def per_step_norms():
    net = mlp(nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh())
    return mb.models.per_step_batch_norm(net, 5, statistics="running")


EXACT = {
    "plain": {},
    "dropout": {"model": lambda: mlp(nn.Dropout(0.5))},
    "rates of steps": {"rule": lambda: mb.lslr(0.1)},
    "rates of steps and parameters": {
        "rule": lambda: mb.LearningRate(0.1, granularity="parameter", per_step=True, learn=True)
    },
    # Few examples or a large rate, and a net with batch norm doubles every rounding many times.
    "norms of steps": {"model": per_step_norms, "rule": lambda: mb.LearningRate(0.05)},
    "Adam": {"rule": lambda: mb.Chain(mb.Adam(), mb.LearningRate(0.01))},
    "Adamax": {"rule": lambda: mb.Chain(mb.Adamax(learn=True), mb.LearningRate(0.01))},
    "KFO": {"rule": lambda: mb.Chain(mb.KFO(), mb.LearningRate(0.05))},
    "losses of all carries": {"step_loss": lambda: mb.UniformStepLoss(initial=True)},
    "annealed losses": {"step_loss": lambda: mb.AnnealedStepLoss(epochs=4)},
    "first order at first": {"order": lambda: mb.AnnealedOrder(first_order_epochs=2)},
    "the last two steps": {"order": lambda: mb.TruncatedOrder(last=2)},
}


@pytest.mark.long
@pytest.mark.parametrize("executor", [mb.Loop(), mb.Loop(workers=2), mb.Vmap(), mb.Vmap(chunk=2)])
@pytest.mark.parametrize(
    "estimator", [UNROLLED, ADJOINT, mb.Adjoint(keep_every=2, graphs=1)], ids=repr
)
@pytest.mark.parametrize("case", EXACT)
def test_what_is_compiled_is_exact(case, estimator, executor):
    """No stand-in: PyTorch's compiler, 5 steps, 5 tasks, float64."""
    if case == "dropout" and isinstance(executor, mb.Vmap):
        executor = mb.Loop()  # whose draws are those of the plain loop
    tasks = mb.tasks.Sinusoid(shots=10, queries=10).sample("train", range(5)).to(torch.float64)
    grads = []
    for how in (dataclasses.replace(executor, compile=True), mb.Loop()):
        blocks = {"model": mlp, "rule": lambda: mb.LearningRate(0.1), **EXACT[case]}
        torch.manual_seed(0)
        blocks = {name: make() for name, make in blocks.items()}
        model = blocks.pop("model").double()
        ours = mb.MetaLearner(
            model,
            loss=F.mse_loss,
            steps=5,
            executor=how,
            estimator=estimator if how.compile else UNROLLED,
            **blocks,
        ).double()
        torch.manual_seed(5)
        for epoch in (1, 3):  # first order is over, and the losses weigh otherwise
            result = ours.meta_gradient(tasks, progress=mb.Progress(epoch=epoch))
        grads.append(result.grads)
        assert not how.compile or how._compiler.count
    assert_close(f"{case}, compiled", *grads, 1e-12)
