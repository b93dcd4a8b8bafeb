"""Habits of modules and losses that people bring: right, or refused by name, and never written.

What is expected is plain autograd by hand: a fresh module for each pass, as a learner has it.
"""

import collections
import dataclasses
import itertools
import random
import types
import weakref
from array import array

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.nn.utils import parametrize

import metablocks as mb
from metablocks.errors import BlockError, ExecutorError, GradientError, ModuleError, TaskError

pytestmark = pytest.mark.usefixtures("float64")

RATE, STEPS = 0.1, 2


class Net(nn.Module):
    """Two layers, and what a case puts into it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 1)
        self.more()

    def more(self):
        pass

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def some_tasks():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 6, 2, generator=draw), torch.randn(2, 6, 1, generator=draw)
    return mb.TaskBatch((x, y), (x + 1, y))


def learner_of(model, loss=F.mse_loss, **blocks):
    rule = mb.LearningRate(RATE)
    return mb.MetaLearner(model, **{"loss": loss, "steps": STEPS, "rule": rule, **blocks})


def by_hand(make, loss=F.mse_loss):
    """Query losses after the last step and the meta-gradient; every pass is that of a new module."""
    params = {name: p.detach().requires_grad_() for name, p in make().named_parameters()}
    tasks, losses = some_tasks(), []
    for task in (tasks[0], tasks[1]):
        fast = params
        for _ in range(STEPS):
            value = loss(functional_call(make(), fast, (task.support[0],)), task.support[1])
            slopes = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
        losses.append(loss(functional_call(make(), fast, (task.query[0],)), task.query[1]))
    total = torch.stack(losses).mean()
    grads = torch.autograd.grad(total, list(params.values()))
    named = {f"model.{name}": grad for name, grad in zip(params, grads, strict=True)}
    return torch.stack(losses).detach(), named


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


@dataclasses.dataclass(slots=True)
class SlottedData:
    count: int = 0


class Deque(collections.deque):
    pass


class Pair(tuple):
    """A value with a length of its own: none."""

    def __len__(self):
        raise NotImplementedError


def _adds_to(hold, count):
    """A module that counts its passes in something it holds."""

    class Counts(Net):
        def more(self):
            self.held = hold()

        def forward(self, x):
            return super().forward(x) * (1 + 0.1 * count(self.held))

    return Counts


def _add(held):
    held.count += 1
    return held.count


def _add_to_first(held):
    held[0] += 1
    return float(held[0])


def _append(held):
    held.append(1)
    return len(held)


STATE = {
    "slots": _adds_to(Slotted, _add),
    "a dataclass with slots": _adds_to(SlottedData, _add),
    "a namespace": _adds_to(lambda: types.SimpleNamespace(count=0), _add),
    "an array of NumPy": _adds_to(lambda: np.zeros(2), _add_to_first),
    "a bytearray": _adds_to(lambda: bytearray(2), _add_to_first),
    "an array": _adds_to(lambda: array("d", [0.0]), _add_to_first),
    "a subclass of deque": _adds_to(Deque, _append),
    "an array in a namespace in a list": _adds_to(
        lambda: [types.SimpleNamespace(x=np.zeros(1))], lambda held: _add_to_first(held[0].x)
    ),
}


class InSlots(Net):
    __slots__ = ("gain", "seen")

    def more(self):
        self.gain, self.seen = torch.full((4,), 1.5), []

    def forward(self, x):
        self.seen.append(x)
        return self.b(torch.tanh(self.a(x)) * self.gain * len(self.seen))


class OfTheClass(Net):
    log: list = []  # noqa: RUF012  (which is the point)

    def more(self):
        self.log.clear()

    def forward(self, x):
        self.log.append(x)
        return super().forward(x) * len(self.log)


class Keyed(Net):
    """Modules and tensors as keys, and their ids."""

    def more(self):
        self.scales = {self.a: 2.0, self.b.weight: 3.0, id(self.b): 0.5}

    def forward(self, x):
        first, second, third = self.factors()
        return self.b(torch.tanh(self.a(x) * first) * second) * third

    def factors(self):
        return self.scales[self.a], self.scales[self.b.weight], self.scales.get(id(self.b), 1.0)


class KeyedByHand(Net):
    """The same, as `functional_call` puts other tensors into the places of the keys."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) * 2.0) * 3.0) * 0.5


