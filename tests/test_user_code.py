"""Code that users bring: right, or refused by name, and nothing of theirs is written.

The zoo holds whole models to plain autograd; here is one small test for each kind of fault.
"""

import collections
import dataclasses
import logging
import queue
import random
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import metablocks as mb
from metablocks.errors import (
    BlockError,
    ExecutorError,
    GradientError,
    ModuleError,
    RuleError,
    SelectionError,
    TaskError,
)

RATE = 0.1


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def tasks_of(count=3, inputs=2, outputs=1):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, inputs, generator=draw)
    y = torch.randn(count, 6, outputs, generator=draw)
    return mb.TaskBatch((x, y), (x + 1, y))


def learner_of(model, loss=F.mse_loss, **blocks):
    return mb.MetaLearner(
        model, **{"loss": loss, "steps": 1, "rule": mb.LearningRate(RATE), **blocks}
    )


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def losses_by_hand(model, tasks, loss=F.mse_loss):
    """Query losses after one step of plain autograd, on the module itself."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for index in range(len(tasks)):
        (x, y), (xq, yq) = tasks[index].support, tasks[index].query
        grads = torch.autograd.grad(loss(model(x), y), list(params.values()))
        fast = {n: p - RATE * g for (n, p), g in zip(params.items(), grads, strict=True)}
        found.append(loss(functional_call(model, fast, (xq,)), yq))
    return torch.stack(found).detach()


class Writer(nn.Module):
    """Writes whatever it can reach."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.table = torch.zeros(2)
        self.log, self.cache, self.recent = [], {}, collections.deque(maxlen=2)
        self.memory = Memory()
        self.count = 0

    def forward(self, x):
        self.count += 1
        self.table += 1
        self.log.append(self.count)
        self.cache[self.count] = x
        self.recent.append(x)
        self.memory.calls += 1
        self.lin.weight.data = self.lin.weight.data.clamp(-0.2, 0.2)
        x.mul_(1 + self.table[0] + len(self.log) + self.memory.calls)
        return self.lin(x)


class Memory:
    def __init__(self):
        self.calls = 0


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Loop(workers=2)], ids=["loop", "workers"])
def test_nothing_that_a_module_writes_is_the_users(executor):
    model, tasks = Writer(), tasks_of()
    weight = model.lin.weight.detach().clone()
    inputs = tasks.support[0].clone()
    learner = learner_of(model, executor=executor)
    first = learner.evaluate(tasks).query_losses
    learner.meta_gradient(tasks)
    learner.adapt(tasks[0].support)
    assert torch.equal(model.lin.weight, weight)
    assert torch.equal(tasks.support[0], inputs)
    assert torch.equal(model.table, torch.zeros(2))
    assert (model.log, model.cache, len(model.recent)) == ([], {}, 0)
    assert (model.memory.calls, model.count) == (0, 0)
    turned = mb.TaskBatch(*[(x.flip(0), y.flip(0)) for x, y in (tasks.support, tasks.query)])
    assert torch.equal(learner.evaluate(turned).query_losses.flip(0), first)


def test_a_write_that_the_first_pass_did_not_make_is_refused_by_name():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 1)

        def forward(self, x):
            if armed:
                with torch.no_grad():
                    self.lin.weight.mul_(2)
            return self.lin(x)

    armed = []
    fmodel = mb.FunctionalModule(Late())
    x = torch.ones(1, 2)
    fmodel(fmodel.state(), x)
    armed.append(True)
    with pytest.raises(ModuleError, match=r"wrote lin\.weight in place"):
        fmodel(fmodel.state(), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[1], "scale", 3.0),
        lambda m: m[1].mask.mul_(2),
        lambda m: m.__setitem__(1, nn.Sigmoid()),
        lambda m: m[1].register_forward_hook(lambda module, args, output: 2 * output),
    ],
    ids=["attribute", "tensor", "submodule", "hook"],
)
def test_what_is_changed_later_is_seen(change):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.mask = 1.0, torch.ones(4)

        def forward(self, x):
            return torch.tanh(self.scale * x) * self.mask

    model, tasks = nn.Sequential(nn.Linear(2, 4), Scaled(), nn.Linear(4, 1)), tasks_of()
    learner = learner_of(model)
    learner.meta_gradient(tasks)
    change(model)
    expected = losses_by_hand(model, tasks)
    torch.testing.assert_close(learner.meta_gradient(tasks).query_losses[:, 1], expected)
    torch.testing.assert_close(learner.evaluate(tasks).query_losses[:, 1], expected)
    adapted = learner.adapt(tasks[0].support)
    torch.testing.assert_close(
        F.mse_loss(adapted(tasks[0].query[0]), tasks[0].query[1]), expected[0]
    )


