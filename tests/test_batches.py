"""Batches: what each inner step sees, against plain autograd written apart, on every executor."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, TaskError
from metablocks.estimators.base import Estimator
from metablocks.laws import gradients, purity
from metablocks.laws.compare import assert_close
from metablocks.laws.plain_loop import PlainLoop

TRACED = mb.Vmap(chunk=2, compile="trace")
EXECUTORS = [mb.Loop(), mb.Vmap(chunk=2)]
executors = pytest.mark.parametrize("executor", EXECUTORS, ids=repr)
ESTIMATORS = [mb.Unrolled(), mb.Adjoint(keep_every=2)]
estimators = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
ways = pytest.mark.parametrize(
    ("executor", "estimator"),
    [
        *((executor, estimator) for executor in EXECUTORS for estimator in ESTIMATORS),
        (TRACED, mb.Adjoint()),
    ],
    ids=repr,
)
STEPS = 3


def learner_of(batches=None, *, rule=lambda: mb.lslr(0.1), **blocks):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    blocks = {"steps": STEPS, "rule": rule(), "step_loss": mb.UniformStepLoss(), **blocks}
    return mb.MetaLearner(net, loss=F.mse_loss, batches=batches, **blocks)


def draw(*shape):
    return torch.randn(*shape, 2), torch.randn(*shape, 1)


@pytest.fixture
def tasks(placed):
    torch.manual_seed(0)
    return mb.TaskBatch(draw(3, 5), draw(3, 4))


@pytest.fixture
def streams(placed):
    torch.manual_seed(0)
    return mb.TaskBatch(draw(3, STEPS, 5), draw(3, STEPS + 1, 4))


def same(got, expected, within=1e-12):
    assert_close("loss", {"loss": got.loss}, {"loss": expected.loss}, within)
    assert_close("gradient", got.grads, expected.grads, within)
    left, right = ({"losses": r.query_losses.nan_to_num(-1)} for r in (got, expected))
    assert_close("query losses", left, right, within)


def by_hand(learner, support_of, query_of, count):
    """The meta-gradient in plain autograd, with lists of tensors and no block of the package."""
    names = [name for name, _ in learner.model.named_parameters()]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    total = 0
    for task in range(count):
        fast = [leaves[f"model.{name}"] for name in names]

        def loss(fast, batch):
            first, bias, second, last = fast
            hidden = torch.tanh(batch[0] @ first.T + bias)
            return ((hidden @ second.T + last - batch[1]) ** 2).mean()

        for index in range(STEPS):
            slopes = torch.autograd.grad(
                loss(fast, support_of(task, index)), fast, create_graph=True
            )
            rates = [leaves[f"rule.rate.{name}"][index] for name in names]
            fast = [p - rate * g for p, rate, g in zip(fast, rates, slopes, strict=True)]
            total = total + loss(fast, query_of(task, index + 1)) / STEPS / count
    return dict(zip(leaves, torch.autograd.grad(total, [*leaves.values()]), strict=True))


def rows(task, tree, index):
    return tuple(leaf[task, index] for leaf in tree)


@ways
def test_a_stream_has_the_gradient_of_its_loop_by_hand(executor, estimator, streams, within):
    learner = learner_of(mb.Stream(), executor=executor, estimator=estimator)
    expected = by_hand(
        learner,
        lambda task, k: rows(task, streams.support, k),
        lambda task, k: rows(task, streams.query, k),
        len(streams),
    )
    got = learner.meta_gradient(streams).grads
    assert_close("stream", got, expected, within(1e-9))


@ways
def test_mini_batches_have_the_gradient_of_their_loop_by_hand(executor, estimator, tasks, within):
    """On the batches that a loss sees in the plain loop."""
    seen = []

    def loss(prediction, target):
        seen.append(target)
        return F.mse_loss(prediction, target)

    looked = learner_of(mb.Minibatches(2))
    looked.loss = loss
    torch.manual_seed(5)
    looked.meta_gradient(tasks)  # which is checked before
    seen.clear()
    torch.manual_seed(5)
    looked.meta_gradient(tasks)
    drawn = [[t for t in seen[k : k + 2 * STEPS] if len(t) == 2] for k in range(0, len(seen), 6)]

    def support_of(task, index):
        inputs, targets = (leaf[task] for leaf in tasks.support)
        chosen = [int((targets == value).nonzero()[0, 0]) for value in drawn[task][index]]
        return inputs[chosen], targets[chosen]

    learner = learner_of(mb.Minibatches(2), executor=executor, estimator=estimator)
    query = lambda task, k: tuple(leaf[task] for leaf in tasks.query)  # noqa: E731
    expected = by_hand(learner, support_of, query, len(tasks))
    torch.manual_seed(5)
    got = learner.meta_gradient(tasks).grads
    assert_close("mini-batches", got, expected, within(1e-9))


@pytest.mark.parametrize("batches", [mb.Stream(), mb.Minibatches(2)], ids=repr)
@pytest.mark.parametrize("order", [mb.SecondOrder(), mb.FirstOrder()], ids=repr)
def test_the_gradient_is_the_slope_of_the_loss(batches, order, tasks, streams):
    given = streams if isinstance(batches, mb.Stream) else tasks
    learner = learner_of(batches, order=order)
    gradients.plain_autograd(learner, given)
    if isinstance(order, mb.SecondOrder):
        plain = PlainLoop(learner, given)
        with plain.seeded():
            grads = learner.meta_gradient(given).grads
        through = (True,) * learner.steps
        directions, expected = gradients.slopes(
            plain.parameters, lambda: plain.loss(through, mb.Progress()), width=1e-3
        )
        got = {name: (grads[name] * d).sum() for name, d in directions.items()}
        assert_close("finite differences", got, expected, 1e-8)


@executors
@estimators
def test_equal_rows_are_the_full_batch(executor, estimator, tasks):
    def repeat(batch, count):
        return tuple(leaf[:, None].expand(-1, count, *leaf.shape[1:]) for leaf in batch)

    equal = mb.TaskBatch(repeat(tasks.support, STEPS), repeat(tasks.query, STEPS + 1))
    expected = learner_of().meta_gradient(tasks)
    blocks = {"executor": executor, "estimator": estimator}
    same(learner_of(mb.Stream(), **blocks).meta_gradient(equal), expected)
    one = mb.TaskBatch(equal.support, tasks.query)
    same(learner_of(mb.Stream(query=False), **blocks).meta_gradient(one), expected)
    learner = learner_of(mb.Stream(), **blocks)
    got, due = learner.evaluate(equal), learner_of().evaluate(tasks)
    assert_close("evaluate", {"x": got.query_losses}, {"x": due.query_losses}, 1e-12)


@executors
@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Reptile(), mb.Implicit()], ids=repr)
def test_mini_batches_of_all_examples_are_the_full_batch(executor, estimator, tasks):
    blocks = {"executor": executor, "estimator": estimator, "rule": lambda: mb.LearningRate(0.1)}
    blocks["step_loss"] = mb.FinalStepLoss()
    expected = learner_of(**blocks).meta_gradient(tasks)
    got = learner_of(mb.Minibatches(9), **blocks).meta_gradient(tasks)
    same(got, expected, within=0)


@pytest.mark.parametrize(
    "estimator", [mb.Unrolled(), mb.Adjoint(), mb.Reptile(), mb.Implicit()], ids=repr
)
def test_a_draw_depends_on_the_number_of_the_task_alone(estimator, tasks):
    rule, final = (lambda: mb.LearningRate(0.1)), mb.FinalStepLoss()
    blocks = {"estimator": estimator, "rule": rule, "step_loss": final}
    results = []
    for executor in (*EXECUTORS, _Halves(), _Halves(mb.Vmap())):
        learner = learner_of(mb.Minibatches(2), executor=executor, **blocks)
        torch.manual_seed(11)
        results.append(learner.backward(tasks))
        assert torch.equal(torch.rand(2), results[0].loss.new_tensor(_after_one_draw(11)))
    for got in results[1:]:
        same(got, results[0], within=1e-10)
    learner = learner_of(mb.Minibatches(2), **blocks)
    torch.manual_seed(11)
    same(learner.meta_gradient([tasks[index] for index in range(3)]), results[0], within=1e-10)


def _after_one_draw(seed):
    torch.manual_seed(seed)
    torch.randint(2**62, ())
    return torch.rand(2).tolist()


@dataclasses.dataclass(frozen=True)
class _Halves:
    """An executor of one's own: the first task, then the others, by another executor."""

    inner: object = dataclasses.field(default_factory=mb.Loop)

    def __call__(self, fn, shared, buffers, tasks):
        (one, first), (other, rest) = (
            self.inner(fn, shared, buffers, part) for part in (tasks[:1], tasks[1:])
        )
        add = torch.utils._pytree.tree_map
        return add(torch.add, one, other), add(lambda a, b: torch.cat([a, b]), first, rest)


