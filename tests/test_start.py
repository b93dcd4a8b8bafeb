"""Starts: what a task begins with, against plain autograd written apart, on every executor."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.errors import BlockError, MetablocksError, SelectionError
from metablocks.laws import gradients, purity
from metablocks.laws.compare import assert_close

EXECUTORS = [mb.Loop(), mb.Vmap(chunk=2)]
ESTIMATORS = [mb.Unrolled(), mb.Adjoint(keep_every=2)]
executors = pytest.mark.parametrize("executor", EXECUTORS, ids=repr)
ways = pytest.mark.parametrize(
    ("executor", "estimator"),
    [(executor, estimator) for executor in EXECUTORS for estimator in ESTIMATORS],
    ids=repr,
)
STEPS, CLASSES = 2, 3


class Net(nn.Module):
    """Two layers, a context that is added to the hidden units, and a norm of batches if asked for."""

    def __init__(self, norm=False):
        super().__init__()
        self.body = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.context = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x)) + self.context))


def learner_of(start=None, *, norm=False, rule=lambda: mb.lslr(0.1), **blocks):
    torch.manual_seed(3)
    blocks = {"steps": STEPS, "step_loss": mb.UniformStepLoss(), "loss": F.cross_entropy, **blocks}
    return mb.MetaLearner(Net(norm), rule=rule(), start=start, **blocks)


@pytest.fixture
def tasks(placed):
    torch.manual_seed(0)

    def batch(shots):
        labels = torch.arange(CLASSES).repeat(shots).expand(3, -1)
        return torch.randn(3, shots * CLASSES, 2), labels

    return mb.TaskBatch(batch(2), batch(3))


def same(got, expected, within=1e-12):
    assert_close("loss", {"loss": got.loss}, {"loss": expected.loss}, within)
    assert_close("gradient", got.grads, expected.grads, within)


STARTS = {
    "fixed": (mb.Fixed("body.*"), ("body.weight", "body.bias")),
    "zeros": (mb.Zeros("context"), ("context",)),
    "zero head": (mb.ZeroHead(), ("head.weight", "head.bias")),
    "prototypes": (mb.Prototypes(), ("head.weight", "head.bias")),
}
starts = pytest.mark.parametrize("start", STARTS)


def by_hand(learner, name, tasks, second):
    """The meta-gradient in plain autograd, with lists of tensors and no block of the package."""
    names = [name for name, _ in learner.model.named_parameters()]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    total = 0
    for index in range(len(tasks)):
        (x, y), query = tasks[index].support, tasks[index].query
        fast = {name: leaves[f"model.{name}"] for name in names}
        if name == "zeros":
            fast["context"] = torch.zeros(4, requires_grad=True)
        elif name == "zero head":
            fast["head.weight"] = torch.zeros(CLASSES, 4, requires_grad=True)
            fast["head.bias"] = torch.zeros(CLASSES, requires_grad=True)
        elif name == "prototypes":
            features = torch.tanh(x @ fast["body.weight"].T + fast["body.bias"] + fast["context"])
            means = torch.stack([features[y == c].mean(0) for c in range(CLASSES)])
            fast["head.weight"] = 2 * means
            fast["head.bias"] = -(means**2).sum(1)
        fast = {name: tensor.view_as(tensor) for name, tensor in fast.items()}  # whatever from

        def loss(fast, batch):
            hidden = torch.tanh(
                batch[0] @ fast["body.weight"].T + fast["body.bias"] + fast["context"]
            )
            return F.cross_entropy(hidden @ fast["head.weight"].T + fast["head.bias"], batch[1])

        for k in range(STEPS):
            slopes = torch.autograd.grad(loss(fast, (x, y)), [*fast.values()], create_graph=True)
            slopes = slopes if second else [slope.detach() for slope in slopes]
            fast = {
                name: p - leaves[f"rule.rate.{name}"][k] * g
                for (name, p), g in zip(fast.items(), slopes, strict=True)
            }
            total = total + loss(fast, query) / STEPS / len(tasks)
    replaced = {f"model.{name}" for name in STARTS[name][1]}
    meta = {name: leaf for name, leaf in leaves.items() if name not in replaced}
    return dict(zip(meta, torch.autograd.grad(total, [*meta.values()]), strict=True))


@starts
@ways
def test_the_gradient_is_that_of_the_loop_by_hand(start, executor, estimator, tasks, within):
    for order in (mb.SecondOrder(), mb.FirstOrder()):
        blocks = {"executor": executor, "estimator": estimator, "order": order}
        learner = learner_of(STARTS[start][0], **blocks)
        got = learner.meta_gradient(tasks)
        expected = by_hand(learner, start, tasks, order == mb.SecondOrder())
        assert_close(start, got.grads, expected, within(1e-9))


@starts
@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_is_the_slope_of_the_loss(start, norm, tasks):
    learner = learner_of(STARTS[start][0], norm=norm)
    learned = {
        n: p for n, p in learner.named_parameters() if n in learner.meta_gradient(tasks).grads
    }
    assert learned.keys() == {n for n, _ in learner.named_parameters()} - {
        f"model.{name}" for name in STARTS[start][1]
    }
    gradients.plain_autograd(learner, tasks)
    if next(learner.parameters()).dtype == torch.float64:
        weights = learner.step_loss(STEPS, mb.Progress())
        directions, expected = gradients.slopes(
            learned, lambda: (learner.evaluate(tasks).query_losses.mean(0) * weights).sum()
        )
        grads = learner.meta_gradient(tasks).grads
        got = {name: (grads[name] * d).sum() for name, d in directions.items()}
        assert_close("finite differences", got, expected, 1e-7)


@pytest.mark.parametrize(
    ("start", "executor", "estimator"),
    [
        ("prototypes", mb.Loop(compile="trace"), mb.Unrolled()),
        ("zero head", mb.Vmap(chunk=2, compile="trace"), mb.Adjoint()),
    ],
    ids=repr,
)
def test_what_is_compiled_has_it_too(start, executor, estimator, tasks, within):
    learner = learner_of(STARTS[start][0], executor=executor, estimator=estimator)
    expected = by_hand(learner, start, tasks, True)
    assert_close(start, learner.meta_gradient(tasks).grads, expected, within(1e-9))
    got, due = learner.evaluate(tasks), learner_of(STARTS[start][0]).evaluate(tasks)
    assert_close(start, {"x": got.query_losses}, {"x": due.query_losses}, within(1e-10))


@ways
def test_as_learned_is_the_learner_without_a_start(executor, estimator, tasks):
    class Copied(mb.Start):
        def __call__(self, params, support, features):
            return dict(params)

    blocks = {"executor": executor, "estimator": estimator}
    expected = learner_of(**blocks).meta_gradient(tasks)
    same(learner_of(mb.AsLearned(), **blocks).meta_gradient(tasks), expected, within=0)
    same(learner_of(Copied(), **blocks).meta_gradient(tasks), expected, within=1e-13)


@starts
@executors
def test_what_is_replaced_moves_in_tasks_and_never_outside(start, executor, tasks):
    block, names = STARTS[start]
    learner = learner_of(block, executor=executor)
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.1)
    learner.backward(tasks)
    optimizer.step()
    for name, parameter in learner.named_parameters():
        replaced = name.removeprefix("model.") in names
        assert (parameter.grad is None) == replaced, name
        assert torch.equal(parameter, before[name]) == replaced, name
    adapted = dict(learner.adapt(tasks[0].support).named_parameters())
    assert all(not torch.equal(adapted[name], before[f"model.{name}"]) for name in names)
    purity.leaves_no_trace(learner, lambda learner: learner.meta_gradient(tasks))
    purity.leaves_no_trace(learner, lambda learner: learner.evaluate(tasks))


@executors
@pytest.mark.parametrize("norm", [False, True])
def test_prototypes_without_a_step_are_the_prototypical_net(executor, norm, tasks, within):
    learner = learner_of(
        mb.Prototypes(), norm=norm, steps=0, rule=lambda: mb.LearningRate(0.1), executor=executor
    )
    got = learner.evaluate(tasks).predictions
    net = learner.model
    for index in range(len(tasks)):
        with torch.no_grad():
            sides = [tasks[index].support[0], tasks[index].query[0]]
            support, query = (
                torch.tanh(
                    (
                        F.batch_norm(net.body(x), None, None, net.norm.weight, net.norm.bias, True)
                        if norm
                        else net.body(x)
                    )
                    + net.context
                )
                for x in sides
            )
            labels = tasks[index].support[1]
            means = torch.stack([support[labels == c].mean(0) for c in range(CLASSES)])
            expected = (-torch.cdist(query, means).square()).softmax(1)
        torch.testing.assert_close(
            got[index].softmax(1), expected, rtol=within(1e-10), atol=within(1e-12)
        )


@executors
@pytest.mark.parametrize("start", [mb.ZeroHead(), mb.Prototypes()], ids=repr)
def test_a_permutation_of_the_classes_permutes_the_predictions(start, executor, tasks, within):
    learner = learner_of(
        start, executor=executor, rule=lambda: mb.Chain(mb.Adam(eps=0.1), mb.lslr(0.1))
    )
    permutation = torch.tensor([2, 0, 1])
    permuted = mb.TaskBatch(
        (tasks.support[0], permutation[tasks.support[1]]),
        (tasks.query[0], permutation[tasks.query[1]]),
    )
    got, expected = learner.evaluate(permuted).predictions, learner.evaluate(tasks).predictions
    torch.testing.assert_close(
        got[..., permutation], expected, rtol=within(1e-10), atol=within(1e-12)
    )
    same(learner.meta_gradient(permuted), learner.meta_gradient(tasks), within(1e-10))


@pytest.mark.parametrize("start", [mb.ZeroHead(), mb.Prototypes()], ids=repr)
def test_under_loop_a_head_is_as_wide_as_the_task_has_classes(start, tasks, within):
    """As by a model whose head has so many rows, for tasks of their own number of classes each."""
    torch.manual_seed(1)
    unequal = []
    for classes in (2, 5):
        labels = torch.arange(classes).repeat(2)
        unequal.append(mb.Task(*[(torch.randn(len(labels), 2), labels) for _ in range(2)]))
    learner = learner_of(start)
    scores = learner.evaluate(unequal)
    assert [prediction.shape[1] for prediction in scores.predictions] == [2, 5]
    for estimator in ESTIMATORS:
        got = learner_of(start, estimator=estimator).meta_gradient(unequal)
        total = 0
        for task, classes in zip(unequal, (2, 5), strict=True):
            wide = learner_of(start)
            wide.model.head = nn.Linear(4, classes)
            wide = mb.MetaLearner(
                wide.model, loss=F.cross_entropy, steps=STEPS, rule=mb.lslr(0.1), start=start,
                step_loss=mb.UniformStepLoss(), executor=mb.Vmap(),
            )  # fmt: skip
            total = total + float(wide.meta_gradient([task]).loss) / 2
        assert float(got.loss) == pytest.approx(total, rel=within(1e-12))
    adapted = learner.adapt(unequal[1].support)
    assert adapted.head.out_features == 5
    assert torch.equal(adapted(unequal[1].query[0]), scores.predictions[1])
    for rule in (mb.meta_sgd, lambda rate: mb.Chain(mb.KFO(), mb.LearningRate(rate))):
        bound = learner_of(start, rule=lambda rule=rule: rule(0.1))
        bound.meta_gradient(tasks)
        with pytest.raises(BlockError, match=r"asks for a head.weight of shape \[2, 4\]"):
            bound.meta_gradient(unequal)


def test_a_class_without_support_examples_begins_at_zero(placed):
    labels = torch.tensor([0, 0, 2])
    params = {"head.weight": torch.ones(4, 2), "head.bias": torch.ones(4)}
    got = mb.Prototypes()(params, (None, labels), lambda name: torch.ones(3, 2))
    assert got["head.weight"].tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    assert got["head.bias"].tolist() == [-2.0, 0.0, -2.0, 0.0]


@pytest.mark.parametrize("estimator", [mb.Reptile(), mb.Implicit()], ids=repr)
@executors
def test_reptile_and_implicit_begin_there_too(estimator, executor, tasks):
    rule = lambda: mb.LearningRate(0.1)  # noqa: E731
    blocks = {"estimator": estimator, "rule": rule, "step_loss": mb.FinalStepLoss()}
    for start in (mb.Fixed("body.*"), mb.Zeros("context"), mb.ZeroHead()):
        got = learner_of(start, executor=executor, **blocks).meta_gradient(tasks)
        learner = learner_of(**blocks)
        with torch.no_grad():
            for name in start.replaced(learner.model) if not isinstance(start, mb.Fixed) else ():
                learner.model.get_parameter(name).zero_()
        expected = learner.meta_gradient(tasks).grads
        assert_close("start", got.grads, {n: expected[n] for n in got.grads}, 1e-10)


@ways
def test_cavia(executor, estimator, tasks):
    """The context alone adapts, from zero; the other parameters are learned."""
    start = {"start": mb.Zeros("context"), "adapt": "context", "rule": lambda: mb.LearningRate(0.5)}
    learner = learner_of(**start, executor=executor, estimator=estimator)
    got = learner.meta_gradient(tasks)
    same(got, learner_of(**start).meta_gradient(tasks), within=1e-10)
    assert learner.adapted == ("context",)
    assert "model.context" not in got.grads
    gradients.plain_autograd(learner, tasks)


class Centred(mb.Start):
    """Of one's own: the context begins at the mean input to the head."""

    reads = True

    def replaced(self, model):
        return ("context",)

    def __call__(self, params, support, features):
        return params | {"context": features("head").mean(0)}