def test_freezing_and_unfreezing_count_from_the_next_call_on():
    model, tasks = net(), tasks_of()
    learner = learner_of(model)
    learner.meta_gradient(tasks)
    for flag in (False, True):
        model[0].requires_grad_(flag)
        got, made_now = learner.meta_gradient(tasks), learner_of(model).meta_gradient(tasks)
        torch.testing.assert_close(got.grads, made_now.grads)
        torch.testing.assert_close(got.query_losses, made_now.query_losses, equal_nan=True)


def test_what_is_unfrozen_without_a_rate_is_refused_by_name():
    model = net()
    model[0].requires_grad_(False)
    learner = learner_of(model, rule=mb.LearningRate(RATE, granularity="tensor"))
    model[0].requires_grad_(True)
    with pytest.raises(RuleError, match=r"0\.(weight|bias)"):
        learner.meta_gradient(tasks_of())


TEACHER = nn.Linear(2, 1, bias=False)


def _by_global(prediction, target):
    return F.mse_loss(prediction, target) + TEACHER.weight.to(prediction).square().sum()


def _readers():
    model, teacher = net(), nn.Linear(1, 1, bias=False)
    scale = torch.ones((), requires_grad=True)

    class Held:
        def loss(self, prediction, target):
            return F.mse_loss(teacher(prediction), target)

    def penalised(prediction, target):
        return F.mse_loss(prediction, target) + sum(p.abs().sum() for p in model.parameters())

    return {
        "penalty": (model, penalised, r"model\.0\.weight"),
        "lambda": (net(), lambda p, y: F.mse_loss(teacher(p), y), "teacher's weight"),
        "method": (net(), Held().loss, "trainable"),
        "partial": (net(), partial(lambda t, p, y: F.mse_loss(t(p), y), teacher), "weight"),
        "global": (net(), _by_global, "TEACHER's weight"),
        "plain tensor": (net(), lambda p, y: scale * F.mse_loss(p, y), "scale"),
    }


@pytest.mark.parametrize(
    "kind", ["penalty", "lambda", "method", "partial", "global", "plain tensor"]
)
def test_a_loss_that_reads_something_trainable_is_refused_by_name(kind):
    model, loss, name = _readers()[kind]
    learner = learner_of(model, loss)
    for call in (learner.meta_gradient, learner.backward):
        with pytest.raises(GradientError, match=name):
            call(tasks_of())


def test_a_loss_need_not_be_hashable():
    @dataclasses.dataclass
    class Scaled:
        factor: float

        def __call__(self, prediction, target):
            return self.factor * F.mse_loss(prediction, target)

    model, tasks, loss = net(), tasks_of(), Scaled(2.0)
    for executor in (mb.Loop(), mb.Loop(compile="trace")):
        learner = learner_of(model, loss, executor=executor)
        learner.meta_gradient(tasks)
        loss.factor = 3.0
        got = learner.meta_gradient(tasks).query_losses[:, 1]
        torch.testing.assert_close(got, losses_by_hand(model, tasks, loss))


def test_a_teacher_that_is_unfrozen_later_is_refused_then():
    teacher = nn.Linear(1, 1).requires_grad_(False)
    learner = learner_of(net(), lambda p, y: F.mse_loss(teacher(p), y))
    learner.meta_gradient(tasks_of())
    teacher.requires_grad_(True)
    with pytest.raises(GradientError, match="teacher's weight"):
        learner.meta_gradient(tasks_of())