@pytest.mark.parametrize("batches", [mb.FullBatch(), mb.Minibatches(2)], ids=repr)
def test_dropout_under_loop_depends_on_the_number_of_the_task_alone(batches, tasks):
    results = []
    for executor in (mb.Loop(), mb.Loop(workers=2), mb.Loop(compile="trace"), _Halves()):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        learner = mb.MetaLearner(
            net,
            loss=F.mse_loss,
            steps=2,
            rule=mb.LearningRate(0.1),
            batches=batches,
            executor=executor,
        )
        learner.meta_gradient(tasks)
        torch.manual_seed(11)
        results += [learner.backward(tasks), learner.backward(tasks)]
    for first, second in zip(results[::2], results[1::2], strict=True):
        same(first, results[0])
        same(second, results[1])
        assert float(first.loss) != float(second.loss)


def test_mini_batches_draw_nothing_at_evaluation(tasks):
    learner, whole = learner_of(mb.Minibatches(2)), learner_of()
    for act in (
        lambda learner: learner.evaluate(tasks).query_losses,
        lambda learner: learner.adapt(tasks[0].support)(tasks[0].query[0]),
    ):
        assert torch.equal(act(learner), act(whole))
        purity.leaves_no_trace(learner, act)
    purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))


def test_a_stream_is_adapted_to_row_by_row_and_evaluated_on_its_first_rows(streams, within):
    learner = learner_of(mb.Stream())
    task = streams[1]
    expected = learner.evaluate([task], steps=2)
    for steps in (0, 2, STEPS):
        adapted = learner.adapt(task.support, steps=steps)
        got = F.mse_loss(adapted(task.query[0][steps]), task.query[1][steps])
        due = learner.evaluate([task], steps=steps).query_losses[0, -1]
        torch.testing.assert_close(got, due, rtol=within(1e-12), atol=0)
    assert torch.equal(expected.query_losses, learner.evaluate([task]).query_losses[:, :3])
    norms = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    normed = mb.MetaLearner(
        norms, loss=F.mse_loss, steps=2, rule=mb.LearningRate(0.1), batches=mb.Stream()
    )
    due = normed.evaluate([task], norm_statistics="support").query_losses[0, -1]
    got = F.mse_loss(normed.adapt(task.support)(task.query[0][2]), task.query[1][2])
    torch.testing.assert_close(got, due, rtol=within(1e-10), atol=0)