@ways
def test_a_start_of_ones_own_is_one_class(executor, estimator, tasks):
    learner = learner_of(Centred(), executor=executor, estimator=estimator)
    same(learner.meta_gradient(tasks), learner_of(Centred()).meta_gradient(tasks), within=1e-10)
    gradients.plain_autograd(learner, tasks)


def test_draws_of_the_pass_over_the_support_set_are_replayed(tasks):
    for estimator in ESTIMATORS:
        results = []
        for one in (mb.Unrolled(), estimator):
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
            learner = mb.MetaLearner(
                net, loss=F.cross_entropy, steps=2, rule=mb.LearningRate(0.1), estimator=one,
                start=mb.Prototypes("2"),
            )  # fmt: skip
            torch.manual_seed(5)
            results.append(learner.backward(tasks))
        same(*results)


def test_mini_batches_begin_with_prototypes_of_all_examples(tasks):
    learner = learner_of(mb.Prototypes(), batches=mb.Minibatches(3))
    result = learner.meta_gradient(tasks)
    whole = learner_of(mb.Prototypes()).evaluate(tasks).query_losses
    assert torch.equal(learner.evaluate(tasks).query_losses, whole)
    gradients.plain_autograd(learner, tasks)
    assert result.grads["model.body.weight"].any()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.bare, self.sub = nn.Linear(2, 2, bias=False), type("Sub", (nn.Linear,), {})(2, 2)

    def forward(self, x):
        return self.sub(self.bare(self.two(self.one(x))))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (mb.ZeroHead("hed"), 'the model has no module "hed"; its linear layers are one, two, bare'),
        (mb.Prototypes("bare"), "bare has no bias"),
        (mb.ZeroHead("two"), "two is tied to another layer"),
        (mb.ZeroHead("sub"), "sub is a Sub, not a plain nn.Linear"),
    ],
    ids=repr,
)
def test_heads_that_are_not_plain_are_refused(start, message):
    with pytest.raises(BlockError, match=message) as caught:
        mb.MetaLearner(Odd(), loss=F.mse_loss, steps=1, rule=mb.LearningRate(0.1), start=start)
    assert (caught.value.block, caught.value.field) == ("MetaLearner", "start.head")