@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Reptile()], ids=repr)
def test_a_teacher_that_is_read_from_a_later_batch_on_is_refused_then(estimator):
    class Distilling:
        def __init__(self):
            self.teacher, self.after = nn.Linear(1, 1), False

        def __call__(self, prediction, target):
            return F.mse_loss(prediction, self.teacher(target) if self.after else target)

    loss = Distilling()
    learner = learner_of(net(), loss, estimator=estimator)
    learner.meta_gradient(tasks_of())
    loss.after = True
    with pytest.raises(GradientError, match=r"the loss\.teacher's weight"):
        learner.meta_gradient(tasks_of())


def test_a_frozen_teacher_and_derivatives_by_the_input_are_no_fault():
    teacher = nn.Linear(1, 1).requires_grad_(False)

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            x = x.clone().requires_grad_()
            u = self.net(x)
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1]

    model, tasks = Slope(), tasks_of()
    loss = lambda p, y: F.mse_loss(teacher(p), y)  # noqa: E731
    learner = learner_of(model, loss)
    expected = losses_by_hand(model, tasks, loss)
    torch.testing.assert_close(learner.meta_gradient(tasks).query_losses[:, 1], expected)
    torch.testing.assert_close(learner.evaluate(tasks).query_losses[:, 1], expected)


def test_tasks_that_require_a_gradient_are_refused_by_name():
    x, y = torch.randn(1, 6, 2, requires_grad=True), torch.randn(1, 6, 1)
    with pytest.raises(TaskError, match=r"tasks\.support\[0\] requires a gradient"):
        learner_of(net()).backward(mb.TaskBatch((x, y), (x, y)))


def test_tensors_of_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        model, x = nn.Linear(2, 1), torch.ones(1, 6, 2)
    with pytest.raises(ModuleError, match=r"model\.weight was made under torch\.inference_mode"):
        learner_of(model).meta_gradient(tasks_of())
    with pytest.raises(TaskError, match=r"support\[0\] was made under torch\.inference_mode"):
        learner_of(net()).meta_gradient(mb.TaskBatch((x, x[..., :1]), (x, x[..., :1])))
    with torch.inference_mode():  # the mode itself is no hindrance
        assert learner_of_outside.meta_gradient(tasks_of_outside).loss.isfinite()


learner_of_outside = mb.MetaLearner(
    nn.Linear(2, 1).double(), loss=F.mse_loss, steps=1, rule=mb.LearningRate(RATE)
)
tasks_of_outside = mb.TaskBatch(*[(torch.ones(1, 3, 2).double(), torch.ones(1, 3, 1).double())] * 2)


def test_a_frozen_layer_named_in_adapt_is_said_to_be_frozen():
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(SelectionError, match="all frozen"):
        learner_of(model, adapt="0.*")


