"""Losses: `support_loss` beside `loss`, what they ask for by name, and those that are learned."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metablocks as mb
from metablocks.gradcheck.check import check_learner
from metablocks.laws import gradients, purity

STEPS = 2
ENGINES = [
    mb.Loop(),
    mb.Vmap(chunk=2),
    mb.Loop(compile="trace"),
    mb.Vmap(compile="trace"),
]
engines = pytest.mark.parametrize("executor", ENGINES, ids=repr)


class Weighted(nn.Module):
    """A learned loss: a weight, a frozen scale and a buffer."""

    def __init__(self, weight=0.7):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.power = 2
        self.register_buffer("shift", torch.tensor(0.3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, prediction, target):
        self.calls += 1
        off = (prediction - target - self.shift).square() + 0.1
        return self.scale * off.pow(self.power * self.weight**2).mean()


class Everything(nn.Module):
    """A learned loss that asks for everything."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.3, 0.2, 0.1]))
        self.net = nn.Linear(2, 2)

    def forward(self, prediction, target, *, inputs, params, step, model):
        rate = self.rates.mean() / (1 + step.at)
        fast = sum(fast.square().sum() for fast in step.params.values())
        weights = sum(p.square().sum() for p in params.values())
        noise = model(inputs + 0.1) - model(inputs)
        apart = F.mse_loss(self.net(prediction), target)
        return apart + rate * (weights + fast) + noise.square().mean()


def penalised(prediction, target, *, params):
    return F.mse_loss(prediction, target) + 0.1 * params["0.weight"].square().sum()


def by_step(prediction, target, *, step):
    return F.mse_loss(prediction, target) * (1 + step.index) / step.steps


def energy(*, model, inputs, target):
    return (model(inputs) - target).square().mean() + model(-inputs).square().mean()


def weights_alone(*, params):
    return sum(p.square().sum() for p in params.values())


def same():
    one = Weighted()
    return one, one


LOSSES = {
    "two functions": lambda: (F.mse_loss, lambda p, y: (p - y).abs().add(1).log().mean()),
    "parameters by name": lambda: (penalised, weights_alone),
    "by the step": lambda: (by_step, by_step),
    "no prediction": lambda: (energy, energy),
    "a learned support loss": lambda: (nn.MSELoss(), Weighted()),
    "a learned loss": lambda: (Weighted(), F.mse_loss),
    "one for both": same,
    "of one element": lambda: (lambda p, y: (p - y).square().mean((0, 1), keepdim=True),) * 2,
    "everything, learned": lambda: (Everything(), Everything()),
}
losses = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def tasks(count=3):
    def batch(examples):
        return torch.randn(count, examples, 3), torch.randn(count, examples, 2)

    return mb.TaskBatch(batch(5), batch(4))


def learner(loss, support_loss=None, model=None, **blocks):
    blocks = {"steps": STEPS, "rule": mb.meta_sgd(0.1), **blocks}
    return mb.MetaLearner(model or net(), loss=loss, support_loss=support_loss, **blocks)


@pytest.mark.parametrize("executor", ENGINES[:2], ids=repr)
@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Adjoint()], ids=repr)
@losses
def test_the_gradient_is_that_of_plain_autograd(make, estimator, executor):
    blocks = {"executor": executor, "step_loss": mb.UniformStepLoss()}
    gradients.plain_autograd(learner(*make(), estimator=estimator, **blocks), tasks())


@pytest.mark.parametrize(
    ("name", "executor", "estimator"),
    [
        ("everything, learned", mb.Loop(compile="trace"), mb.Adjoint(graphs=1)),
        ("everything, learned", mb.Vmap(compile="trace"), mb.Unrolled()),
        ("by the step", mb.Vmap(compile="trace"), mb.Adjoint()),
        ("no prediction", mb.Vmap(compile="trace"), mb.Adjoint()),
        ("one for both", mb.Loop(compile="trace"), mb.Unrolled()),
    ],
)
def test_compiled_it_is_the_same(name, executor, estimator):
    blocks = {"executor": copy.deepcopy(executor), "step_loss": mb.UniformStepLoss()}
    ours = learner(*LOSSES[name](), nn.Linear(3, 2), estimator=estimator, **blocks)
    for _ in range(2):  # the call that compiles, and the one that runs what was compiled
        gradients.plain_autograd(ours, tasks())
    assert ours.executor._compiler.count == 1