@pytest.mark.parametrize("surgery", [mb.append_linear, mb.insert_tnet])
def test_layers_of_surgery_are_refused_as_heads(surgery):
    torch.manual_seed(0)
    net = surgery(Net(), depth=2) if surgery is mb.append_linear else surgery(Net())
    with pytest.raises(BlockError, match=r"not a plain nn\.Linear"):
        mb.MetaLearner(
            net, loss=F.cross_entropy, steps=1, rule=mb.LearningRate(0.1), start=mb.ZeroHead()
        )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"start": mb.ZeroHead(), "adapt": "body.*"}, "ZeroHead: head.weight does not adapt"),
        ({"start": mb.Fixed("*"), "adapt": "body.*"}, "Fixed: context does not adapt"),
        ({"start": mb.Prototypes(), "batches": mb.Stream()}, "begins with the whole support set"),
        ({"start": mb.Prototypes(), "estimator": mb.Reptile()}, "Reptile has no gradient through"),
        (
            {"start": mb.Prototypes(), "estimator": mb.Implicit()},
            "Implicit has no gradient through",
        ),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense_are_refused(blocks, message):
    rule = lambda: mb.LearningRate(0.1)  # noqa: E731
    with pytest.raises(BlockError, match=message):
        learner_of(**{"step_loss": mb.FinalStepLoss(), "rule": rule, **blocks})


def test_patterns_that_select_nothing_are_refused():
    with pytest.raises(SelectionError, match='pattern "contxt" matches no parameter'):
        learner_of(mb.Zeros("contxt"))


def test_answers_of_other_names_or_shapes_are_refused(tasks):
    class Empty(mb.Start):
        def __call__(self, params, support, features):
            return {}

    with pytest.raises(
        MetablocksError, match=r"the start Empty returned .*; it returns a dict of tensors"
    ):
        learner_of(Empty()).meta_gradient(tasks)
    floats = dataclasses.replace(tasks, support=(tasks.support[0], tasks.support[0]))
    with pytest.raises(BlockError, match="Prototypes takes class labels"):
        learner_of(mb.Prototypes()).meta_gradient(floats)