class Heads(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.body = nn.Linear(2, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(count))

    def forward(self, x, domain):
        return self.heads[domain](torch.tanh(self.body(x)))


def by_domain(count):
    tasks = tasks_of(count)
    made = [tasks[i] for i in range(count)]
    return [
        mb.Task(((t.support[0], i), t.support[1]), ((t.query[0], i), t.query[1]))
        for i, t in enumerate(made)
    ]


def test_each_task_may_use_another_part_and_what_none_uses_is_an_error_unless_named():
    assert learner_of(Heads(2)).meta_gradient(by_domain(2)).grads["model.heads.1.weight"].any()
    with pytest.raises(GradientError, match=r"model\.heads\.2\.weight.*allow_unused"):
        learner_of(Heads(3)).meta_gradient(by_domain(2))
    rule = mb.LearningRate(RATE, granularity="tensor", learn=True)
    learner = learner_of(Heads(3), rule=rule, allow_unused="heads.*")
    grads = learner.meta_gradient(by_domain(2)).grads
    assert not grads["model.heads.2.weight"].any()
    assert grads["model.heads.1.weight"].any()


def test_a_part_that_a_later_batch_does_not_use_has_the_gradient_zero():
    learner = learner_of(Heads(2))
    learner.meta_gradient(by_domain(2))
    assert not learner.meta_gradient(by_domain(1)).grads["model.heads.1.weight"].any()


def test_wrappers_that_act_on_grad_are_refused_by_name():
    fake = type("DistributedDataParallel", (nn.Sequential,), {})
    by_example = type("AbstractGradSampleModule", (nn.Sequential,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about PyTorch
        compiled = torch.compile(net())
    for wrapped, advice in (
        (fake(net()), r"model\.module"),
        (by_example(net()), "the module inside"),
        (nn.DataParallel(net()), r"model\.module"),
        (compiled, "Loop"),
    ):
        with pytest.raises(ModuleError, match=advice):
            learner_of(wrapped)


def test_hooks_of_parameters_fire_and_grad_is_not_what_is_returned():
    model, fired = net(), []
    model[0].weight.register_hook(lambda grad: 0 * grad)
    model[2].weight.register_post_accumulate_grad_hook(fired.append)
    result = learner_of(model).backward(tasks_of())
    assert not model[0].weight.grad.any()
    assert result.grads["model.0.weight"].any()
    assert [p is model[2].weight for p in fired] == [True]
    model[2].weight.grad.zero_()
    assert result.grads["model.2.weight"].any()


def test_backward_from_several_threads_adds_up():
    model, tasks = net(), tasks_of()
    learner = learner_of(model)
    expected = learner.meta_gradient(tasks).grads["model.0.weight"]
    threads = [threading.Thread(target=learner.backward, args=(tasks,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(model[0].weight.grad, 4 * expected)


def test_what_another_thread_draws_is_not_drawn_again():
    """It lives all the time, and draws in the middle of every pass."""
    asked, given, drawn = queue.Queue(), queue.Queue(), []

    def draw():
        while asked.get():
            given.put(float(torch.rand(())))

    class Asking(nn.Module):
        def forward(self, x):
            asked.put(True)
            drawn.append(given.get())
            return x

    learner = learner_of(nn.Sequential(nn.Linear(2, 1), Asking()))
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for call in (learner.meta_gradient, learner.evaluate, learner.meta_gradient):
            call(tasks_of())
    finally:
        asked.put(False)
        thread.join()
    assert len(drawn) > 12
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "estimator", [mb.Unrolled(), mb.Adjoint(keep_every=2), mb.Reptile()], ids=repr
)
def test_every_generator_that_a_model_draws_from_is_put_back(estimator):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.own = nn.Linear(2, 1), torch.Generator().manual_seed(3)

        def forward(self, x):
            noise = torch.rand((), generator=self.own) + torch.rand(())
            return self.lin(x) * (noise + random.random() + np.random.rand())

    class NamedAnew(nn.Linear):
        """Draws a name of its own, as each of its copies does."""

        def __setstate__(self, state):
            super().__setstate__(state)
            self.name = random.random() + np.random.rand() + float(torch.rand(()))

    def states():
        python, numpy = random.getstate(), np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(), python, numpy, model.own.get_state().tolist()

    model, tasks = Drawing(), tasks_of()
    learner = learner_of(model, steps=3, estimator=estimator)
    before, results = states(), []
    for _ in range(2):
        results.append(learner.meta_gradient(tasks).grads["model.lin.weight"])
        learner.evaluate(tasks)
        learner.adapt(tasks[0].support)
        assert states() == before
    assert torch.equal(*results)
    if estimator.exact:
        same = learner_of(model, steps=3).meta_gradient(tasks).grads["model.lin.weight"]
        torch.testing.assert_close(results[0], same)
    copied = learner_of(NamedAnew(2, 1), estimator=estimator)
    copied.evaluate(tasks)
    before = states()
    with ThreadPoolExecutor(1) as pool:  # with another thread about, whose draws would be its own
        pool.submit(int).result()
        assert copied.adapt(tasks[0].support).name
    assert states() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_iteration_of_the_users_is_an_error_and_no_end(workers):
    calls = iter(range(7))

    def loss(prediction, target):
        next(calls)
        return F.mse_loss(prediction, target)

    learner = learner_of(net(), loss, executor=mb.Loop(workers=workers))
    with pytest.raises(StopIteration):
        learner.evaluate(tasks_of(8))


def test_a_users_error_under_vmap_comes_out_as_it_is():
    def loss(prediction, target):
        raise RuntimeError("no data today")

    with pytest.raises(RuntimeError, match=r"^no data today$"):
        learner_of(net(), loss, executor=mb.Vmap()).evaluate(tasks_of())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(-1))[0][:, -1])


def test_what_vmap_refuses_says_what_to_do_and_train_maml_does_it(caplog):
    with pytest.raises(ExecutorError, match=r"executor=Loop\(\)"):
        learner_of(Recurrent(), executor=mb.Vmap()).meta_gradient(tasks_of())
    with caplog.at_level(logging.WARNING, logger="metablocks"):
        _, history = mb.train_maml(Recurrent(), [tasks_of()] * 2, inner_steps=1, progress=False)
    assert len(history.losses) == 2
    assert [record for record in caplog.messages if "Loop()" in record] == caplog.messages
    assert len(caplog.messages) == 1


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    note: str = "as it is"


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap(chunk=2)], ids=["loop", "vmap"])
@pytest.mark.parametrize("kind", ["distribution", "dataclass", "dict"])
def test_predictions_may_be_anything(kind, executor):
    wrap, loss = {
        "distribution": (
            lambda x: torch.distributions.Normal(x, torch.ones_like(x)),
            lambda d, y: -d.log_prob(y).mean(),
        ),
        "dataclass": (Output, lambda o, y: F.mse_loss(o.logits, y)),
        "dict": (
            lambda x: {"logits": x, "hidden": None, "scale": 2.0},
            lambda o, y: F.mse_loss(o["logits"], y),
        ),
    }[kind]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return wrap(self.net(x))

    model, tasks = Wrapped(), tasks_of()
    metric = lambda prediction, target: 0.5  # noqa: E731
    result = learner_of(model, loss, executor=executor).evaluate(tasks, metric=metric)
    torch.testing.assert_close(result.query_losses[:, 1], losses_by_hand(model, tasks, loss))
    assert torch.equal(result.metrics, torch.full((3, 2), 0.5))
    held = result.predictions
    if kind == "dict":
        assert held["logits"].shape == (3, 6, 1)
        assert held["hidden"] == [None] * 3
    else:
        rows = [row.mean if kind == "distribution" else row.logits for row in held]
        assert [row.shape for row in rows] == [(6, 1)] * 3


@pytest.mark.parametrize(
    "estimator", [mb.Unrolled(), mb.Adjoint(), mb.Reptile(), mb.Implicit()], ids=repr
)
def test_query_passes_serve_for_scores_too(estimator):
    model, tasks = net(), tasks_of()
    metric = lambda prediction, target: (prediction - target).abs().mean()  # noqa: E731
    learner = learner_of(model, estimator=estimator, steps=2)
    result = learner.backward(tasks, metric=metric)
    torch.testing.assert_close(result.scores.isnan(), result.query_losses.isnan())
    if learner.estimator.exact:
        scores = learner.evaluate(tasks, metric=metric).metrics
        torch.testing.assert_close(result.scores[:, -1], scores[:, -1])
    assert learner.meta_gradient(tasks).scores is None


Pair = collections.namedtuple("Pair", "x shift")


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 1)

    def forward(self, x, shift=None, twice=False, power=1):
        if isinstance(x, Pair):
            x, shift = x
        return self.lin(x) ** power * (2 if twice else 1) + (0 if shift is None else shift)