class Held(Net):
    """Modules in a deque, a set, a default, a weak reference."""

    def more(self):
        self.queue, self.last = collections.deque([self.a]), {self.b}
        self.pair = [Pair((0, 1))]
        self.by_default = lambda x, layer=self.a: layer(x)
        self.parent = weakref.ref(self)

    def forward(self, x):
        (last,) = self.last
        hidden = self.queue[0](x) + self.by_default(x).sin() + self.parent().a(x).cos()
        return last(torch.tanh(hidden))


def _wrapped():
    """A forward that is a function around a function around the method."""
    net = Net()

    def once(forward):
        return lambda x: forward(x) + 0.5

    net.forward = once(once(net.forward))
    return net


class NumPyCounter(Net):
    """A tensor that is written by way of NumPy."""

    def more(self):
        self.count = torch.zeros(1)

    def forward(self, x):
        self.count.detach().numpy()[0] += 1
        return super().forward(x) * (1 + 0.1 * self.count.detach().item())


class Cached(Net):
    """A parametrised weight, cached while a pass is at work."""

    def more(self):
        parametrize.register_parametrization(self.a, "weight", nn.Tanh())

    def forward(self, x):
        with parametrize.cached():
            return self.b(self.a(x).tanh() + self.a(-x).sin())


class SecondDerivatives(Net):
    """The trace of the Hessian by the input; in a pass that is watched PyTorch's `mul` crashed on it."""

    def forward(self, x):
        curved = vmap(hessian(lambda z: Net.forward(self, z).squeeze()))(x)
        return super().forward(x) + curved.sum((1, 2)).unsqueeze(-1)


class AsksTheInput(Net):
    """Takes a derivative by its input itself, which it does not copy."""

    def forward(self, x):
        x.requires_grad_()
        with torch.enable_grad():
            u = super().forward(x)
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1]


class AsksACopy(AsksTheInput):
    """By hand, where what the inputs are asked for would stay with them."""

    def forward(self, x):
        return super().forward(x.clone())


class Sparse(Net):
    def more(self):
        self.register_buffer("graph", torch.eye(6).to_sparse())
        self.other = (2 * torch.eye(6)).to_sparse()

    def forward(self, x):
        return torch.sparse.mm(self.other, torch.sparse.mm(self.graph, super().forward(x)))


class Redraws(Net):
    """Writes a buffer in every second pass of a task, as a counter among the buffers says."""

    def more(self):
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.calls == 2:
            self.gain.mul_(1.5)
            self.calls.zero_()
        self.calls += 1
        return super().forward(x) * self.gain


class AsksItsTensors(Net):
    """Asks a buffer and a plain tensor for derivatives, which nobody takes."""

    def more(self):
        self.register_buffer("zero", torch.zeros(()))
        self.plain = torch.zeros(())

    def forward(self, x):
        return super().forward(x) + self.zero.requires_grad_() + self.plain.requires_grad_()


class Registers(Net):
    """Registers hooks and a buffer in every pass."""

    def more(self):
        self.kept = []

    def forward(self, x):
        self.a.register_forward_hook(lambda module, args, output: self.kept.append(output))
        self.a.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
        self.b.register_buffer("note", torch.ones(()), persistent=False)
        return super().forward(x) + torch.stack(self.kept).sum()


class RegistersLater(Net):
    """Registers a hook in passes at other weights than the first."""

    def more(self):
        self.first = float(self.b.weight.detach().sum())

    def forward(self, x):
        if float(self.b.weight.detach().sum()) != self.first:
            self.a.register_forward_hook(lambda module, args, output: 2 * output)
        return super().forward(x)