@losses
def test_the_gradient_is_the_slope_of_every_meta_parameter(make):
    ours, batch = learner(*make()), tasks(1)
    gradients.finite_differences(ours, batch)
    purity.leaves_no_trace(ours, lambda learner: learner.meta_gradient(batch))
    purity.leaves_no_trace(ours, lambda learner: learner.evaluate(batch))


@pytest.mark.parametrize(
    "name", ["two functions", "parameters by name", "a learned loss", "one for both"]
)
def test_first_order_takes_the_inner_gradient_for_a_constant(name):
    loss, support_loss = LOSSES[name]()
    gradients.plain_autograd(learner(loss, support_loss, order=mb.FirstOrder()), tasks())
    mixed = learner(loss, support_loss, steps=3, order=mb.TruncatedOrder(last=1))
    gradients.plain_autograd(mixed, tasks())


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("two functions", ENGINES[0]),
        ("no prediction", ENGINES[1]),
        ("a learned support loss", ENGINES[0]),
        ("a learned support loss", ENGINES[1]),
        ("a learned loss", ENGINES[1]),
        ("one for both", ENGINES[0]),
    ],
    ids=str,
)
def test_the_implicit_gradient_knows_the_support_loss(name, executor):
    blocks = {"estimator": mb.Implicit(proximal=4.0), "rule": mb.LearningRate(0.05)}
    ours = learner(*LOSSES[name](), steps=3, executor=executor, **blocks)
    report = check_learner(ours, tasks(2), epochs=1)
    assert report.ok, report.text()


@engines
def test_the_step_is_that_of_the_carry(executor):
    """By hand: the loss is the step's number, inside and in query passes."""
    ours = learner(
        lambda *, step, params: step.at + 0 * params["weight"].sum(),
        lambda *, step, params: (step.at + 1) * params["weight"].sum(),
        nn.Linear(3, 2, bias=False),
        rule=mb.LearningRate(1.0),
        steps=3,
        executor=copy.deepcopy(executor),
    )
    batch = tasks()
    expected = torch.arange(4.0).expand(3, 4)
    torch.testing.assert_close(ours.evaluate(batch).query_losses, expected)
    weight = ours.model.weight.detach()
    adapted = ours.adapt(batch[0].support)
    torch.testing.assert_close(adapted.weight, weight - 1 - 2 - 3)


@engines
def test_the_model_is_at_the_pass_and_its_buffers_are_dropped(executor):
    """`model(inputs)` once more is the prediction, in training too; what it writes does not stay."""

    def loss(prediction, target, *, model, inputs):
        return F.mse_loss(model(inputs), target)

    model, batch = net(), tasks()
    blocks = {
        "norm_statistics": "running",
        "executor": copy.deepcopy(executor),
        "model": model.eval(),
    }
    got = learner(loss, **blocks).meta_gradient(batch)
    expected = learner(F.mse_loss, **{**blocks, "executor": mb.Loop()}).meta_gradient(batch)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(got.grads[name], grad)
    blocks |= {"norm_statistics": "support", "executor": mb.Loop()}
    support, plain = (learner(one, **blocks).evaluate(batch) for one in (loss, F.mse_loss))
    torch.testing.assert_close(support.query_losses, plain.query_losses)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs):
        self.passes = self.passes + 1
        return self.layer(inputs) * self.passes


def test_a_pass_more_by_a_loss_does_not_count():
    def loss(prediction, target, *, model, inputs):
        return F.mse_loss(prediction, target) + 0 * model(inputs).mean()

    model, batch = Counting(), tasks()
    got = learner(loss, model=model).evaluate(batch).query_losses
    torch.testing.assert_close(got, learner(F.mse_loss, model=model).evaluate(batch).query_losses)