@pytest.mark.parametrize("executor", [mb.Loop(), mb.Vmap()], ids=["loop", "vmap"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"x": x, "shift": None, "twice": True, "power": 2},
        lambda x: collections.UserDict(x=x, shift=None, twice=True, power=2),
        lambda x: Pair(x, torch.zeros(x.shape[:-1]).unsqueeze(-1)),
    ],
    ids=["dict", "UserDict", "named tuple"],
)
def test_inputs_may_hold_more_than_tensors(wrap, executor):
    plain = tasks_of()
    tasks = mb.TaskBatch(*[(wrap(x), y) for x, y in (plain.support, plain.query)])
    model = Keywords()
    got = learner_of(model, executor=executor).meta_gradient(tasks).query_losses
    again = mb.TaskBatch.stack([tasks[i] for i in range(len(tasks))])
    torch.testing.assert_close(
        learner_of(model).meta_gradient(again).query_losses, got, equal_nan=True
    )


class Marking(nn.Module):
    """Leaves a trace in what it is given, or does without, to the same effect."""

    def __init__(self, kind, leaves):
        super().__init__()
        self.lin = nn.Linear(1, 1)
        self.kind, self.leaves = kind, leaves

    def forward(self, given):
        x = given[0]["x"] if self.kind == "items" else given
        scale = 1.0
        if self.kind == "items":
            items = given[0] if self.leaves else dict(given[0])
            scale = items.pop("scale") if "scale" in items else 9.0
        elif self.kind == "attributes" and self.leaves:
            scale, x.seen = (9.0 if hasattr(x, "seen") else 1.0), True
        elif self.kind == "flags":
            x = x.requires_grad_() if self.leaves else x.detach().requires_grad_()
            scale = 1 + torch.autograd.grad(self.lin(x).square().sum(), x, create_graph=True)[0]
        return self.lin(x) * scale