class BackwardInForward(Net):
    """Takes a derivative by its input by .backward(), which adds into .grad of the parameters too."""

    def forward(self, x):
        z = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            torch.tanh(z).sum().backward()
        return super().forward(x - z.grad)


RIGHT = STATE | {
    "a module with slots": InSlots,
    "a list of the class": OfTheClass,
    "keys": Keyed,
    "held in odd places": Held,
    "a wrapped forward": _wrapped,
    "NumPy writes": NumPyCounter,
    "parametrize.cached": Cached,
    "second derivatives inside": SecondDerivatives,
    "requires_grad_ of the input": AsksTheInput,
    "sparse tensors": Sparse,
    "requires_grad_ of its tensors": AsksItsTensors,
    "hooks and buffers of a pass": Registers,
    "hooks of a later pass": RegistersLater,
    "backward in forward": BackwardInForward,
}


BY_HAND = {Keyed: KeyedByHand, AsksTheInput: AsksACopy}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT.keys())
def test_it_is_plain_autograd_and_nothing_of_the_users_is_written(make):
    losses, grads = by_hand(BY_HAND.get(make, make))
    tasks, model = some_tasks(), make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = repr(getattr(model, "held", None))
    for executor in (mb.Loop(), mb.Loop(workers=2)):
        learner = learner_of(model, executor=executor)
        for estimator in (mb.Unrolled(), mb.Adjoint(keep_every=2)):
            learner.estimator = estimator
            for _ in range(2):
                result = learner.meta_gradient(tasks)
                torch.testing.assert_close(result.query_losses[:, -1], losses)
                torch.testing.assert_close(result.grads, grads)
        torch.testing.assert_close(learner.evaluate(tasks).query_losses[:, -1], losses)
    adapted = learner.adapt(tasks[0].support)
    torch.testing.assert_close(F.mse_loss(adapted(tasks[0].query[0]), tasks[0].query[1]), losses[0])
    assert repr(getattr(model, "held", None)) == held
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    if isinstance(model, NumPyCounter):
        assert not model.count.any()
    if isinstance(model, AsksItsTensors):
        assert not any(tensor.requires_grad for tensor in (model.zero, model.plain))
    assert not any(len(held) for name, held in vars(model.a).items() if "_hooks" in name)
    if isinstance(model, Registers):
        assert not model.b._non_persistent_buffers_set
    assert not tasks.support[0].requires_grad


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap()], ids=repr)
@pytest.mark.parametrize(
    "make", [*STATE.values(), InSlots, Keyed, Held], ids=[*STATE, "slots", "keys", "held"]
)
def test_under_vmap_it_is_the_same(make, executor):
    _, grads = by_hand(BY_HAND.get(make, make))
    result = learner_of(make(), executor=executor).meta_gradient(some_tasks())
    torch.testing.assert_close(result.grads, grads)


def _with(**members):
    return type("Given", (Net,), members)


def _sets_its_class(self, x):
    type(self).calls += 1
    return Net.forward(self, x)


def _takes_away(self, x):
    self.state = None
    return Net.forward(self, x)


def _advances(self, x):
    return Net.forward(self, x) * next(self.numbers)


def _toggles(self, x):
    self.a.requires_grad_(False)
    return Net.forward(self, x)


def _asks_for_a_parameter(self, x):
    return Net.forward(self, x) * self.get_parameter("a.weight").sum()


def _reentrant(self, x):
    return torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=True)