def test_draws_of_the_model_in_a_loss_are_replayed():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    def loss(prediction, target, *, model, inputs):
        return F.mse_loss(prediction, target) + (model(inputs) - model(inputs)).square().mean()

    batch, results = tasks(), []
    for estimator in (mb.Unrolled(), mb.Adjoint(keep_every=2)):
        torch.manual_seed(3)
        ours = learner(loss, model=model, estimator=estimator)
        results.append(ours.meta_gradient(batch))
    assert results[0].loss > 0
    for name, grad in results[0].grads.items():
        torch.testing.assert_close(results[1].grads[name], grad)
    gradients.plain_autograd(learner(loss, model=model), batch)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def forward(self, prediction, target):
        return self.drop((prediction - target).square()).mean()


@engines
def test_a_loss_module_is_in_eval_mode_where_there_is_no_training(executor):
    batch, model = tasks(), net()
    noisy = learner(Noisy(), model=model, executor=copy.deepcopy(executor)).evaluate(batch)
    plain = learner(F.mse_loss, model=model).evaluate(batch)
    torch.testing.assert_close(noisy.query_losses, plain.query_losses)
    assert not any(m.training for m in learner(Noisy()).eval().modules())


def test_no_prediction_is_made_of_a_batch_whose_loss_takes_none():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            assert inputs.shape[0] == 4, "called on a support set"
            return self.layer(inputs)

    ours = learner(F.mse_loss, weights_alone, Refusing())
    result = ours.backward(tasks(), metric=F.mse_loss)
    torch.testing.assert_close(result.scores, result.query_losses, equal_nan=True)
    assert ours.adapt(tasks()[0].support)(torch.ones(4, 3)).shape == (4, 2)
    assert learner(energy).evaluate(tasks()).predictions is None


def test_one_module_in_both_places_is_learned_once():
    loss, support_loss = same()
    ours = learner(loss, support_loss)
    names = [name for name, _ in ours.named_parameters() if "loss" in name]
    assert names == ["loss.weight", "loss.scale"]
    assert not [name for name in ours.state_dict() if name.startswith("support_loss")]


def test_modules_that_share_a_part_learn_it_under_loss():
    loss, support_loss = Everything(), Everything()
    support_loss.net = loss.net
    ours = learner(loss, support_loss)
    gradients.plain_autograd(ours, tasks())
    names = {name for name, _ in ours.named_parameters() if name.startswith("support_loss")}
    assert names == {"support_loss.rates"}


@pytest.mark.parametrize("executor", [ENGINES[0], ENGINES[3]], ids=repr)
def test_what_is_changed_of_a_loss_is_seen_by_the_next_call(executor):
    blocks = {"model": nn.Sequential(nn.Linear(3, 2)), "executor": copy.deepcopy(executor)}
    ours, batch = learner(F.mse_loss, **blocks), tasks()
    seen = set()

    def look():
        gradients.plain_autograd(ours, batch)
        seen.add(float(ours.meta_gradient(batch).loss))

    look()
    ours.support_loss = penalised
    look()
    ours.support_loss = Weighted()
    look()
    ours.support_loss.power = 1
    look()
    ours.support_loss.shift = torch.tensor(-2.0)
    look()
    ours.support_loss.weight.requires_grad_(False)
    look()
    assert len(seen) == 5  # freezing changes no number


def test_a_loss_put_in_its_place_since_is_refused_like_any_other():
    ours = learner(F.mse_loss, order=mb.FirstOrder())
    ours.meta_gradient(tasks())
    ours.support_loss = Weighted()
    with pytest.raises(mb.MetablocksError, match=r"support_loss\.weight is learned through"):
        ours.meta_gradient(tasks())


def test_learned_losses_are_saved_copied_and_trained():
    ours, batch = learner(Weighted(0.5), Weighted(0.9)), tasks()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.backward(batch)
    optimizer.step()
    assert ours.support_loss.weight.item() != 0.9
    assert ours.loss.weight.item() != 0.5
    expected = ours.meta_gradient(batch)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other.meta_gradient(batch).loss, expected.loss)
    fresh = learner(Weighted(), Weighted())
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.meta_gradient(batch).loss, expected.loss)
    assert int(ours.loss.calls) == int(ours.support_loss.calls) == 0