@pytest.mark.parametrize("kind", ["items", "attributes", "flags"])
def test_what_a_pass_leaves_in_its_inputs_ends_with_it(kind):
    plain = tasks_of(inputs=1)

    def wrap(x):
        return ({"x": x, "scale": x + 2},) if kind == "items" else x

    def popping(prediction, target):
        weight = target.pop("weight") if "weight" in target else 9.0
        return (weight * (prediction - target["y"]) ** 2).mean()

    def reading(prediction, target):
        return (target["weight"] * (prediction - target["y"]) ** 2).mean()

    def gradient(leaves):
        model = Marking(kind, leaves)
        with torch.no_grad():
            model.lin.weight.fill_(0.5)
            model.lin.bias.fill_(0.1)
        halves = [
            (((wrap(x),) if kind == "items" else x), {"y": y, "weight": y**2})
            for x, y in (plain.support, plain.query)
        ]
        learner = learner_of(model, loss=popping if leaves else reading, steps=3)
        return learner.meta_gradient(mb.TaskBatch(*halves)).grads

    left, pure = gradient(True), gradient(False)
    for name, expected in pure.items():
        torch.testing.assert_close(left[name], expected, rtol=1e-12, atol=0)


class Noted(torch.Tensor):
    """A tensor with an attribute."""


def _noted(x):
    made = x.as_subclass(Noted)
    made.gain = 1.0
    return made


class Tree(collections.abc.Mapping):
    """A mapping that is a pytree of its own kind, as a `TensorDict` is."""

    def __init__(self, held):
        self.held = held

    def __getitem__(self, key):
        return self.held[key]

    def __iter__(self):
        return iter(self.held)

    def __len__(self):
        return len(self.held)