def test_a_compiled_stream_makes_its_pieces_once_for_any_number_of_steps(placed):
    for executor in (mb.Loop(compile="trace"), mb.Vmap(compile="trace")):
        made = set()
        learner = learner_of(mb.Stream(), rule=lambda: mb.LearningRate(0.1), executor=executor)
        for steps in (3, 5, 2):
            learner.steps = steps
            learner.meta_gradient(mb.TaskBatch(draw(2, steps, 5), draw(2, steps + 1, 4)))
            (plan,) = executor._compiler._plans.values()
            made.add(len(plan.made))
        assert len(made) == 1


class Alternating(mb.Batches):
    """Of one's own: even steps see the first rows, odd steps the last; three of them, then two."""

    def draw(self, support, steps):
        return {"from": torch.randint(2, (steps,))}

    def select(self, support, state, index):
        size = 3 - index % 2
        first = 0 if state is None else state["from"][index].to(support[0].device)
        chosen = torch.arange(size, device=support[0].device) + first
        return tuple(leaf[chosen] for leaf in support)


@ways
def test_a_block_of_ones_own_is_one_class(executor, estimator, tasks):
    expected = learner_of(Alternating()).meta_gradient(tasks)
    got = learner_of(Alternating(), executor=executor, estimator=estimator).meta_gradient(tasks)
    same(got, expected, within=1e-10)