class Reversible(torch.autograd.Function):
    """Runs a layer again in its backward pass, and that one's backward, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, slope):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, slope)
        return x.grad, None


def _reversible(self, x):
    return Reversible.apply(self.a(x), self.b)


def _reads_a_mark(self, x):
    return Net.forward(self, x) * self.a.weight.mark


def _branches(self, x):
    hidden = self.a(x)
    cond = torch.ops.higher_order.cond
    return self.b(*cond(hidden.sum() > 0, lambda h: (h.tanh(),), lambda h: (h.sin(),), (hidden,)))


def _in_inference_mode(self, x):
    with torch.inference_mode():
        hidden = self.a(x)
    return self.b(hidden)


REFUSED = {
    "sets its class": (_with(forward=_sets_its_class, calls=0), "sets calls of the class Given"),
    "takes a buffer away": (
        _with(forward=_takes_away, more=lambda self: self.register_buffer("state", torch.ones(1))),
        "takes the buffer state away",
    ),
    "advances an iterator": (
        _with(forward=_advances, more=lambda self: setattr(self, "numbers", itertools.count(1))),
        "next item of numbers, a count",
    ),
    "advances a generator": (
        _with(forward=_advances, more=lambda self: setattr(self, "numbers", (i for i in [1]))),
        "next item of numbers, a generator",
    ),
    "freezes in forward": (_with(forward=_toggles), "sets requires_grad of a parameter"),
    "get_parameter": (_with(forward=_asks_for_a_parameter), r"get_parameter\(\)"),
    "re-entrant checkpoints": (_with(forward=_reentrant), "use_reentrant=False"),
    "reversible layers": (_with(forward=_reversible), "runs torch.autograd.backward itself"),
    "an attribute of a parameter": (
        _with(forward=_reads_a_mark, more=lambda self: setattr(self.a.weight, "mark", 2.0)),
        "reads mark, an attribute that was set on a parameter",
    ),
    "an operator of the compiler": (
        _with(forward=_branches),
        "uses cond, an operator of the compiler",
    ),
    "inference_mode": (_with(forward=_in_inference_mode), r"torch\.inference_mode\(\)"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_followed_is_refused_by_name(make, words):
    tasks = some_tasks()
    for act in ("meta_gradient", "evaluate"):
        with pytest.raises((ModuleError, GradientError), match=words):
            getattr(learner_of(make()), act)(tasks)
    assert getattr(make, "calls", 0) == 0


def test_what_a_counter_asks_for_in_a_later_pass_is_found_out_before():
    """By hand the buffers go from pass to pass, as a task hands them on."""
    model, tasks = Redraws(), some_tasks()
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for task in (tasks[0], tasks[1]):
        fast, buffers = params, {name: b.clone() for name, b in model.named_buffers()}
        for _ in range(4):
            buffers = {name: b.clone() for name, b in buffers.items()}
            prediction = functional_call(model, {**fast, **buffers}, (task.support[0],))
            value = F.mse_loss(prediction, task.support[1])
            slopes = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
        buffers = {name: b.clone() for name, b in buffers.items()}
        prediction = functional_call(model, {**fast, **buffers}, (task.query[0],))
        losses.append(F.mse_loss(prediction, task.query[1]))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    learner = learner_of(model, steps=2)
    learner.evaluate(tasks)
    for estimator in (mb.Unrolled(), mb.Adjoint(keep_every=2)):
        learner = learner_of(model, steps=4, estimator=estimator)
        result = learner.meta_gradient(tasks)
        for (name, _), grad in zip(params.items(), grads, strict=True):
            torch.testing.assert_close(result.grads[f"model.{name}"], grad)
        for steps in (1, 4):
            last = learner.evaluate(tasks, steps=steps).query_losses[:, -1]
        torch.testing.assert_close(last, torch.stack(losses).detach())
    assert (model.gain, model.calls) == (1, 0)


def test_a_loss_without_a_second_derivative_is_named():
    def distances(prediction, target):
        return torch.cdist(prediction, target).mean()

    for executor in (mb.Loop(), mb.Vmap()):
        learner = learner_of(Net(), distances, executor=executor)
        with pytest.raises(GradientError, match=r"in the loss distances: .*order=FirstOrder"):
            learner.meta_gradient(some_tasks())
        learner.order = mb.FirstOrder()
        assert learner.meta_gradient(some_tasks()).loss.isfinite()


def test_a_second_derivative_that_fails_between_model_and_loss_is_said_to_be_one():
    class FreesItsGraph(Net):
        def forward(self, x):
            z = x.detach().clone().requires_grad_()
            with torch.enable_grad():
                super().forward(z).sum().backward()
            return super().forward(x - z.grad)

    with pytest.raises(GradientError, match="frees the graph of the inner steps"):
        learner_of(FreesItsGraph()).meta_gradient(some_tasks())


def test_a_buffer_written_by_out_is_refused_under_adjoint_alone():
    class Averages(Net):
        def more(self):
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x):
            y = super().forward(x)
            torch.add(0.9 * self.mean, y.detach().mean(0), out=self.mean)
            return y

    _, grads = by_hand(Averages)
    result = learner_of(Averages()).meta_gradient(some_tasks())
    torch.testing.assert_close(result.grads, grads)
    with pytest.raises(ModuleError, match=r"writes by out= .*estimator=Unrolled\(\)"):
        learner_of(Averages(), estimator=mb.Adjoint()).meta_gradient(some_tasks())


def test_a_hook_that_asks_for_the_module_after_a_pass_is_refused():
    net = Net()
    net.b.register_backward_hook(lambda *_: None)
    with pytest.raises(ModuleError, match="b has a hook by register_backward_hook"):
        learner_of(net)


def test_a_buffer_written_past_the_pass_is_refused_and_stays():
    net = Net()
    net.register_buffer("calls", torch.zeros(()))
    box = [net]  # a function closes over it, and over the module by it

    def forward(x):
        box[0].calls += 1
        return net.b(net.a(x))

    net.forward = forward
    fmodule = mb.FunctionalModule(net)
    with pytest.raises(ModuleError, match="writes calls in place, and reaches it by a global"):
        fmodule(fmodule.state(), torch.ones(1, 2))
    assert net.calls == 0


@pytest.mark.parametrize("field", ["model", "rule", "estimator"])
def test_a_block_put_there_later_is_refused_where_it_cannot_be_followed(field):
    learner = learner_of(Net())
    learner.meta_gradient(some_tasks())
    other = {"model": Net(), "rule": mb.LearningRate(0.5), "estimator": mb.Implicit()}[field]
    setattr(learner, field, other)
    with pytest.raises(
        BlockError, match=f"^{field} is a {type(other).__name__} that was put there"
    ):
        learner.evaluate(some_tasks())


def test_a_module_that_an_attribute_holds_is_seen_as_it_is():
    net = Net()
    net.hidden = [nn.Sequential(nn.Tanh())]
    net.forward = lambda x: net.b(net.hidden[0](net.a(x)))
    learner = learner_of(net)
    learner.evaluate(some_tasks())
    net.hidden[0][0] = nn.Sigmoid()
    got = learner.evaluate(some_tasks()).query_losses
    assert torch.equal(got, learner_of(net).evaluate(some_tasks()).query_losses)


def test_a_support_loss_that_reads_the_models_own_parameters_is_refused_at_evaluation_too():
    net = Net()

    def penalised(prediction, target):
        return F.mse_loss(prediction, target) + net.a.weight.square().sum()

    for executor in (mb.Loop(), mb.Vmap()):
        with pytest.raises(GradientError, match=r"model\.a\.weight"):
            learner_of(net, support_loss=penalised, executor=executor).evaluate(some_tasks())


def test_a_loss_that_writes_into_the_target_is_refused_and_nothing_is_written():
    def loss(prediction, target):
        return F.mse_loss(prediction, target.add_(1))

    tasks = some_tasks()
    before = tasks.query[1].clone()
    with pytest.raises(BlockError, match="writes in place into the task's target"):
        learner_of(Net(), loss).meta_gradient(tasks)
    assert torch.equal(tasks.query[1], before)


def test_a_loss_that_writes_into_the_target_later_is_refused_then():
    late = []

    def loss(prediction, target):
        if late:
            target += 1
        return (prediction - target).abs().mean()

    learner = learner_of(Net(), loss)
    learner.evaluate(some_tasks())
    late.append(True)
    with pytest.raises(BlockError, match=r"target, which its first call did not"):
        learner.evaluate(some_tasks())


def test_a_loss_may_differentiate_by_the_target_which_stays_as_it_is():
    def loss(prediction, target):
        value = F.mse_loss(prediction, target.requires_grad_())
        (slope,) = torch.autograd.grad(value, target, create_graph=True)
        return value + slope.square().mean()

    tasks = some_tasks()
    assert learner_of(Net(), loss).meta_gradient(tasks).loss.isfinite()
    assert not tasks.query[1].requires_grad


def test_a_loss_may_differentiate_by_the_prediction_at_evaluation_too():
    def loss(prediction, target):
        (slope,) = torch.autograd.grad((prediction**3).sum(), prediction, create_graph=True)
        return F.mse_loss(prediction, target) + 0.1 * slope.mean()

    losses, grads = by_hand(Net, loss)
    learner = learner_of(Net(), loss, estimator=mb.Adjoint(keep_every=2))
    torch.testing.assert_close(learner.meta_gradient(some_tasks()).grads, grads)
    torch.testing.assert_close(learner.evaluate(some_tasks()).query_losses[:, -1], losses)


def test_a_metric_may_take_a_derivative():
    def metric(prediction, target):
        prediction = prediction.clone().requires_grad_()
        return torch.autograd.grad(F.mse_loss(prediction, target), prediction)[0].abs().mean()

    result = learner_of(Net()).evaluate(some_tasks(), metric=metric)
    assert result.metrics.shape == (2, STEPS + 1)


def test_the_adapted_model_is_made_of_models_that_differentiate_by_their_input():
    class Energy(AsksTheInput):
        def more(self):
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return super().forward(self.norm(self.a(x))[:, :2])

    adapted = learner_of(Energy()).adapt(some_tasks()[0].support)
    assert adapted(torch.ones(3, 2)).shape == (3, 1)


OWN = random.Random(0)


def _draw():
    return OWN.random()


GENERATORS = {
    "of torch, closed over": torch.Generator(),
    "of Python, closed over": random.Random(),
    "of NumPy, closed over": np.random.default_rng(),
    "of Python, in a function that is called": OWN,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_that_a_loss_reaches_are_put_back_and_replayed(name):
    own = GENERATORS[name]

    def drawn():
        if name.startswith("of torch"):
            return float(torch.rand((), generator=own))
        return own.random()

    if own is OWN:
        loss = lambda p, y: F.mse_loss(p, y) * (1 + _draw())  # noqa: E731
    else:
        loss = lambda p, y: F.mse_loss(p, y) * (1 + drawn())  # noqa: E731
    results = []
    for estimator in (mb.Unrolled(), mb.Adjoint(keep_every=2)):
        learner = learner_of(Net(), loss, estimator=estimator)
        results += [learner.meta_gradient(some_tasks()).grads["model.a.weight"] for _ in range(2)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("place", ["model", "loss"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("no size left"), ValueError("a shape of the config"), IndexError("out of range")],
    ids=repr,
)
def test_an_error_that_user_code_raises_comes_out_as_it_is(place, error):
    def fail(*_):
        raise error

    net = Net()
    if place == "model":
        net.forward = fail
    learner = learner_of(net, fail if place == "loss" else F.mse_loss)
    for act in (learner.meta_gradient, learner.evaluate):
        with pytest.raises(type(error)) as caught:
            act(some_tasks())
        assert caught.value is error


def test_a_buffer_that_requires_a_gradient_is_refused_by_name():
    net = Net()
    net.register_buffer("gain", torch.ones(1, requires_grad=True))
    net.forward = lambda x: Net.forward(net, x) * net.gain
    with pytest.raises(GradientError, match="the buffer gain of the model requires a gradient"):
        learner_of(net).evaluate(some_tasks())


def test_a_prediction_whose_tensors_vmap_cannot_find_is_refused_there_alone():
    class Itself(Net):
        def forward(self, x):
            self.out = super().forward(x)
            return self

    def loss(prediction, target):
        return F.mse_loss(prediction.out, target)

    by_loop = learner_of(Itself(), loss).evaluate(some_tasks())
    last = loss(by_loop.predictions[1], some_tasks()[1].query[1])
    torch.testing.assert_close(last.detach(), by_loop.query_losses[1, -1])
    with pytest.raises(ExecutorError, match=r"holds a Itself.*executor=Loop\(\)"):
        learner_of(Itself(), loss, executor=mb.Vmap()).evaluate(some_tasks())


@pytest.mark.parametrize(
    ("make", "loss", "words"),
    [
        (lambda: Net().to("meta"), F.mse_loss, r"a\.weight of the model is on the device meta"),
        (lambda: nn.GRU(2, 1), F.mse_loss, r"what the model returns, a tuple .*prediction\[0\]"),
        (lambda: nn.Tanh(), F.mse_loss, "Tanh has no parameter"),
    ],
    ids=["no numbers", "a tuple", "no parameter"],
)
def test_what_does_not_go_together_is_said_by_name(make, loss, words):
    with pytest.raises((TaskError, BlockError), match=words):
        learner_of(make(), loss).meta_gradient(some_tasks())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def _calls_backward(prediction, target):
    slope = prediction.clone()
    slope.retain_grad()
    slope.square().sum().backward()
    return F.mse_loss(prediction, target) + slope.grad.square().mean()


def _cdist(prediction, target):
    return torch.cdist(prediction, target).square().mean()


_SQUARES_ONCE = _with(forward=lambda self, x: self.b(_Once.apply(self.a(x))))
NO_SECOND = {
    "once_differentiable": (_SQUARES_ONCE, F.mse_loss, {}, r"derivative in model \(Given\)"),
    "once_differentiable, implicit": (
        _SQUARES_ONCE,
        F.mse_loss,
        {"estimator": mb.Implicit(proximal=20.0)},
        r"derivative in model \(Given\)",
    ),
    "a loss": (Net, _cdist, {}, r"no second derivative in the loss _cdist: .*FirstOrder"),
}


@pytest.mark.parametrize(
    ("make", "loss", "blocks", "words"), NO_SECOND.values(), ids=NO_SECOND.keys()
)
def test_what_cannot_be_differentiated_twice_is_refused_by_name(make, loss, blocks, words):
    """PyTorch's `grad` passes by the node of `once_differentiable`, without a word."""
    with pytest.raises(GradientError, match=words):
        learner_of(make(), loss, **blocks).meta_gradient(some_tasks())
    first = learner_of(make(), loss, order=mb.FirstOrder())
    assert first.meta_gradient(some_tasks()).loss.isfinite()


def test_a_loss_that_frees_the_graph_of_the_inner_steps_is_refused_by_name():
    with pytest.raises(GradientError, match=r"calls \.backward\(\).*torch\.autograd\.grad"):
        learner_of(Net(), _calls_backward).meta_gradient(some_tasks())


def test_a_call_inside_a_transform_of_torch_func_is_refused():
    learner = learner_of(Net())
    with pytest.raises(GradientError, match=r"meta_gradient of a learner .* torch\.func"):
        torch.func.grad(lambda x: learner.meta_gradient(some_tasks()).loss * x)(torch.tensor(1.0))


def test_a_metric_that_writes_the_prediction_is_refused_by_name():
    def metric(prediction, target):
        return prediction.sub_(target).abs().mean()

    for act in ("evaluate", "meta_gradient"):
        with pytest.raises(BlockError, match="the metric metric writes in place"):
            getattr(learner_of(Net()), act)(some_tasks(), metric=metric)