pytree.register_pytree_node(
    Tree,
    lambda tree: ([*tree.held.values()], [*tree]),
    lambda v, k: Tree(dict(zip(k, v, strict=True))),
)
KINDS = {
    "an object": (lambda x: types.SimpleNamespace(x=x), lambda given: given.x, "SimpleNamespace"),
    "an array": (lambda x: x.numpy(), torch.as_tensor, "a ndarray"),
    "nested": (
        lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
        lambda given: given.to_padded_tensor(0.0),
        "nested",
    ),
    "sparse": (lambda x: x.to_sparse_csr(), lambda given: given.to_dense(), "sparse_csr"),
    "a mapping, a tree by itself": (lambda x: Tree({"x": x}), lambda given: given["x"], "a Tree"),
    "a class with an attribute": (_noted, lambda given: given * given.gain, "gain"),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*is in (beta|prototype)")
@pytest.mark.parametrize(("wrap", "unwrap", "words"), KINDS.values(), ids=KINDS.keys())
def test_inputs_may_be_of_any_kind_that_can_be_read_again(wrap, unwrap, words):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(unwrap(x))

    def own(batch):
        return wrap(batch[0].clone()), batch[1]

    plain, model = tasks_of(2), Reading()
    tasks = [mb.Task(own(plain[i].support), own(plain[i].query)) for i in range(2)]
    learner = learner_of(model)
    expected = losses_by_hand(model.net, plain)
    for estimator in (mb.Unrolled(), mb.Adjoint()):
        learner.estimator = estimator
        torch.testing.assert_close(learner.meta_gradient(tasks).query_losses[:, 1], expected)
    torch.testing.assert_close(learner.evaluate(tasks).query_losses[:, 1], expected)
    adapted = learner.adapt(tasks[0].support)
    torch.testing.assert_close(
        F.mse_loss(adapted(tasks[0].query[0]), plain[0].query[1]), expected[0]
    )
    learner.executor = mb.Vmap()
    with pytest.raises((TaskError, ExecutorError, AttributeError), match=words):
        learner.meta_gradient(tasks)


def test_inputs_whose_items_come_once_are_refused_by_name():
    x, y = torch.randn(6, 2), torch.randn(6, 1)
    tasks = [mb.Task(((row for row in x), y), (x, y))]
    with pytest.raises(TaskError, match=r"support\[0\] holds a generator, whose items come once"):
        learner_of(net()).evaluate(tasks)


def test_norms_at_their_running_statistics_are_those_of_eval_and_stay():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    for _ in range(20):
        model(torch.randn(20, 2) * 3 + 1)
    before = {name: b.clone() for name, b in model.named_buffers()}
    tasks = tasks_of()
    running = learner_of(model, norm_statistics="running")
    got = running.meta_gradient(tasks).query_losses[:, 1]
    override = learner_of(model).evaluate(tasks, norm_statistics="running").query_losses[:, 1]
    adapted = running.adapt(tasks[0].support)(tasks[0].query[0])
    expected = losses_by_hand(model.eval(), tasks)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(override, expected)
    torch.testing.assert_close(F.mse_loss(adapted, tasks[0].query[1]), expected[0])
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    per_step = mb.per_step_batch_norm(model, steps=1)
    with pytest.raises(BlockError, match="statistics of its own"):
        learner_of(per_step, norm_statistics="running")


@pytest.mark.parametrize(
    "executor", [mb.Loop(), mb.Loop(workers=2), mb.Vmap(), mb.Vmap(chunk=2)], ids=repr
)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_norms_at_the_supports_statistics_predict_as_the_adapted_model_does(executor, steps):
    """One query example at a time, too: none knows of another."""
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model = nn.Sequential(model, nn.BatchNorm1d(2), nn.Linear(2, 1), Counting())
    model(torch.randn(20, 2) * 3 + 1)
    before = {name: b.clone() for name, b in model.named_buffers()}
    tasks = tasks_of()
    learner = learner_of(model, executor=executor)
    got = learner.evaluate(tasks, steps=steps, norm_statistics="support")
    for row in range(len(tasks)):
        task = tasks[row]
        with torch.no_grad():
            expected = learner.adapt(task.support, steps=steps)(task.query[0])
        torch.testing.assert_close(got.predictions[row], expected)
        torch.testing.assert_close(got.query_losses[row, -1], F.mse_loss(expected, task.query[1]))
    apart = mb.TaskBatch(tasks.support, tuple(leaf[:, :1] for leaf in tasks.query))
    alone = learner.evaluate(apart, steps=steps, norm_statistics="support").predictions
    torch.testing.assert_close(alone, got.predictions[:, :1])
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    stated = learner_of(model, executor=executor, norm_statistics="support")
    again = stated.evaluate(tasks, steps=steps).query_losses
    assert torch.equal(again, got.query_losses)
    adapted = stated.adapt(tasks[0].support, steps=steps)(tasks[0].query[0])
    torch.testing.assert_close(adapted, got.predictions[0])
    trained = stated.meta_gradient(tasks).query_losses[:, -1]
    torch.testing.assert_close(trained, stated.evaluate(tasks).query_losses[:, -1])


class Counting(nn.Module):
    """Counts its passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes.add_(1)
        return x * (1 + 0.01 * self.passes)


def test_adapting_shares_what_is_frozen_and_copies_the_rest():
    model = net()
    model[0].requires_grad_(False)
    adapted = learner_of(model).adapt(tasks_of()[0].support)
    assert adapted[0].weight is model[0].weight
    assert adapted[2].weight is not model[2].weight


@pytest.mark.parametrize("estimator", [mb.Unrolled(), mb.Adjoint()], ids=repr)
def test_a_buffer_that_no_pass_writes_is_not_copied(estimator):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 1)
            self.register_buffer("table", torch.ones(2))

        def forward(self, x):
            seen.add(self.table.data_ptr())
            return self.lin(x * self.table)

    seen, model = set(), Table()
    learner_of(model, estimator=estimator).meta_gradient(tasks_of())
    assert seen == {model.table.data_ptr()}