class InOneGo(Estimator):
    """An estimator of one's own, which is one piece when it is compiled."""

    def __call__(self, inner, meta, buffers, task):
        return mb.Unrolled()(inner, meta, buffers, task)


@pytest.mark.parametrize("executor", [mb.Vmap(), mb.Loop(compile="trace")], ids=repr)
def test_an_estimator_of_ones_own_selects_too(executor, tasks, streams):
    for batches, given in ((mb.Minibatches(2), tasks), (mb.Stream(), streams)):
        expected = learner_of(batches).meta_gradient(given)
        blocks = {"executor": executor, "estimator": InOneGo()}
        same(learner_of(batches, **blocks).meta_gradient(given), expected, within=1e-10)


def test_what_a_stream_lacks_is_said(streams, tasks):
    short = mb.TaskBatch(streams.support, tuple(leaf[:, :3] for leaf in streams.query))
    message = (
        r"Stream\(query=True\) goes through the rows of query leaves \[steps \+ 1, .*needs 4 for 3"
    )
    with pytest.raises(TaskError, match=message):
        learner_of(mb.Stream()).meta_gradient(short)
    with pytest.raises(TaskError, match=r"support leaves \[steps, .*needs 4 for 4 inner steps"):
        learner_of(mb.Stream()).evaluate(streams, steps=4)
    with pytest.raises(TaskError, match=r"support leaves \[steps, .*needs 4 for 4 inner steps"):
        learner_of(mb.Stream()).adapt(streams[0].support, steps=4)
    for estimator in (mb.Reptile(), mb.Implicit()):
        with pytest.raises(BlockError, match="has one support set for all inner steps") as caught:
            learner_of(
                mb.Stream(),
                estimator=estimator,
                rule=lambda: mb.LearningRate(0.1),
                step_loss=mb.FinalStepLoss(),
            )
        assert caught.value.field == "batches"


def test_an_executor_that_loses_what_was_drawn_is_refused(tasks):
    def losing(fn, shared, buffers, tasks):
        kept = [mb.Task(tasks[index].support, tasks[index].query) for index in range(len(tasks))]
        return mb.Loop()(fn, shared, buffers, kept)

    with pytest.raises(TaskError, match=r"without the state that Minibatches\(size=2\) drew"):
        learner_of(mb.Minibatches(2), executor=losing).meta_gradient(tasks)
    learner_of(executor=losing).meta_gradient(tasks)


def test_states_that_cannot_be_stacked_are_refused(tasks):
    class Named(mb.Batches):
        def draw(self, support, steps):
            return "all"

    with pytest.raises(
        mb.MetablocksError, match="the batches Named returned 'all'; it returns None or"
    ):
        learner_of(Named()).meta_gradient(tasks)
